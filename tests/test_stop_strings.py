"""Stop strings across tokens, forks and torn characters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from engine_helpers import VOCABULARY, assert_idle, tiny_model
from shaped_sampling import BYTES, KINDS, PROMPT, Alternate, check, engine_on, expected_end, spell, utf8
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ibtpo_engine import Engine, Sampling


def test_below_a_fork_within_the_prompt_the_text_begins_at_the_fork() -> None:
    """Both for a stop string and for a mask, and for what is forked off further below."""
    engine = engine_on()
    grammar = Alternate()
    always = Sampling(max_tokens=20, logit_bias={8: 1e4})
    with engine.tree([*PROMPT[:20], 8, 8, *PROMPT[20:]]) as tree:
        [short] = engine.extend(tree.root.fork(at=22), replace(always, stop=("aaa",)))
        assert (short.start, short.end, short.stopped_by) == (22, 25, "aaa")
        [below] = engine.extend(short.fork(at=2), replace(always, stop=("aaaaa",)))
        assert (below.start, below.end, below.stopped_by) == (24, 27, "aaaaa")
        engine.extend(below.fork(), Sampling(max_tokens=1, allowed=grammar))
        assert grammar.advanced == (27 - 22) + (40 - 27 - 1), "what was sampled, from the fork on"


@pytest.mark.parametrize("stop", [("é",), ("∑", "😀"), ("aé", "éb"), ("b a",), ("a" * 3, "é é")])
def test_stop_strings_of_characters_split_over_tokens(how: str, stop: tuple[str, ...]) -> None:
    """The next byte of the alphabet or another one: characters are cut, completed and spoilt, also across a fork."""

    def next_or_other(prefix: npt.NDArray[np.int32]) -> list[int]:
        return [(int(prefix[-1]) + 1) % len(BYTES), int(prefix.sum()) % len(BYTES)]

    sampling = Sampling(max_tokens=80, stop=stop, allowed=next_or_other, temperature=3.0)
    engine = engine_on(how, decode=utf8)
    with engine.tree(PROMPT) as tree:
        nodes = engine.extend(tree.root.fork(20), replace(sampling, stop=(), max_tokens=17))
        nodes = engine.extend([node.fork()[0] for node in nodes], sampling)
    for node in nodes:
        check(node, sampling, utf8)
    if len(stop[0]) < 3:
        assert sum(node.stopped_by in stop for node in nodes) >= 2


def test_the_decoder_of_a_byte_level_tokenizer_serves() -> None:
    """As Qwen's and Llama 3's: random tokens of it are mostly torn characters; the check decodes everything anew."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["ab cab é"] * 9, trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    likely = tokenizer.encode("é ab c€") + tokenizer.encode("ca")
    sampling = Sampling(max_tokens=60, stop=("é a", "€", "bab"), allowed=lambda prefix: sorted(set(likely)))
    engine = Engine(tiny_model(vocabulary=len(tokenizer)), kv_tokens=16 * 200, decode=tokenizer.decode)
    with engine.tree(tokenizer.encode("cab é")) as tree:
        nodes = engine.extend(tree.root.fork(24), sampling)
    for node in nodes:
        expected = expected_end(node, sampling, tree.prompt_len, tokenizer.decode)
        assert (len(node), node.finish, node.stopped_by) == expected
    assert {"é a", "bab"} <= {node.stopped_by for node in nodes}


def test_a_stop_string_may_begin_above_the_fork_but_not_in_the_prompt() -> None:
    """Bias makes the text certain: one letter again and again."""
    always = Sampling(max_tokens=3, logit_bias={8: 1e4})
    engine = engine_on()
    with engine.tree([*PROMPT, 8, 8, 8]) as tree:
        [whole] = engine.extend(tree.root.fork(), replace(always, stop=("aaaa",), max_tokens=9))
        assert (whole.tokens.tolist(), whole.stopped_by) == ([8] * 4, "aaaa")
        [first] = engine.extend(tree.root.fork(), always)
        assert first.finish == "length"
        [second] = engine.extend(first.fork(), replace(always, stop=("aaaa", "aaa"), max_tokens=9))
        assert (len(second), second.stopped_by) == (1, "aaaa"), "of two that end there the first listed"
        [again] = engine.extend(first.fork(), replace(always, stop=("aaa",), min_tokens=6, max_tokens=9))
        assert (len(again), again.stopped_by) == (3, "aaa")
        [cut] = engine.extend(first.fork(at=1), replace(always, stop=("aaa",), max_tokens=9))
        assert (cut.start, len(cut)) == (len(PROMPT) + 3 + 1, 2)


def _first_stop_outside(tokens: list[int], stops: tuple[str, ...], block: tuple[int, int], inside: bool) -> int | None:
    """How many tokens there are when the first stop string is complete, by decoding all text between the blocks."""
    text: list[int] = []
    for i, token in enumerate(tokens):
        if inside or token == block[0]:
            inside, text = token != block[1], []
            continue
        text.append(token)
        if any(stop in spell(text) for stop in stops):
            return i + 1
    return None


