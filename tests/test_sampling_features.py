"""Bias, masks, least lengths, stop strings and seeds of branches, together in one batch and in any company."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_helpers import VOCABULARY, assert_idle, prompt_of, same, tiny_model
from shaped_sampling import BIAS, KINDS, PROMPT, check, engine_on, grow_all

from ibtpo_engine import Engine, Node, Parity, Sampling, Tree, native
from ibtpo_kernels import DecodeRun, has_compiled


def test_every_kind_in_one_batch_is_what_full_logits_say(how: str) -> None:
    """On both paths, forks included; and every feature made a difference somewhere."""
    engine = engine_on(how)
    found = grow_all(engine, list(KINDS.values()))
    assert len(found) > 5 * len(KINDS) - 5
    for node, sampling in found:
        check(node, sampling)
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
def test_native_and_module_path_sample_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [node for node, _ in grow_all(engine_on(), list(KINDS.values()))]
    monkeypatch.setattr(native, "MOST_BYTES", 0)
    theirs = [node for node, _ in grow_all(engine_on("module"), list(KINDS.values()))]
    same(ours, theirs, atol=1e-4)
    assert [node.stopped_by for node in ours] == [node.stopped_by for node in theirs]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_alone_is_the_same_as_in_the_batch(name: str) -> None:
    everything = grow_all(engine_on(), list(KINDS.values()))
    index = list(KINDS).index(name)
    engine = engine_on()
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


@pytest.mark.parametrize("kv_tokens", [16 * 24, 16 * 31])
def test_preemption_changes_nothing(how: str, kv_tokens: int) -> None:
    """Features stay with a branch that loses its pages: no token is handed to a grammar or a text twice."""

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(3)
        longest = max(nodes, key=len)
        yield [*longest.fork(2, at=len(longest) // 2)]

    for name in ("all", "grammar", "stop", "least"):
        sampling, grown, preemptions = KINDS[name], [], []
        for size in (16 * 400, kv_tokens):
            engine = engine_on(how, kv_tokens=size)
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
                    check(node, sampling)


def test_plain_branches_stay_native_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step runs exactly the branches without shaped logits in the native call; stop strings do not end that."""
    if not has_compiled():
        pytest.skip("needs the compiled kernels")
    engine = engine_on()
    ran: list[list[int]] = []
    decode = engine.scheduler.runner.decode

    def watched(slots: Any, chosen: npt.NDArray[np.int64], *most: int, **more: Any) -> DecodeRun:
        ran.append(sorted(id(engine.scheduler.running[slot].node) for slot in chosen.tolist()))
        return decode(slots, chosen, *most, **more)

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


