"""A branch that pauses and is resumed is, token for token, the branch that never paused."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_idle, check_every_step, expected_tokens, prompt_of, same, tiny_model

from ibtpo.steps import StepSplitter
from ibtpo_engine import Boundary, Budget, Engine, Model, Node, Sampling, Tree
from ibtpo_engine.arrays import Ints

PROMPT = prompt_of(37)
SAMPLING = Sampling(max_tokens=45, stop_tokens=(2,))
PAUSES = {
    "every token": lambda tokens, new: True,
    "at page ends": lambda tokens, new: len(tokens) % 16 == 0,
    "after page ends": lambda tokens, new: len(tokens) % 16 == 1,
    "every fifth of a branch": lambda tokens, new: new == 5,
    "at some tokens": lambda tokens, new: int(tokens[-1]) % 3 == 0,
}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["native", "module"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(dtype=request.param)


def grow_with_pauses(engine: Engine, tree: Tree, n: int, sampling: Sampling) -> tuple[list[list[Node]], int]:
    """Extend `n` forks of the prompt, resuming whatever pauses; the nodes of each branch, and how often it paused."""
    branches = [[node] for node in tree.root.fork(n)]
    engine.extend([branch[0] for branch in branches], sampling)
    pauses = 0
    while paused := [branch for branch in branches if branch[-1].finish is None]:
        pauses += len(paused)
        nodes = [branch[-1].resume() for branch in paused]
        for branch, node in zip(paused, nodes, strict=True):
            branch.append(node)
        engine.extend(nodes, sampling)
    return branches, pauses


def joined(nodes: list[Node], name: str) -> np.ndarray:
    return np.concatenate([getattr(node, name) for node in nodes])


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("max_branches", [1, 64])
def test_paused_and_resumed_is_never_paused(model: Model, pause: str, max_branches: int) -> None:
    whole = Engine(model, kv_tokens=8192)
    expected = whole.extend(whole.tree(PROMPT, key=3).root.fork(4), SAMPLING)
    engine = Engine(model, kv_tokens=8192, max_branches=max_branches, prefill_tokens=16)
    checks = check_every_step(engine)
    with engine.tree(PROMPT, key=3) as tree:
        branches, pauses = grow_with_pauses(engine, tree, 4, replace(SAMPLING, pause=PAUSES[pause]))
        assert pauses >= (4 if pause != "every token" else 40), "or nothing was shown"
        assert len(checks) > 20
        for nodes, node in zip(branches, expected, strict=True):
            assert joined(nodes, "tokens").tolist() == node.tokens.tolist()
            assert nodes[-1].finish == node.finish
            for name in ("logprob", "logprob_raw", "entropy"):
                np.testing.assert_allclose(joined(nodes, name), getattr(node, name), rtol=0, atol=2e-5)
        assert tree.leaves() == [nodes[-1] for nodes in branches], "what paused is no leaf"
    assert_idle(engine)


def test_paused_branches_whose_pages_were_taken_are_resumed_all_the_same(model: Model) -> None:
    """A run in a pool for about one tree: suspended trees compute what they had anew, halves of pages shared again."""

    def whole(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(3)

    def in_pieces(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(3)
        while nodes:
            nodes = yield [node.resume() for node in nodes if node.finish is None]
            if not nodes:
                return

    prompts = [prompt_of(30 + i, seed=i) for i in range(4)]
    expected = dict(Engine(model, kv_tokens=8192).run(whole, prompts, SAMPLING))
    engine = Engine(model, kv_tokens=16 * 22)
    check_every_step(engine)
    trees = dict(engine.run(in_pieces, prompts, replace(SAMPLING, pause=lambda tokens, new: len(tokens) % 5 == 0)))
    paused = 0
    for i, tree in trees.items():
        paths = {tuple(leaf.prefix().tolist()) for leaf in tree.leaves()}
        assert paths == {tuple(leaf.prefix().tolist()) for leaf in expected[i].leaves()}
        paused += len(tree.nodes()) - 4
    assert paused > 30
    assert engine.stats()["preemptions"] > 0
    assert_idle(engine)


def test_a_pause_costs_no_page(model: Model) -> None:
    owned = []
    for pause in (None, PAUSES["every token"]):
        engine = Engine(model, kv_tokens=8192)
        tree = engine.tree(PROMPT, key=3)
        grow_with_pauses(engine, tree, 4, replace(SAMPLING, pause=pause))
        owned.append(engine.cache.owned_by(tree))
    assert owned[0] == owned[1] > 8


def test_a_branch_resumed_with_another_seed_stays_within_the_pages_of_its_tree(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT, budget=Budget(pages=5)) as tree:
        sampling = Sampling(max_tokens=200, pause=lambda tokens, new: new == 5)
        [node] = engine.extend(tree.root.fork(), sampling)
        [node] = engine.extend([node.resume()], replace(sampling, pause=None, seed=1))
        assert (node.finish, node.end) == ("budget", 16 * 4)
        assert engine.cache.owned_by(tree) == 5
        engine.check_integrity()
    assert_idle(engine)


def test_pausing_is_a_split_made_early(model: Model) -> None:
    """Forks at the pause draw what forks of the unpaused branch at the same token draw."""
    engine = Engine(model, kv_tokens=8192)
    late, early = engine.tree(PROMPT, key=1), engine.tree(PROMPT, key=1)
    [whole] = engine.extend(late.root.fork(), SAMPLING)
    assert len(whole) > 12
    [paused] = engine.extend(early.root.fork(), replace(SAMPLING, pause=lambda tokens, new: new == 9))
    assert len(paused) == 9
    tail = paused.resume()
    engine.extend([tail], SAMPLING)
    forks = [engine.extend(node.fork(2, at=at), SAMPLING) for node, at in ((whole, 9), (paused, None))]
    same(*forks)
    deeper = [engine.extend(node.fork(2, at=2), SAMPLING) for node in (whole, tail)]
    same(*deeper)
    for node in forks[1] + deeper[1]:
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    assert [len(node) for node in early.nodes()] == [len(node) for node in late.nodes()] or len(early.nodes()) == 8


def test_the_predicate_sees_the_whole_path_once_a_token_whatever_is_preempted(model: Model) -> None:
    seen: Counter[tuple[int, ...]] = Counter()

    def watch(tokens: Ints, new: int) -> bool:
        assert not tokens.flags.writeable
        assert 30 <= len(tokens) - new < 34, "what is not new is a prompt"
        seen[tuple(tokens.tolist())] += 1
        return False

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes.extend((yield tree.root.fork(3)))

    nodes: list[Node] = []
    engine = Engine(model, kv_tokens=16 * 17)
    prompts = [prompt_of(30 + i, seed=i) for i in range(4)]
    list(engine.run(search, prompts, Sampling(max_tokens=40, stop_tokens=(2,), pause=watch)))
    assert engine.stats()["preemptions"] > 0
    goes_on = [tuple(node.prefix()[:depth]) for node in nodes for depth in range(node.start + 1, node.end)]
    assert len(goes_on) > 60
    assert seen == Counter(goes_on), "each token but the last, whose branch has finished"


def test_branches_of_a_batch_pause_alone(model: Model) -> None:
    """One that may pause and one that may not, side by side."""
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT, key=3)
    first, second = tree.root.fork(2)
    engine._submit([first], replace(SAMPLING, pause=PAUSES["every fifth of a branch"]))
    engine._submit([second], replace(SAMPLING, max_tokens=12))
    while first.in_flight or second.in_flight:
        engine._step()
    assert (first.finish, len(first)) == (None, 5)
    assert (second.finish, len(second)) == ("length", 12)


def test_a_search_gets_paused_branches_and_they_are_not_graded(model: Model) -> None:
    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(2)
        assert [node.finish for node in nodes] == [None, None]
        assert [node.reward for node in nodes] == [None, None]
        yield [nodes[0].resume()]

    engine = Engine(model, kv_tokens=8192)
    sampling = Sampling(max_tokens=6, pause=lambda tokens, new: new == 3)
    [(_, tree)] = engine.run(search, [PROMPT], sampling, reward=lambda tree, node: 1.0)
    assert [leaf.reward for leaf in tree.leaves()] == [1.0]
    assert_idle(engine)


def test_a_predicate_that_fails_leaves_the_engine_usable(model: Model) -> None:
    def fail(tokens: Ints, new: int) -> bool:
        raise ZeroDivisionError

    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT, key=3) as tree:
        with pytest.raises(ZeroDivisionError):
            engine.extend(tree.root.fork(2), replace(SAMPLING, pause=fail))
        assert tree.root.children == []
        [node] = engine.extend(tree.root.fork(), SAMPLING)
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    assert_idle(engine)


@pytest.mark.parametrize("beside", ["nothing", "a failure", "a reward that scores"])
def test_a_predicate_is_asked_for_each_token_whatever_happens_beside_it(model: Model, beside: str) -> None:
    engine, asked = Engine(model, kv_tokens=8192), []

    def pause(tokens: Ints, new: int) -> bool:
        asked.append(new)
        return new == 7

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(1)

    def reward(tree: Tree, node: Node) -> float:
        if beside == "a reward that scores":
            engine.score(tree, [[3, 4]])
        return 0.0

    other, tree = engine.tree(PROMPT[:9]), engine.tree(PROMPT, key=3)
    failing = Sampling(max_tokens=30, pause=lambda tokens, new: new == 7 and beside == "a failure" and 1 // 0 > 0)
    next(engine_stream := engine.stream(other.root.fork(), failing))
    nodes = tree.root.fork()
    next(stream := engine.stream(nodes, Sampling(max_tokens=10, pause=pause)))
    for _ in engine.run(search, [PROMPT[:5], PROMPT[:6]], Sampling(max_tokens=6), reward=reward):
        pass
    list(stream)
    assert asked == [1, 2, 3, 4, 5, 6, 7]
    assert (len(nodes[0]), nodes[0].finish) == (7, None)
    engine_stream.close()


def test_more_tokens_for_a_branch_that_ran_into_its_limit(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    [whole] = engine.extend(engine.tree(PROMPT, key=7).root.fork(), Sampling(max_tokens=30))
    [short] = engine.extend(engine.tree(PROMPT, key=7).root.fork(), Sampling(max_tokens=11))
    [rest] = engine.extend([short.resume()], Sampling(max_tokens=30))
    assert [*short.tokens, *rest.tokens] == whole.tokens.tolist()


def test_a_branch_with_a_seed_of_its_own_is_resumed_as_well(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    [whole] = engine.extend(engine.tree(PROMPT).root.fork(), Sampling(max_tokens=30, seed=7))
    [short] = engine.extend(engine.tree(PROMPT).root.fork(), Sampling(max_tokens=11, seed=7))
    [more] = engine.extend([short.resume()], Sampling(max_tokens=20, seed=7))
    [rest, beside] = engine.extend([more.resume(), *more.fork()], Sampling(max_tokens=30, seed=7))
    assert [*short.tokens, *more.tokens, *rest.tokens] == whole.tokens.tolist()
    assert beside.tokens.tolist() != rest.tokens.tolist()


def test_a_branch_is_resumed_once_whatever_seed_it_goes_on_with(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    [short] = engine.extend(engine.tree(PROMPT).root.fork(), Sampling(max_tokens=5))
    engine.extend([short.resume()], Sampling(max_tokens=12, seed=5))
    with pytest.raises(ValueError, match="continued already"):
        short.resume()


def test_what_cannot_be_resumed_is_refused(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT)
    with pytest.raises(ValueError, match="prompt was not sampled"):
        tree.root.resume()
    [node] = engine.extend(tree.root.fork(), Sampling(max_tokens=9))
    head = node.split(4)
    with pytest.raises(ValueError, match="continued already"):
        head.resume()
    pending = node.resume()
    for bad, why in ((node, "continued already"), (pending, "pending")):
        with pytest.raises(ValueError, match=why):
            bad.resume()
    before = node.tokens.tolist()
    node.drop()
    with pytest.raises(ValueError, match="dropped"):
        node.resume()
    [again] = engine.extend([head.resume()], Sampling(max_tokens=9))
    assert again.tokens.tolist() == before, "what was dropped comes again"


# ---- boundaries ----------------------------------------------------------------------------------------------

PIECES = ["a", "b", "\n", "\n\n", ".\n\n", "\n\nc", "\n\n\n", "<t>", "</t>", "x\ny"]
OPEN, CLOSE = PIECES.index("<t>"), PIECES.index("</t>")


class Pieces:
    """A tokenizer whose text is the pieces' one after the other."""

    def decode(self, token_ids: list[int], **options: object) -> str:
        return "".join(PIECES[token] for token in token_ids)


