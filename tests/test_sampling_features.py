"""Bias, masks, least lengths, stop strings and seeds of branches, against one forward pass and full logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_helpers import VOCABULARY, assert_idle, path_logits, prompt_of, same, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ibtpo_engine import Engine, MaskState, Model, Node, NoTokenAllowed, Sampling, TokenMask, Tree, native
from ibtpo_kernels import Events, has_compiled, sample

PROMPT = prompt_of(37)
LETTERS = "abcdefgh"


def spell(tokens: list[int]) -> str:
    """Four or five tokens a letter, so that a stop string of some letters has many tokenisations; some have two."""
    return "".join("xy" if token == 39 else LETTERS[token % 8] for token in tokens)


# A UTF-8 alphabet: single bytes, so that a character is spread over up to four tokens, and some whole characters.
BYTES: list[bytes] = [bytes([b]) for b in "é∑😀".encode()] + [b"a", b"b", b" ", "é".encode(), b"a\xc3", b"\xa9b"]


def utf8(tokens: list[int]) -> str:
    return b"".join(BYTES[token % len(BYTES)] for token in tokens).decode("utf-8", errors="replace")


class Alternate:
    """A stateful grammar: the token's parity must change at every step; counts what is asked of it."""

    def __init__(self) -> None:
        self.begun = self.copied = self.advanced = 0

    def begin(self, prompt: npt.NDArray[np.int32]) -> MaskState:
        self.begun += 1
        return _Parity(self, int(prompt[-1]) % 2)


class _Parity:
    def __init__(self, grammar: Alternate, last: int) -> None:
        self.grammar = grammar
        self.last = last

    def allowed(self) -> list[int]:
        return list(range(1 - self.last, VOCABULARY, 2))

    def advance(self, token: int) -> None:
        self.grammar.advanced += 1
        self.last = token % 2

    def copy(self) -> Self:
        self.grammar.copied += 1
        return type(self)(self.grammar, self.last)