@pytest.mark.parametrize("opened", [False, True])
def test_a_stop_string_in_a_block_of_thinking_ends_nothing(how: str, opened: bool) -> None:
    """Nor does one that begins in the block; on whole branches, and on branches forked anywhere, in a block or not."""
    block, stops = (30, 31), ("ab", "c", "xyx")
    bias = {30: 2.5, 31: 4.0}
    engine = engine_on(how)
    sampling = Sampling(max_tokens=90, temperature=3.0, stop=stops, stop_block=block, logit_bias=bias)
    ended_late = 0
    with engine.tree([*PROMPT, 30] if opened else PROMPT) as tree:
        whole = engine.extend(tree.root.fork(24), sampling)
        free = engine.extend(tree.root.fork(12), replace(sampling, stop=(), max_tokens=16))
        below = engine.extend([node.fork(at=4 + i)[0] for i, node in enumerate(free)], sampling)
        for node in [*whole, *below]:
            tokens = node.prefix()[tree.prompt_len :].tolist()
            begun = node.start - tree.prompt_len
            skipped = any(stop in spell(tokens[:-1]) for stop in stops)
            expected = _first_stop_outside(tokens, stops, block, opened)
            if begun and expected is not None and expected <= begun:
                continue  # its free parent had one already
            assert (node.finish, len(tokens)) == ("length", 90) if expected is None else ("stop", expected)
            ended_late += skipped and node.finish == "stop"
    assert ended_late >= 5, "ones that a stop string in a block would have ended"
    assert_idle(engine)


def test_below_a_closed_block_the_text_begins_after_it() -> None:
    """The block's last token spells "h"; the next ones, by bias, "b"."""
    engine = engine_on()
    always = Sampling(max_tokens=9, logit_bias={9: 1e4}, stop_block=(30, 31))
    with engine.tree(PROMPT) as tree:
        node = engine.score(tree, [[30, 8, 31]], keep=True)[0].node
        assert node is not None
        assert engine.extend(node.fork(), replace(always, stop=("hb",)))[0].finish == "length"
        assert len(engine.extend(node.fork(), replace(always, stop=("bb",)))[0]) == 2
        assert len(engine.extend(node.fork(), replace(always, stop=("hb",), stop_block=None))[0]) == 1


def test_within_a_block_nothing_is_decoded() -> None:
    calls: list[int] = []

    def decode(tokens: list[int]) -> str:
        calls.append(len(tokens))
        return spell(tokens)

    engine = engine_on(decode=decode)
    with engine.tree([*PROMPT, 30]) as tree:
        thinking = Sampling(max_tokens=200, stop=("a",), stop_block=(30, 31), logit_bias={8: 1e4})
        assert engine.extend(tree.root.fork(), thinking)[0].finish == "length"
    assert not calls


def test_a_long_text_is_decoded_in_a_window() -> None:
    """The work for a token does not grow with the text, and what is found is the same as in the whole."""
    lengths = []

    def counting(tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return spell(tokens)

    sampling = Sampling(max_tokens=400, stop=("abcdefg" * 2,))
    engine = engine_on(decode=counting)
    with engine.tree(PROMPT) as tree:
        [node] = engine.extend(tree.root.fork(), sampling)
        text = spell(node.tokens.tolist())
        assert node.finish == "length"
        assert max(lengths) <= 64
        assert sum(lengths) < 60 * len(node)
    engine = engine_on()
    for length in (6, 60, 130):  # longer than the shortest window, too
        late = replace(sampling, stop=(text[-length - 9 : -9],))
        with engine.tree(PROMPT, key=0) as tree:
            [found] = engine.extend(tree.root.fork(), late)
        assert found.tokens.tolist() == node.tokens[: len(found)].tolist()
        assert found.finish == "stop"
        check(found, late)


def test_a_branch_that_begins_late_decodes_no_more_than_one_that_goes_on() -> None:
    lengths = []

    def counting(tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return spell(tokens)

    def every_fifth(tokens: npt.NDArray[np.int32], new: int) -> bool:
        return new == 5

    sampling = Sampling(max_tokens=300, stop=("never",))
    engine = engine_on(decode=counting)
    with engine.tree(PROMPT, key=0) as tree:
        [whole] = engine.extend(tree.root.fork(), sampling)
        with_ends, lengths[:] = max(lengths), []
        [node] = engine.extend(tree.root.fork(), replace(sampling, pause=every_fifth))
        while node.finish is None:
            [node] = engine.extend([node.resume()], replace(sampling, pause=every_fifth))
    assert node.end == whole.end
    assert max(lengths) <= with_ends <= 64


def test_a_decoder_that_fails_stops_the_call_and_not_the_others(how: str) -> None:
    broken = True

    def decode(tokens: list[int]) -> str:
        if broken and len(tokens) > 9:
            raise RuntimeError("no such token")
        return spell(tokens)

    engine = engine_on(how, decode=decode)
    tree, other = engine.tree(PROMPT), engine.tree(PROMPT, key=3)
    bystanders = other.root.fork(2)
    engine._submit(bystanders, Sampling(max_tokens=20))
    with pytest.raises(RuntimeError, match="no such token"):
        engine.extend(tree.root.fork(3), Sampling(max_tokens=20, stop=("never",)))
    assert tree.root.children == []
    broken = False
    while any(node.in_flight for node in bystanders):
        engine._step()
    for node in [*bystanders, *engine.extend(tree.root.fork(2), KINDS["stop"])]:
        check(node, KINDS["stop"] if node.tree is tree else Sampling(max_tokens=20))
    tree.close()
    other.close()
    assert_idle(engine)


def test_stop_strings_without_a_decoder_name_the_remedy() -> None:
    engine = engine_on(decode=None)
    tree = engine.tree(PROMPT)
    pending = tree.root.fork()
    with pytest.raises(ValueError, match=r"Engine\(model, decode=tokenizer\.decode\)"):
        engine.extend(pending, KINDS["stop"])
    assert not pending[0].in_flight
    with pytest.raises(ValueError, match=r"token id 40 lies outside the vocabulary \[0, 40\)"):
        engine.extend(pending, Sampling(logit_bias={VOCABULARY: 1.0}))
    engine.extend(pending, KINDS["plain"])
    tree.close()
    assert_idle(engine)
