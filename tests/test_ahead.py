"""Searches that go on before all their branches have ended (`Ahead`), on an engine and on a backend."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from engine_helpers import assert_idle, prompt_of, tiny_model

from ibtpo_engine import (
    Ahead,
    BackendEngine,
    Budget,
    BudgetSpent,
    Engine,
    EngineBackend,
    Node,
    NoTokenAllowed,
    Sampling,
    Tree,
)

MODEL = tiny_model()
SAMPLING = Sampling(max_tokens=24, stop_tokens=(2,))
PROMPTS = [prompt_of(7 + 3 * i, seed=i) for i in range(6)]
BRANCHES, WINDOW = 8, 3


def windowed(tree: Tree) -> Iterator[Ahead]:
    """Eight branches, three at a time; each begins at the prompt or after the first token of the longest one known."""
    extend = tree.root.fork(WINDOW)
    waiting, known = list(extend), []
    while waiting:
        [ended] = yield Ahead(extend, waiting[:1])
        assert ended is waiting.pop(0)
        assert ended.finish is not None and ended.reward == float(len(ended))
        known.append((len(ended), ended.tokens.tolist(), ended))
        extend = []
        if len(known) + len(waiting) < BRANCHES:
            size, _, longest = max(known, key=lambda item: item[0])
            extend = longest.fork(1, at=1) if len(known) % 2 and size > 1 and len(longest) > 1 else tree.root.fork(1)
            waiting += extend
    tree.notes["order"] = [tokens for _, tokens, _ in known]


def length(tree: Tree, leaf: Node) -> float:
    return float(len(leaf))


def orders(engine: Engine | BackendEngine, count: int, reward=length, first: int = 0) -> list[list[list[int]]]:
    keys = range(first, count)
    trees = dict(engine.run(windowed, PROMPTS[first:count], SAMPLING, reward=reward, keys=keys))
    return [trees[i].notes["order"] for i in range(count - first)]


def test_what_a_search_is_told_depends_on_its_tree_alone() -> None:
    """Alone, beside others, in a pool too small for all, with rewards late and in any order: the same trees."""
    engine = Engine(MODEL, kv_tokens=8192)
    together = orders(engine, 6)
    assert all(len(order) == BRANCHES for order in together)
    assert_idle(engine)
    for i in range(6):
        assert orders(Engine(MODEL, kv_tokens=8192), i + 1, first=i) == together[i : i + 1]
    small = Engine(MODEL, kv_tokens=192)
    assert orders(small, 6) == together
    assert small.stats()["preemptions"] + small.stats()["evicted_pages"] > 0
    assert_idle(small)
    with ThreadPoolExecutor(4) as pool:
        rng = np.random.default_rng(0)

        def late(tree: Tree, leaf: Node) -> Future[float]:
            pause = float(rng.random()) * 0.003
            return pool.submit(lambda: __import__("time").sleep(pause) or float(len(leaf)))

        assert orders(Engine(MODEL, kv_tokens=8192), 6, reward=late) == together


def test_a_window_is_what_is_under_way() -> None:
    """While the first of three is waited for the others go on; with a window of one it is the plain protocol."""
    engine, seen = Engine(MODEL, kv_tokens=4096), []

    def search(tree: Tree) -> Iterator[Ahead | list[Node]]:
        short, long = tree.root.fork(2)
        yield Ahead([short], [short])
        yield Ahead([long], [])  # nothing to wait for: goes on at once
        seen.append(long.in_flight)
        found = yield [*tree.root.fork(1)]
        seen.append(len(found))
        assert (yield Ahead([], [long])) == [long]
        assert (yield Ahead([], [long])) == [long]  # it is known already
        assert not long.in_flight

    list(engine.run(search, [PROMPTS[0]], Sampling(max_tokens=24)))
    assert seen == [True, 1]
    assert_idle(engine)


def test_a_search_that_ends_early_leaves_nothing_under_way() -> None:
    engine = Engine(MODEL, kv_tokens=4096)

    def search(tree: Tree) -> Iterator[Ahead]:
        nodes = tree.root.fork(3)
        yield Ahead(nodes, nodes[:1])

    [(_, tree)] = engine.run(search, [PROMPTS[0]], SAMPLING)
    assert tree.closed
    assert_idle(engine)


def test_waiting_for_what_was_never_asked_for_is_refused() -> None:
    engine = Engine(MODEL, kv_tokens=4096)

    def search(tree: Tree) -> Iterator[Ahead]:
        first, second = tree.root.fork(2)
        yield Ahead([first], [second])

    with pytest.raises(ValueError, match="not yielded it to be extended"):
        list(engine.run(search, [PROMPTS[0]], SAMPLING))
    assert_idle(engine)


@pytest.mark.parametrize("kind", ["engine", "backend"])
def test_a_search_goes_on_once_the_future_it_asked_for_is_done(kind: str) -> None:
    """The last of six trees to come opens the gate for all, though no more than one branch, or call, is under way."""
    one = Engine(MODEL, kv_tokens=8192, max_branches=1)
    engine = one if kind == "engine" else BackendEngine(EngineBackend(one), max_calls=1)
    gate: Future[int] = Future()
    came: list[int] = []

    def search(tree: Tree) -> Iterator[list[Node] | Future[int]]:
        yield tree.root.fork(2)
        came.append(tree.key)
        if len(came) == len(PROMPTS):
            gate.set_result(7)
        assert (yield gate) == []
        tree.notes["seen"] = (gate.result(), len(came))
        [again] = yield tree.root.fork(1)
        assert again.reward == len(again)

    trees = dict(engine.run(search, PROMPTS, SAMPLING, reward=length, keys=range(6)))
    assert [trees[i].notes["seen"] for i in range(6)] == [(7, 6)] * 6
    assert [len(trees[i].leaves()) for i in range(6)] == [3] * 6
    assert_idle(one)


@pytest.mark.parametrize("drops", [False, True])
def test_a_branch_may_be_waited_for_twice(drops: bool) -> None:
    """As by a search that waits for the best one of each group, where groups overlap."""

    def search(tree: Tree) -> Iterator[Ahead]:
        first, second = tree.root.fork(2)
        tree.notes["received"] = yield Ahead([first, second], [first, second, first])

    def reward(tree: Tree, leaf: Node) -> None:
        if drops:
            engine.abort([node for node in tree.root.children if node.in_flight])

    engine = Engine(MODEL, kv_tokens=8192, max_branches=1)
    [(_, tree)] = engine.run(search, PROMPTS[:1], SAMPLING, reward=reward)
    first = tree.root.children[0]
    assert tree.notes["received"] == ([first, first] if drops else [first, tree.root.children[1], first])
    assert_idle(engine)


def test_a_backend_grows_the_same_kind_of_search() -> None:
    engine = BackendEngine(EngineBackend(Engine(MODEL, kv_tokens=8192)))
    assert all(len(order) == BRANCHES for order in orders(engine, 6))


def test_a_budget_is_shared_out_by_what_the_search_was_told() -> None:
    """Branches ahead count with all they may still take until the search hears of them, however early they ended."""

    def search(tree: Tree) -> Iterator[Ahead]:
        nodes = tree.root.fork(3)
        yield Ahead(nodes, nodes[:1])
        more = tree.root.fork(2)
        yield Ahead(more, more[:1])
        yield Ahead([], [*nodes, *more])
        last = tree.root.fork(2)
        yield Ahead(last, last)
        tree.notes["lengths"] = [len(node) for node in [*nodes, *more, *last]]

    def lengths(max_branches: int, first: int, budget: Budget) -> list[list[int]]:
        engine = Engine(MODEL, kv_tokens=8192, max_branches=max_branches)
        sampling = Sampling(max_tokens=24, stop_tokens=(2, 5, 9))
        trees = dict(engine.run(search, PROMPTS[first:], sampling, keys=range(first, 6), budget=budget))
        assert_idle(engine)
        return [trees[i].notes["lengths"] for i in range(6 - first)]

    for budget in (Budget(tokens=80), Budget(pages=14)):
        wide = lengths(64, 0, budget)
        assert any(sum(per_tree) > 30 for per_tree in wide)
        assert lengths(1, 0, budget) == wide
        assert lengths(2, 0, budget) == wide
        assert lengths(64, 3, budget) == wide[3:]


@pytest.mark.parametrize("ends_by", ["budget", "no token", "itself"])
def test_what_a_search_leaves_behind_depends_on_its_tree_alone(ends_by: str) -> None:
    """Branches ahead that ended, or failed, before the search waited for them: gone or kept in every batch alike."""

    def allowed(prefix: np.ndarray) -> list[int]:
        return [] if ends_by == "no token" and len(prefix) > 20 and prefix[-1] % 3 == 0 else list(range(2, 40))

    def search(tree: Tree) -> Iterator[Ahead]:
        nodes = tree.root.fork(4)
        yield Ahead(nodes, nodes[:1])
        more = tree.root.fork(2)
        yield Ahead(more, more[1:])
        if ends_by == "budget":
            tree.root.fork(1)

    def leaves(max_branches: int, first: int) -> list[tuple[object, ...]]:
        engine = Engine(MODEL, kv_tokens=8192, max_branches=max_branches)
        sampling = Sampling(max_tokens=24, stop_tokens=(2, 5, 9), allowed=allowed)
        trees = dict(engine.run(search, PROMPTS[first:], sampling, keys=range(first, 6), budget=Budget(nodes=6)))
        assert_idle(engine)
        found = [trees[i] for i in range(6 - first)]
        return [(type(tree.ended_by), [leaf.tokens.tolist() for leaf in tree.leaves()]) for tree in found]

    together = leaves(64, 0)
    assert {error for error, _ in together} >= {
        {"budget": BudgetSpent, "no token": NoTokenAllowed, "itself": type(None)}[ends_by]
    }
    assert any(leaves for _, leaves in together)
    for max_branches in (1, 2, 3):
        assert leaves(max_branches, 0) == together
    assert leaves(64, 3) == together[3:]