def near_last(prefix: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """A stateless mask that depends on the whole path: tokens at most 9 from (sum of the path) mod V, around."""
    distance = (np.arange(VOCABULARY) - int(prefix.sum())) % VOCABULARY
    allowed: npt.NDArray[np.bool_] = distance <= 9
    return allowed


BIAS = {3: 2.5, 17: -4.0, 21: -math.inf, 2: 1.0}
KINDS: dict[str, Sampling] = {
    "bias": Sampling(max_tokens=30, logit_bias=BIAS, stop_tokens=(2,)),
    "bias, cut": Sampling(max_tokens=30, logit_bias=BIAS, temperature=0.7, top_p=0.8, top_k=12, min_p=0.01),
    "least": Sampling(max_tokens=40, min_tokens=25, stop_tokens=(2, 5, 11, 13)),
    "prefix mask": Sampling(max_tokens=30, allowed=near_last, stop_tokens=(4,)),
    "grammar": Sampling(max_tokens=30, allowed=Alternate(), temperature=1.2),
    "greedy": Sampling(max_tokens=30, temperature=0, allowed=near_last, logit_bias=BIAS),
    "all": Sampling(
        max_tokens=40, min_tokens=12, stop_tokens=(4, 9), logit_bias=BIAS, allowed=near_last, seed=8, top_p=0.9,
        stop=("ab", "fab"),
    ),
    "stop": Sampling(max_tokens=40, stop=("ab", "cde", "x"), min_tokens=3),
    "plain": Sampling(max_tokens=30, stop_tokens=(2,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(params=["native", "module"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which path the plain rows take."""
    if request.param == "native" and not has_compiled():
        pytest.skip("needs the compiled kernels")
    if request.param == "module":
        monkeypatch.setattr(native, "MOST_BYTES", 0)
    return str(request.param)


def engine_on(model: Model, how: str = "native", **arguments: Any) -> Engine:
    engine = Engine(model, **({"kv_tokens": 16 * 400, "decode": spell} | arguments))
    assert engine.scheduler.runner.is_native == (how == "native" and has_compiled())
    return engine


# ---- the reference -------------------------------------------------------------------------------------------


def shaped(logits: Tensor, path: npt.NDArray[np.int32], depth: int, prompt_len: int, sampling: Sampling) -> Tensor:
    """[V] -> [V]: everything a branch's parameters say about the token at `depth`, done to its full logits."""
    logits = logits.clone()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if depth - prompt_len + 1 < sampling.min_tokens:
        logits[list(sampling.stop_tokens)] = -torch.inf
    if isinstance(sampling.allowed, TokenMask):
        state = sampling.allowed.begin(path[:prompt_len])
        for token in path[prompt_len:depth]:
            state.advance(int(token))
        allowed = np.isin(np.arange(VOCABULARY), state.allowed())
    elif sampling.allowed is not None:
        allowed = np.asarray(sampling.allowed(path[:depth]))
        allowed = allowed if allowed.dtype == np.bool_ else np.isin(np.arange(VOCABULARY), allowed)
    else:
        return logits
    logits[torch.from_numpy(~allowed)] = -torch.inf
    return logits


def expected_end(
    node: Node, sampling: Sampling, prompt_len: int, decode: Callable[[list[int]], str]
) -> tuple[int, str | None, str | int | None]:
    """(length of the node, finish, stopped_by), by decoding the whole text anew after every token."""
    path = node.prefix()
    base = decode(path[:prompt_len].tolist())
    texts = {n: decode(path[:n].tolist()) for n in range(node.start, node.end + 1)}
    for n in range(node.start + 1, node.end + 1):
        if n - prompt_len >= sampling.min_tokens and int(path[n - 1]) in sampling.stop_tokens:
            return n - node.start, "stop", int(path[n - 1])
        before, after = texts[n - 1], texts[n]
        ends = {
            (at + len(stop), order): stop
            for order, stop in enumerate(sampling.stop)
            for at in range(common(base, after), len(after) - len(stop) + 1)
            if after[at : at + len(stop)] == stop and at + len(stop) > common(before, after)
        }
        if ends and n - prompt_len >= sampling.min_tokens:
            return n - node.start, "stop", ends[min(ends)]
        if n - prompt_len == sampling.max_tokens:
            return n - node.start, "length", None
    return len(node), "goes on", None


def common(left: str, right: str) -> int:
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n


def check(model: Model, node: Node, sampling: Sampling, decode: Callable[[list[int]], str] = spell) -> None:
    """Assert that every number and the ending of a node are what one forward pass and full logits say."""
    prompt_len, path = node.tree.prompt_len, node.prefix()
    raw = path_logits(model, path)[node.start - 1 : node.end - 1].float()
    ours = torch.stack([shaped(raw[i], path, node.start + i, prompt_len, sampling) for i in range(len(node))])
    token, logprob, _, _ = sample(
        ours,
        torch.tensor([[node.stream, depth] for depth in range(node.start, node.end)]),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
    )
    assert node.tokens.tolist() == token.tolist()
    np.testing.assert_allclose(node.logprob, logprob, rtol=0, atol=5e-5)
    p = raw.double().log_softmax(-1)
    np.testing.assert_allclose(node.logprob_raw, p[range(len(node)), token], rtol=0, atol=5e-5)
    np.testing.assert_allclose(node.entropy, -(p.exp() * p).sum(-1), rtol=0, atol=5e-5)
    assert (len(node), node.finish, node.stopped_by) == expected_end(node, sampling, prompt_len, decode)


def grow_all(engine: Engine, kinds: list[Sampling]) -> list[tuple[Node, Sampling]]:
    """Branches of every kind in one batch, then forks of each within and at its end, in one batch again."""
    found: list[tuple[Node, Sampling]] = []
    trees = [engine.tree(PROMPT, key=i) for i in range(len(kinds))]
    for round_ in range(2):
        for tree, sampling in zip(trees, kinds, strict=True):
            if round_ == 0:
                nodes = tree.root.fork(3)
            else:
                first, second, _ = tree.leaves()
                nodes = first.fork(2, at=max(len(first) // 2, 1))
                nodes += second.fork(1) if second.end < tree.prompt_len + sampling.max_tokens else []
            engine._submit(nodes, sampling)
            found += [(node, sampling) for node in nodes]
        while any(node.in_flight for node, _ in found):
            engine._step()
    return found


# ---- equal to the reference ----------------------------------------------------------------------------------


def test_every_kind_in_one_batch_is_what_full_logits_say(model: Model, how: str) -> None:
    """On both paths, forks included; and every feature made a difference somewhere."""
    engine = engine_on(model, how)
    found = grow_all(engine, list(KINDS.values()))
    assert len(found) > 5 * len(KINDS) - 5
    for node, sampling in found:
        check(model, node, sampling)
        if node.finish == "stop":
            assert node.end - node.tree.prompt_len >= sampling.min_tokens
    of = {name: [node for node, sampling in found if sampling is kind] for name, kind in KINDS.items()}
    assert {node.stopped_by for node in of["stop"]} >= {"ab", "cde"}
    assert {type(node.stopped_by) for node in of["all"]} >= {int, str}
    assert any(isinstance(node.stopped_by, int) for node in of["least"])
    for name in ("bias", "prefix mask", "grammar", "all"):
        numbers = [np.abs(node.logprob - node.logprob_raw).max() for node in of[name]]
        assert min(numbers) > 0.1, "what is sampled from is not the model's distribution"
    for node in of["plain"]:
        np.testing.assert_allclose(node.logprob, node.logprob_raw, rtol=0, atol=1e-6)


@pytest.mark.skipif(not has_compiled(), reason="needs the compiled kernels")
def test_native_and_module_path_sample_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [node for node, _ in grow_all(engine_on(model), list(KINDS.values()))]
    monkeypatch.setattr(native, "MOST_BYTES", 0)
    theirs = [node for node, _ in grow_all(engine_on(model, "module"), list(KINDS.values()))]
    same(ours, theirs, atol=1e-4)
    assert [node.stopped_by for node in ours] == [node.stopped_by for node in theirs]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_alone_is_the_same_as_in_the_batch(model: Model, name: str) -> None:
    everything = grow_all(engine_on(model), list(KINDS.values()))
    index = list(KINDS).index(name)
    engine = engine_on(model)
    engine._opened = index  # nothing but the key may matter; it is given
    tree = engine.tree(PROMPT, key=index)
    ours = engine.extend(tree.root.fork(3), KINDS[name])
    same(ours, [node_as_sampled(node) for node, sampling in everything if sampling is KINDS[name]][:3])


def node_as_sampled(node: Node) -> Node:
    """The node before it was cut by later forks: joined with the upper parts of it."""
    parts = [part for part in node.path() if part.birth == node.birth]
    whole = Tree(parts[0].parent.prefix()).root.fork()[0]  # type: ignore[union-attr]
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in NUMBERS]
    return whole.fill(joined[0], joined[1], joined[2], joined[3], finish=node.finish)


NUMBERS = ("tokens", "logprob", "logprob_raw", "entropy")


# ---- properties ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_tokens", [16 * 24, 16 * 31])
def test_preemption_changes_nothing(model: Model, how: str, kv_tokens: int) -> None:
    """Features stay with a branch that loses its pages: no token is handed to a grammar or a text twice."""

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(3)
        longest = max(nodes, key=len)
        yield [*longest.fork(2, at=len(longest) // 2)]

    for name in ("all", "grammar", "stop", "least"):
        sampling, grown, preemptions = KINDS[name], [], []
        for size in (16 * 400, kv_tokens):
            engine = engine_on(model, how, kv_tokens=size)
            trees = dict(engine.run(search, [prompt_of(40, seed=i) for i in range(5)], sampling))
            grown.append([node for i in range(5) for node in trees[i].nodes()])
            preemptions.append(engine.stats()["preemptions"])
            assert engine.stats()["sampled"] == sum(tree.num_sampled for tree in trees.values()), "none drawn twice"
            assert_idle(engine)
            assert not engine.scheduler.slots.features
        same(*grown)
        assert [node.stopped_by for node in grown[0]] == [node.stopped_by for node in grown[1]]
        assert preemptions[0] == 0
        assert preemptions[1] > 0 or name == "stop", "stops may end all branches before pages run out"
        for node in grown[1]:
            if node.finish is not None and len(node.children) == 0:
                assert node.parent is not None
                if node.birth != node.parent.birth:
                    check(model, node, sampling)


def test_plain_branches_stay_native_beside_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step runs exactly the branches without shaped logits in the native call; stop strings do not end that."""
    if not has_compiled():
        pytest.skip("needs the compiled kernels")
    engine = engine_on(model)
    ran: list[list[int]] = []
    decode = engine.scheduler.runner.decode

    def watched(slots: Any, chosen: npt.NDArray[np.int64], *most: int) -> tuple[int, Events]:
        ran.append(sorted(id(engine.scheduler.running[slot].node) for slot in chosen.tolist()))
        return decode(slots, chosen, *most)

    monkeypatch.setattr(engine.scheduler.runner, "decode", watched)
    tree = engine.tree(PROMPT)
    plain, strings, biased, least = tree.root.fork(4)
    engine._submit([plain], Sampling(max_tokens=20))
    engine._submit([strings], Sampling(max_tokens=20, stop=("never",)))
    engine._submit([biased], Sampling(max_tokens=20, logit_bias=BIAS))
    engine._submit([least], Sampling(max_tokens=20, stop_tokens=(VOCABULARY - 1,), min_tokens=9))
    while plain.in_flight:
        engine._step()
    two, three = sorted(map(id, (plain, strings))), sorted(map(id, (plain, strings, least)))
    assert [two, three] == [ran[0], ran[-1]]
    assert all(step in (two, three) for step in ran)
    assert 6 <= ran.count(two) <= 9, "until the least length is reached"
    assert ran.count(three) >= 9


def test_a_step_without_features_asks_for_none(model: Model, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a branch needed does not stay behind for the next in its slot."""
    engine = engine_on(model, how, max_branches=3)
    with engine.tree(PROMPT) as tree:
        engine.extend(tree.root.fork(5), KINDS["all"])
        assert not engine.scheduler.slots.features
        monkeypatch.setattr(type(engine.scheduler.slots.features), "follow", None)
        monkeypatch.setattr(type(engine.scheduler.slots.features), "split", None)
        for node in engine.extend(tree.root.fork(5), KINDS["plain"]):
            check(model, node, KINDS["plain"])
    assert_idle(engine)


# ---- masks ---------------------------------------------------------------------------------------------------


def test_a_fork_goes_on_with_a_copy_of_the_state(model: Model, how: str) -> None:
    """At a leaf the state is copied and the prompt not read again; within a segment the tokens before are replayed."""
    grammar = Alternate()
    sampling = Sampling(max_tokens=10, allowed=grammar)
    engine = engine_on(model, how)
    tree = engine.tree(PROMPT)
    [leaf] = engine.extend(tree.root.fork(), sampling)
    assert (grammar.begun, grammar.copied, grammar.advanced) == (1, 0, 9), "the last token is handed on when needed"
    longer = replace(sampling, max_tokens=20)
    ends = engine.extend(leaf.fork(3), longer)
    assert (grammar.begun, grammar.copied) == (1, 3)
    assert grammar.advanced == 9 + 3 * (1 + 9)
    inner = engine.extend(leaf.fork(2, at=4), longer)
    assert (grammar.begun, grammar.copied) == (3, 3), "nothing above holds a state"
    assert len({tuple(node.tokens) for node in ends}) == 3
    for node in [*ends, *inner]:
        parity = node.prefix()[len(PROMPT) - 1 :] % 2
        assert (parity[1:] != parity[:-1]).all()
        check(model, node, longer)


def test_another_mask_below_does_not_take_over_the_state(model: Model) -> None:
    one, other = Alternate(), Alternate()
    engine = engine_on(model)
    tree = engine.tree(PROMPT)
    [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=6, allowed=one))
    engine.extend(leaf.fork(), Sampling(max_tokens=12, allowed=other))
    assert (one.copied, other.begun, other.advanced) == (0, 1, 6 + 5)


@pytest.mark.parametrize("when", [0, 1, 7])
def test_no_token_left_is_an_error_that_names_the_branch_and_leaves_the_engine_usable(
    model: Model, how: str, when: int
) -> None:
    engine = engine_on(model, how)
    tree, other = engine.tree(PROMPT), engine.tree(PROMPT, key=9)

    def dries_up(prefix: npt.NDArray[np.int32]) -> list[int]:
        return [] if len(prefix) == len(PROMPT) + when else [5, 6, 7]

    bystander = other.root.fork()
    engine._submit(bystander, KINDS["grammar"])
    pending = tree.root.fork(2)
    with pytest.raises(NoTokenAllowed, match=rf"Node\(1, .*no token is left to sample at depth {37 + when}"):
        engine.extend(pending, Sampling(allowed=dries_up))
    assert all(node.dropped for node in pending)
    engine.check_integrity()
    while bystander[0].in_flight:
        engine._step()
    check(model, bystander[0], KINDS["grammar"])
    tree.close()
    other.close()
    assert_idle(engine)
    assert not engine.scheduler.slots.features


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(allowed=lambda prefix: [2], stop_tokens=(2,), min_tokens=3),
        Sampling(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf)),
    ],
    ids=["mask and least length", "bias"],
)
def test_what_forbids_everything_together_is_named(model: Model, sampling: Sampling) -> None:
    engine = engine_on(model)
    with (
        engine.tree(PROMPT) as tree,
        pytest.raises(NoTokenAllowed, match="Sampling.allowed, min_tokens and logit_bias"),
    ):
        engine.extend(tree.root.fork(), sampling)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.ones(VOCABULARY - 1, np.bool_), rf"shape \(39,\), expected \({VOCABULARY},\)"),
        ([3, VOCABULARY], rf"\[3, {VOCABULARY}\]; expected token ids in \[0, {VOCABULARY}\)"),
        ([-1], "expected token ids"),
        ([0.5], "float64"),
    ],
)
def test_an_answer_that_is_no_mask_is_named(model: Model, answer: Any, message: str) -> None:
    engine = engine_on(model)
    with engine.tree(PROMPT) as tree:
        with pytest.raises(ValueError, match=message):
            engine.extend(tree.root.fork(), Sampling(allowed=lambda prefix: answer))
        check(model, engine.extend(tree.root.fork(), KINDS["plain"])[0], KINDS["plain"])


def test_a_mask_may_not_write_into_the_path(model: Model) -> None:
    def writes(prefix: npt.NDArray[np.int32]) -> list[int]:
        prefix[0] = 1
        return [3]

    engine = engine_on(model)
    with engine.tree(PROMPT) as tree, pytest.raises(ValueError, match="read-only"):
        engine.extend(tree.root.fork(), Sampling(allowed=writes))


# ---- stop strings --------------------------------------------------------------------------------------------


def test_below_a_fork_within_the_prompt_the_text_begins_at_the_fork(model: Model) -> None:
    """Both for a stop string and for a mask, and for what is forked off further below."""
    engine = engine_on(model)
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
def test_stop_strings_of_characters_split_over_tokens(model: Model, how: str, stop: tuple[str, ...]) -> None:
    """The next byte of the alphabet or another one: characters are cut, completed and spoilt, also across a fork."""

    def next_or_other(prefix: npt.NDArray[np.int32]) -> list[int]:
        return [(int(prefix[-1]) + 1) % len(BYTES), int(prefix.sum()) % len(BYTES)]

    sampling = Sampling(max_tokens=80, stop=stop, allowed=next_or_other, temperature=3.0)
    engine = engine_on(model, how, decode=utf8)
    with engine.tree(PROMPT) as tree:
        nodes = engine.extend(tree.root.fork(20), replace(sampling, stop=(), max_tokens=17))
        nodes = engine.extend([node.fork()[0] for node in nodes], sampling)
    for node in nodes:
        check(model, node, sampling, utf8)
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


def test_a_stop_string_may_begin_above_the_fork_but_not_in_the_prompt(model: Model) -> None:
    """Bias makes the text certain: one letter again and again."""
    always = Sampling(max_tokens=3, logit_bias={8: 1e4})
    engine = engine_on(model)
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


def test_a_long_text_is_decoded_in_a_window(model: Model) -> None:
    """The work for a token does not grow with the text, and what is found is the same as in the whole."""
    lengths = []

    def counting(tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return spell(tokens)

    sampling = Sampling(max_tokens=400, stop=("abcdefg" * 2,))
    engine = engine_on(model, decode=counting)
    with engine.tree(PROMPT) as tree:
        [node] = engine.extend(tree.root.fork(), sampling)
        text = spell(node.tokens.tolist())
        assert node.finish == "length"
        assert max(lengths) <= 64
        assert sum(lengths) < 60 * len(node)
    engine = engine_on(model)
    for length in (6, 60, 130):  # longer than the shortest window, too
        late = replace(sampling, stop=(text[-length - 9 : -9],))
        with engine.tree(PROMPT, key=0) as tree:
            [found] = engine.extend(tree.root.fork(), late)
        assert found.tokens.tolist() == node.tokens[: len(found)].tolist()
        assert found.finish == "stop"
        check(model, found, late)


def test_a_decoder_that_fails_stops_the_call_and_not_the_others(model: Model, how: str) -> None:
    broken = True

    def decode(tokens: list[int]) -> str:
        if broken and len(tokens) > 9:
            raise RuntimeError("no such token")
        return spell(tokens)

    engine = engine_on(model, how, decode=decode)
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
        check(model, node, KINDS["stop"] if node.tree is tree else Sampling(max_tokens=20))
    tree.close()
    other.close()
    assert_idle(engine)


def test_stop_strings_without_a_decoder_name_the_remedy(model: Model) -> None:
    engine = engine_on(model, decode=None)
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


# ---- seeds ---------------------------------------------------------------------------------------------------


def seeded_tokens(model: Model, *, seed: int | None, key: int, engine_seed: int) -> list[tuple[int, ...]]:
    engine = engine_on(model, seed=engine_seed)
    sampling = Sampling(max_tokens=12, seed=seed)
    with engine.tree(PROMPT, key=key) as tree:
        first, *rest = engine.extend(tree.root.fork(4), sampling)
        whole = tuple(first.tokens.tolist())
        below = engine.extend([*first.fork(2, at=5), *rest[0].fork(2, at=5)], sampling)
        return [whole, *(tuple(node.prefix().tolist()) for node in [*rest, *below])]


def test_a_seed_names_the_random_numbers_whatever_the_trees_key_and_the_engines_seed(model: Model) -> None:
    ours = seeded_tokens(model, seed=5, key=0, engine_seed=0)
    assert len(set(ours)) == len(ours), "siblings and branches below different leaves differ"
    assert seeded_tokens(model, seed=5, key=3, engine_seed=8) == ours
    assert not set(seeded_tokens(model, seed=6, key=0, engine_seed=0)) & set(ours)
    plain = seeded_tokens(model, seed=None, key=5, engine_seed=0)
    assert not set(plain) & set(ours)
    assert seeded_tokens(model, seed=None, key=5, engine_seed=0) == plain


def test_branches_at_the_same_depth_below_different_leaves_have_streams_of_their_own(model: Model) -> None:
    engine = engine_on(model)
    with engine.tree(PROMPT) as tree:
        sampling = Sampling(max_tokens=8, seed=2)
        leaves = engine.extend(tree.root.fork(3), sampling)
        forks = [node for leaf in leaves for node in leaf.fork(2, at=4)]
        engine.extend(forks, sampling)
    streams = {node.stream for node in [*leaves, *forks]}
    assert len(streams) == 9


# ---- generate ------------------------------------------------------------------------------------------------


def test_generate_gives_n_trajectories_a_prompt_in_order_and_as_a_stream(model: Model) -> None:
    """Prompts are taken as there is room, results come before the last prompt was read, keys make them come again."""
    taken = []

    def prompts() -> Iterator[list[int]]:
        for i in range(12):
            taken.append(i)
            yield prompt_of(5 + 4 * (i % 3), seed=i)

    engine = engine_on(model, max_branches=6)
    sampling = Sampling(max_tokens=25, stop_tokens=(2, 7))
    results, read = [], []
    for nodes in engine.generate(prompts(), sampling, n=3, keys=range(100, 112)):
        results.append(nodes)
        read.append(len(taken))
    assert [len(nodes) for nodes in results] == [3] * 12
    assert read[0] < 12
    for i, nodes in enumerate(results):
        assert nodes[0].tree.root.tokens.tolist() == prompt_of(5 + 4 * (i % 3), seed=i)
        for node in nodes:
            check(model, node, sampling)
        again = next(engine.generate([prompt_of(5 + 4 * (i % 3), seed=i)], sampling, n=3, keys=[100 + i]))
        same(again, nodes)
    assert_idle(engine)


def test_generate_gives_paused_trajectories_too(model: Model) -> None:
    sampling = Sampling(max_tokens=25, pause=lambda tokens, new: new == 5)
    [nodes] = engine_on(model).generate([PROMPT], sampling, n=3)
    assert [(len(node), node.finish) for node in nodes] == [(5, None)] * 3


def test_generate_without_keys_samples_anew_each_time(model: Model) -> None:
    engine = engine_on(model)
    [one], [two] = (list(engine.generate([PROMPT], Sampling(max_tokens=12), n=2)) for _ in range(2))
    assert len({tuple(node.tokens) for node in [*one, *two]}) == 4


def test_generate_left_early_gives_everything_back(model: Model) -> None:
    engine = engine_on(model)
    stream = engine.generate([PROMPT] * 8, KINDS["all"], n=2)
    next(stream)
    stream.close()
    assert_idle(engine)
    with pytest.raises(ValueError, match="n=0"):
        engine.generate([PROMPT], KINDS["plain"], n=0)


# ---- fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": 1 << 31},
        {"min_tokens": -1},
        {"min_tokens": 257},
        {"stop": "text"},
        {"stop": ("a", "")},
        {"stop": (3,)},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"allowed": [1, 2]},
    ],
)
def test_fields_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Sampling\.{next(iter(field))}"):
        Sampling(**field)