def boundaries(boundary: Boundary, tokens: list[int]) -> list[int]:
    ids = np.array(tokens, np.int32)
    return [n for n in range(1, len(tokens) + 1) if boundary(ids[:n], n)]


def test_boundaries_are_those_the_steps_are_cut_at() -> None:
    """On token runs of every kind: the last token aside, where no step is cut."""
    generator, count = np.random.default_rng(0), 0
    boundary, splitter = Boundary(Pieces()), StepSplitter(Pieces())
    for _ in range(400):
        tokens = generator.choice(len(PIECES), 12).tolist()
        cuts = splitter(tokens)
        assert [n for n in boundaries(boundary, tokens) if n < len(tokens)] == cuts, [PIECES[t] for t in tokens]
        count += len(cuts)
    assert count > 1000


def test_there_is_no_boundary_inside_a_block() -> None:
    boundary = Boundary(Pieces(), block=(OPEN, CLOSE))
    #        a  \n\n  <t>  .\n\n  </t>  b  .\n\n  <t>  \n\n
    tokens = [0, 3, OPEN, 4, CLOSE, 1, 4, OPEN, 3]
    assert boundaries(boundary, tokens) == [2, 7]
    assert boundaries(Boundary(Pieces()), tokens) == [2, 4, 7, 9]