def test_a_step_without_features_asks_for_none(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a branch needed does not stay behind for the next in its slot."""
    engine = engine_on(how, max_branches=3)
    with engine.tree(PROMPT) as tree:
        engine.extend(tree.root.fork(5), KINDS["all"])
        assert not engine.scheduler.slots.features
        monkeypatch.setattr(type(engine.scheduler.slots.features), "follow", None)
        monkeypatch.setattr(type(engine.scheduler.slots.features), "split", None)
        for node in engine.extend(tree.root.fork(5), KINDS["plain"]):
            check(node, KINDS["plain"])
    assert_idle(engine)


def seeded_tokens(*, seed: int | None, key: int, engine_seed: int) -> list[tuple[int, ...]]:
    engine = engine_on(seed=engine_seed)
    sampling = Sampling(max_tokens=12, seed=seed)
    with engine.tree(PROMPT, key=key) as tree:
        first, *rest = engine.extend(tree.root.fork(4), sampling)
        whole = tuple(first.tokens.tolist())
        below = engine.extend([*first.fork(2, at=5), *rest[0].fork(2, at=5)], sampling)
        return [whole, *(tuple(node.prefix().tolist()) for node in [*rest, *below])]


def test_a_seed_names_the_random_numbers_whatever_the_trees_key_and_the_engines_seed() -> None:
    ours = seeded_tokens(seed=5, key=0, engine_seed=0)
    assert len(set(ours)) == len(ours), "siblings and branches below different leaves differ"
    assert seeded_tokens(seed=5, key=3, engine_seed=8) == ours
    assert not set(seeded_tokens(seed=6, key=0, engine_seed=0)) & set(ours)
    plain = seeded_tokens(seed=None, key=5, engine_seed=0)
    assert not set(plain) & set(ours)
    assert seeded_tokens(seed=None, key=5, engine_seed=0) == plain


def test_branches_at_the_same_depth_below_different_leaves_have_streams_of_their_own() -> None:
    engine = engine_on()
    with engine.tree(PROMPT) as tree:
        sampling = Sampling(max_tokens=8, seed=2)
        leaves = engine.extend(tree.root.fork(3), sampling)
        forks = [node for leaf in leaves for node in leaf.fork(2, at=4)]
        engine.extend(forks, sampling)
    streams = {node.stream for node in [*leaves, *forks]}
    assert len(streams) == 9


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1 << 31},
        {"top_k": 2.5},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"max_tokens": 5.5},
        {"stop_tokens": 2},
        {"stop_tokens": (None,)},
        {"stop_tokens": ("</s>",)},
        {"stop_tokens": (1 << 64,)},
        {"min_tokens": -1},
        {"min_tokens": 257},
        {"stop": "text"},
        {"stop": ("a", "")},
        {"stop": (3,)},
        {"stop_block": (3, 3)},
        {"stop_block": (3,)},
        {"stop_block": ("<think>", "</think>")},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"allowed": [1, 2]},
    ],
)
def test_fields_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Sampling\.{next(iter(field))}"):
        Sampling(**field)


def test_stop_tokens_may_be_any_collection_of_ids() -> None:
    for stops in ([2, 5], np.array([2, 5]), {2: "a", 5: "b"}.keys()):
        sampling = Sampling(stop_tokens=stops)
        assert sampling == Sampling(stop_tokens=(2, 5))
        assert hash(sampling) == hash(Sampling(stop_tokens=(2, 5)))


def test_a_sampling_is_hashable_and_keeps_its_bias_when_the_callers_changes() -> None:
    bias = {3: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[3] = 2.0
    assert sampling.logit_bias == {3: 1.0}
    assert hash(sampling) == hash(Sampling(logit_bias={3: 1.0}))
    assert replace(sampling, max_tokens=9).logit_bias == {3: 1.0}


def test_least_length_counts_from_the_end_of_the_prompt_wherever_the_fork_is() -> None:
    """Within the prompt too; without it, stop tokens are free there."""
    engine = engine_on()
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


@pytest.mark.parametrize("parity", ["fast", "bitwise"] if has_compiled() else ["fast"])
def test_in_bf16_a_bias_is_added_in_float32(parity: Parity) -> None:
    """One that bfloat16 would round away changes the log-prob; rows without one are sampled from bfloat16."""
    model = tiny_model(dtype=torch.bfloat16)
    engine = Engine(model, kv_tokens=512, parity=parity)
    bias = 2.0**-12
    with engine.tree(prompt_of(12)) as tree:
        plain, biased = tree.root.fork(2)
        every = dict.fromkeys(range(0, VOCABULARY, 2), bias)
        engine.extend([plain], Sampling(max_tokens=1))
        engine.extend([biased], Sampling(max_tokens=1, logit_bias=every))
        assert plain.logprob[0] == plain.logprob_raw[0]
        logits = engine.scheduler.runner.logits(tree.root.kv.hidden[None])[0]
        assert logits.dtype is torch.bfloat16
        for node, shift in ((plain, 0.0), (biased, bias)):
            shaped = logits.double()
            shaped[::2] += shift
            wanted = float(shaped.log_softmax(0)[node.tokens[0]])
            assert abs(node.logprob[0] - wanted) < 1e-6, (node, shift)
        assert abs(biased.logprob[0] - biased.logprob_raw[0]) > bias / 8