def test_a_sampling_is_hashable_and_keeps_its_bias_when_the_callers_changes() -> None:
    bias = {3: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[3] = 2.0
    assert sampling.logit_bias == {3: 1.0}
    assert hash(sampling) == hash(Sampling(logit_bias={3: 1.0}))
    assert replace(sampling, max_tokens=9).logit_bias == {3: 1.0}


def test_least_length_counts_from_the_end_of_the_prompt_wherever_the_fork_is(model: Model) -> None:
    """Within the prompt too; without it, stop tokens are free there."""
    engine = engine_on(model)
    stops = tuple(range(0, VOCABULARY, 2))
    with engine.tree(PROMPT) as tree:
        prompt = tree.root
        [short] = engine.extend(prompt.fork(), Sampling(max_tokens=20, min_tokens=4, stop_tokens=stops))
        assert len(short) >= 4
        [more] = engine.extend(short.fork(), Sampling(max_tokens=20, min_tokens=len(short) + 3, stop_tokens=stops))
        assert len(more) >= 3
        [inner] = engine.extend(prompt.fork(at=20), Sampling(max_tokens=20, min_tokens=2, stop_tokens=stops))
        assert inner.end >= len(PROMPT) + 2
        [free] = engine.extend(prompt.path()[0].fork(), Sampling(max_tokens=20, stop_tokens=stops, seed=1))
        assert free.end < len(PROMPT)
    for node in (short, more, inner, free):
        assert (node.tokens[:-1] % 2).all(), "every even token is a stop"
        assert node.stopped_by == node.tokens[-1]