def test_of_a_long_path_only_the_end_is_looked_at() -> None:
    boundary, path = Boundary(Pieces()), np.zeros(200_000, np.int32)
    boundary(path[:9], 1)
    tracemalloc.start()
    try:
        assert not boundary(path, 1)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_any_of_several_separators_counts_and_empty_ones_are_refused() -> None:
    assert boundaries(Boundary(Pieces(), ("\n\n", "b")), [0, 1, 0, 2, 2]) == [2, 5]
    for separators in ((), ("",), ("a", ""), "\n\n"):  # a string would count as one separator a character
        with pytest.raises(ValueError, match="Boundary.separators"):
            Boundary(Pieces(), separators)


@pytest.mark.parametrize("block", [("<think>", "</think>"), (OPEN,), (OPEN, OPEN)])
def test_a_block_that_no_token_could_open_is_refused(block: Any) -> None:
    with pytest.raises(ValueError, match="Boundary.block: .* must be two different token ids"):
        Boundary(Pieces(), block=block)


def test_an_engine_pauses_at_boundaries(model: Model) -> None:
    class Words:
        def decode(self, token_ids: list[int], **options: object) -> str:
            return "".join("\n\n" if token % 4 == 0 else f"w{token}" for token in token_ids)

    boundary = Boundary(Words())
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT, key=2) as tree:
        branches, pauses = grow_with_pauses(engine, tree, 3, replace(SAMPLING, pause=boundary))
    assert pauses > 5
    for nodes in branches:
        for node in nodes[:-1]:
            assert node.tokens[-1] % 4 == 0
