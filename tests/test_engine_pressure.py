"""Small pools, runs that are given up, rewards that come late: nothing is lost, nothing is wrong, nothing hangs."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from engine_helpers import assert_idle, expected_tokens, prompt_of, same, tiny_model, work

from ibtpo_engine import Engine, Model, Node, OutOfPages, Sampling, Tree
from ibtpo_engine.cache import PageCache
from ibtpo_engine.growing import Searches

SAMPLING = Sampling(max_tokens=40, stop_tokens=(2,))
PROMPTS = [prompt_of(24 + i % 9, seed=i) for i in range(8)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A run that waits for something that cannot come must fail, not stall the suite."""

    def give_up(*_: object) -> None:
        raise TimeoutError("an engine call hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)


def two_rounds(tree: Tree) -> Iterator[list[Node]]:
    """Three branches, then two forks in the middle of the longest."""
    nodes = yield tree.root.fork(3)
    longest = max(nodes, key=len)
    yield longest.fork(2, at=len(longest) // 2)


def in_order(trees: Iterator[tuple[int, Tree]]) -> list[Node]:
    found = dict(trees)
    return [node for index in sorted(found) for node in found[index].nodes()]


@pytest.fixture(scope="module")
def roomy(model: Model) -> list[Node]:
    """The trees of `PROMPTS` in a pool with room for all."""
    engine = Engine(model, kv_tokens=16 * 600)
    nodes = in_order(engine.run(two_rounds, PROMPTS, SAMPLING))
    stats = engine.stats()
    assert (stats["preemptions"], stats["evicted_pages"], stats["reused"]) == (0, 0, 0)
    assert len(nodes) >= 8 * 6
    return nodes


# ---- pins and pressure ---------------------------------------------------------------------------------------


def test_many_trees_in_a_pool_for_about_one_are_the_same_trees(model: Model, roomy: list[Node]) -> None:
    engine = Engine(model, kv_tokens=16 * 22)
    same(in_order(engine.run(two_rounds, PROMPTS, SAMPLING)), roomy)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["evicted_pages"] > 0
    assert stats["computed"] > sum(len(node) for node in roomy), "some were computed twice"
    assert_idle(engine)


@pytest.mark.parametrize("max_branches", [1, 3])
def test_few_slots_and_few_pages_together_make_progress(model: Model, roomy: list[Node], max_branches: int) -> None:
    engine = Engine(model, kv_tokens=16 * 22, max_branches=max_branches, prefill_tokens=16)
    same(in_order(engine.run(two_rounds, PROMPTS, SAMPLING)), roomy)
    assert_idle(engine)


def test_a_long_prompt_gets_its_pages_although_many_short_ones_came_later(model: Model) -> None:
    """What is freed for the oldest must not be taken by the younger, or the run would never end."""
    prompts = [*PROMPTS[:2], prompt_of(170, seed=20), *PROMPTS[2:]]
    engine = Engine(model, kv_tokens=16 * 24)
    trees = dict(engine.run(two_rounds, prompts, replace(SAMPLING, max_tokens=20)))
    assert len(trees) == 9
    for node in trees[2].nodes()[1:]:
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    assert engine.stats()["evicted_pages"] > 0
    assert_idle(engine)


def test_no_tree_is_walked_to_find_one_that_holds_pages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Tree] = []
    forgotten: list[Tree] = []
    owned_by, forget = PageCache.owned_by, PageCache.forget
    monkeypatch.setattr(PageCache, "owned_by", lambda cache, tree: walked.append(tree) or owned_by(cache, tree))
    monkeypatch.setattr(PageCache, "forget", lambda cache, tree: forgotten.append(tree) or forget(cache, tree))
    engine = Engine(model, kv_tokens=16 * 22)
    assert len(list(engine.run(two_rounds, PROMPTS, SAMPLING))) == 8
    assert len(forgotten) > 8, "some trees gave their pages up before they were closed"
    assert not walked


def out_of_pages(call: Callable[[], object]) -> tuple[int, ...]:
    """(needed, free, size of the pool, pinned, number of trees) as the error says."""
    with pytest.raises(OutOfPages) as error:
        call()
    found = re.fullmatch(
        r"(\d+) pages needed, (\d+) free of (\d+), (\d+) pinned by (\d+) trees; "
        r"close a tree or raise kv_tokens \(now \d+\)",
        str(error.value),
    )
    assert found is not None, str(error.value)
    return tuple(int(number) for number in found.groups())


def test_a_pool_full_of_open_trees_says_who_holds_what_and_goes_on_when_one_is_closed(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 10)
    pinned = []
    for i in range(4):
        tree = engine.tree(prompt_of(20, seed=i))
        [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=3))
        pinned.append((tree, leaf))
        assert engine.cache.owned_by(tree) == 3 or i == 3
        if i == 2:
            break
    new = engine.tree(prompt_of(40, seed=9))
    assert out_of_pages(lambda: engine.extend(new.root.fork(2), SAMPLING)) == (3, 1, 10, 9, 3)
    assert new.nodes() == [new.root]
    assert new.root.children == [], "the branches are off the tree again"
    engine.check_integrity()
    for tree, leaf in pinned:
        assert leaf.kv is not None, "what an open tree owns is not evicted"
        assert tree.leaves() == [leaf]
    pinned[0][0].close()
    pinned[1][0].close()
    [node] = engine.extend(new.root.fork(), Sampling(max_tokens=20))
    assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    for tree, _ in [*pinned, (new, None)]:
        tree.close()
    assert_idle(engine)


def test_a_branch_that_outgrows_the_pool_is_an_error_and_not_cut_short(model: Model) -> None:
    """Prompt and pool are whole pages, so the path could be filled to the pool's last token."""
    engine = Engine(model, kv_tokens=64)
    with engine.tree(prompt_of(32)) as tree:
        needed, free, size, pinned, trees = out_of_pages(
            lambda: engine.extend(tree.root.fork(), Sampling(max_tokens=200))
        )
        assert (size, trees) == (4, 1)
        assert needed > free
        assert free + pinned == 4
        [node] = engine.extend(tree.root.fork(), Sampling(max_tokens=32))
        assert len(node) == 32
    assert_idle(engine)


def test_branches_that_finished_before_the_pool_was_full_are_kept(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 8)
    with engine.tree(prompt_of(20)) as tree:
        pending = tree.root.fork(12)
        out_of_pages(lambda: engine.extend(pending, SAMPLING))
        done = [node for node in pending if not node.is_pending]
        assert tree.root.children == done
        assert all(node.finish == "stop" for node in done)
        assert all(node.dropped for node in pending if node.is_pending)
        with pytest.raises(ValueError, match="fork again"):
            engine.extend([node for node in pending if node.is_pending], SAMPLING)
        engine.check_integrity()
    assert_idle(engine)


def test_trees_pinned_by_the_caller_are_never_suspended_by_a_run(model: Model) -> None:
    """A run gives up its own trees' pages first, and fails if those are not enough."""
    engine = Engine(model, kv_tokens=16 * 24)
    tree = engine.tree(prompt_of(100))
    [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=20))
    kv = leaf.kv
    list(engine.run(two_rounds, PROMPTS[:3], replace(SAMPLING, max_tokens=20)))
    assert engine.stats()["evicted_pages"] > 0
    assert leaf.kv is kv
    assert kv.pages
    blocker = engine.tree(prompt_of(160, seed=3))
    engine.extend(blocker.root.fork(), Sampling(max_tokens=1))
    assert out_of_pages(lambda: list(engine.run(two_rounds, PROMPTS[:2], SAMPLING)))[4] >= 2
    tree.close()
    blocker.close()
    assert_idle(engine)


def test_closing_a_tree_while_its_branches_are_under_way_frees_everything(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 60, prefill_tokens=16)
    for steps in range(12):
        tree, other = engine.tree(prompt_of(50, seed=1)), engine.tree(prompt_of(20, seed=2), key=4)
        engine._submit([*tree.root.fork(3), *other.root.fork(2)], SAMPLING)
        for _ in range(steps):
            engine._step()
        tree.close()
        engine.check_integrity()
        assert not any(node.is_pending for node in tree.root.children)
        while any(node.in_flight for node in other.root.children):
            engine._step()
        for node in other.leaves():
            assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
        other.close()
        assert_idle(engine)


@pytest.mark.parametrize("at_step", range(8))
def test_an_interrupt_at_any_step_leaves_the_engine_usable(model: Model, at_step: int) -> None:
    """Ctrl-C between two steps; the prompt may be half filled, and may be cut just there."""
    engine = Engine(model, kv_tokens=16 * 60, prefill_tokens=16)
    tree = engine.tree(prompt_of(60), key=1)
    step, count = engine.scheduler.step, 0

    def interrupted(version: int, most: int) -> list[Node] | None:
        nonlocal count
        count += 1
        if count > at_step:
            raise KeyboardInterrupt
        return step(version)

    engine.scheduler.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.extend(tree.root.fork(3), SAMPLING)
    engine.scheduler.step = step
    assert tree.root.children == []
    engine.check_integrity()
    prompt = tree.root
    nodes = engine.extend([*prompt.fork(2, at=50), *prompt.fork(1)], SAMPLING)
    for node in nodes:
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    tree.close()
    assert_idle(engine)


# ---- runs that are given up ----------------------------------------------------------------------------------


class Stop(Exception):
    """What goes wrong in the tests below."""


def _search_fails(when: int) -> Callable[[Tree], Iterator[list[Node]]]:
    def search(tree: Tree) -> Iterator[list[Node]]:
        for i in range(3):
            if tree.ordinal == 2 and i == when:
                raise Stop
            yield tree.root.fork(2)

    return search


def _yields(make: Callable[[Tree], list[Node]]) -> Callable[[Tree], Iterator[list[Node]]]:
    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(2)
        yield make(tree)

    return search


def _fails_in_thread(tree: Tree, node: Node) -> Future[float]:
    future: Future[float] = Future()
    if tree.ordinal == 2:
        threading.Timer(0.01, future.set_exception, [Stop()]).start()
    else:
        future.set_result(0.0)
    return future


def _fails_at_once(tree: Tree, node: Node) -> float:
    if tree.ordinal == 2:
        raise Stop
    return 0.0


def _cancelled(tree: Tree, node: Node) -> Future[float]:
    future: Future[float] = Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


def _bad_prompts() -> Iterator[list[int]]:
    yield from PROMPTS[:2]
    raise Stop


FAILURES: dict[str, tuple[type[Exception], dict[str, object]]] = {
    "search fails at once": (Stop, {"search": _search_fails(0)}),
    "search fails under way": (Stop, {"search": _search_fails(1)}),
    "reward fails": (Stop, {"reward": _fails_at_once}),
    "reward fails in a thread": (Stop, {"reward": _fails_in_thread}),
    "reward is cancelled": (CancelledError, {"reward": _cancelled}),
    "prompts fail": (Stop, {"prompts": _bad_prompts()}),
    "a prompt is empty": (ValueError, {"prompts": [*PROMPTS[:2], []]}),
    "keys run out": (ValueError, {"keys": [1, 2]}),
    "search yields a finished node": (ValueError, {"search": _yields(lambda tree: tree.leaves())}),
    "search yields a node twice": (ValueError, {"search": _yields(lambda tree: tree.root.fork() * 2)}),
    "search yields no list": (TypeError, {"search": _yields(lambda tree: tree.root.fork()[0])}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_run_gives_everything_back(model: Model, failure: str) -> None:
    error, changes = FAILURES[failure]
    arguments = {"search": two_rounds, "prompts": PROMPTS[:5], "sampling": SAMPLING} | changes
    engine = Engine(model, kv_tokens=16 * 100)
    with pytest.raises(error):
        list(engine.run(**arguments))
    assert_idle(engine)
    assert engine._searches == []
    [(_, tree)] = engine.run(two_rounds, [PROMPTS[0]], SAMPLING, keys=[0])
    for node in tree.nodes()[1:]:
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_left_gives_everything_back(model: Model, after: int) -> None:
    """By `break`, or because the iterator is dropped before its first tree."""
    engine = Engine(model, kv_tokens=16 * 100, max_branches=6)
    closed = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        try:
            yield from two_rounds(tree)
        finally:
            closed.append(tree.ordinal)

    run = engine.run(search, PROMPTS, SAMPLING)
    for _ in range(after):
        next(run)
    run.close()
    assert_idle(engine)
    assert sorted(closed) == list(range(engine._opened)), "every search was told"


def test_a_search_that_will_not_end_cannot_keep_pages(model: Model) -> None:
    def stubborn(tree: Tree) -> Iterator[list[Node]]:
        for _ in range(9):
            try:
                yield tree.root.fork()
            except GeneratorExit:
                yield tree.root.fork()

    engine = Engine(model, kv_tokens=16 * 100)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        list(engine.run(stubborn, PROMPTS[:4], SAMPLING, reward=_fails_at_once))
    assert_idle(engine)


# ---- runs within runs ----------------------------------------------------------------------------------------


def test_the_caller_may_extend_and_run_while_a_run_is_under_way(model: Model, roomy: list[Node]) -> None:
    """Between two trees of a run; what the inner calls finish for the outer run is not lost."""
    engine = Engine(model, kv_tokens=16 * 600, max_branches=2)
    own = engine.tree(prompt_of(30, seed=50), key=100)
    trees, inner, full = {}, [], 0
    for index, tree in engine.run(two_rounds, PROMPTS, SAMPLING, keys=range(8)):
        trees[index] = tree
        full += engine.scheduler.num_branches >= 2
        inner += engine.run(two_rounds, [PROMPTS[index]], SAMPLING, keys=[index])
        [node] = engine.extend(own.root.fork(), SAMPLING)
        assert node.tokens.tolist() == expected_tokens(model, node, SAMPLING).tolist()
    same([node for i in range(8) for node in trees[i].nodes()], roomy)
    assert len(inner) == 8
    assert full > 1, "the outer run's branches filled the batch when the inner one began"
    own.close()
    assert_idle(engine)


def test_a_search_and_a_reward_may_extend_nodes_themselves(model: Model) -> None:
    """A search may try a continuation greedily before it decides; a reward may sample a probe."""
    engine = Engine(model, kv_tokens=16 * 600, max_branches=8)
    probes = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        first, _ = yield tree.root.fork(2)
        [greedy] = engine.extend(first.fork(at=1), replace(SAMPLING, temperature=0))
        yield greedy.fork(at=1)

    def reward(tree: Tree, leaf: Node) -> float:
        assert not torch.is_inference_mode_enabled(), "a reward may train"
        with engine.tree(leaf.prefix(), key=9) as probe:
            probes.extend(engine.extend(probe.root.fork(), Sampling(max_tokens=4)))
        return float(len(probes))

    trees = [tree for _, tree in engine.run(search, PROMPTS[:5], SAMPLING, reward=reward)]
    assert len(trees) == 5
    assert len(probes) >= 15
    for tree in trees:
        graded = [leaf for leaf in tree.leaves() if leaf.reward is not None]
        assert len(graded) >= 3
        for node in tree.nodes()[1:]:
            sampling = SAMPLING if node.logprob.any() else replace(SAMPLING, temperature=0)
            assert node.tokens.tolist() == expected_tokens(model, node, sampling).tolist()
    assert_idle(engine)


def test_a_search_may_only_yield_nodes_of_its_own_tree(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 100)
    other = engine.tree(PROMPTS[0])
    with pytest.raises(ValueError, match="own tree only"):
        list(engine.run(_yields(lambda tree: other.root.fork()), PROMPTS[:1], SAMPLING))
    other.close()
    assert_idle(engine)


# ---- rewards -------------------------------------------------------------------------------------------------


def test_rewards_from_threads_arrive_before_the_search_goes_on(model: Model, roomy: list[Node]) -> None:
    seen = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(3)
        seen.append([node.reward for node in nodes])
        longest = max(nodes, key=len)
        nodes = yield longest.fork(2, at=len(longest) // 2)
        seen.append([node.reward for node in nodes])

    with ThreadPoolExecutor(3) as pool:

        def reward(tree: Tree, leaf: Node) -> Future[float]:
            return pool.submit(lambda: threading.Event().wait(0.002) or float(leaf.end))

        engine = Engine(model, kv_tokens=16 * 600, max_branches=8)
        trees = dict(engine.run(search, PROMPTS, SAMPLING, reward=reward))
    assert len(seen) == 16
    assert all(isinstance(value, float) for values in seen for value in values)
    for tree in trees.values():
        assert [leaf.reward for leaf in tree.leaves()] == [leaf.end for leaf in tree.leaves()]
    same([node for i in range(8) for node in trees[i].nodes()], roomy)
    assert engine.seconds_waiting > 0
    assert_idle(engine)


def test_a_tree_that_waits_for_its_reward_does_not_hold_up_the_others(model: Model) -> None:
    """The first tree's rewards are known only when all the others are done: in any other order this would hang."""
    engine = Engine(model, kv_tokens=16 * 600, max_branches=6)
    late: list[Future[float]] = []

    def reward(tree: Tree, leaf: Node) -> float | Future[float]:
        if tree.ordinal:
            return 0.0
        late.append(Future())
        return late[-1]

    order = []
    for index, _ in engine.run(two_rounds, PROMPTS[:5], SAMPLING, reward=reward):
        order.append(index)
        if len(order) == 4:
            grader = threading.Thread(target=_grade_late, args=(late,))
            grader.start()
    grader.join()
    assert sorted(order[:4]) == [1, 2, 3, 4]
    assert order[4] == 0
    assert engine.seconds_waiting > 0
    assert_idle(engine)


def _grade_late(late: list[Future[float]]) -> None:
    """Resolve the five rewards of two rounds as they come to be asked for."""
    for i in range(5):
        while len(late) <= i:
            time.sleep(0.001)
        time.sleep(0.002)
        late[i].set_result(1.0)


def test_a_reward_that_comes_costs_the_same_however_many_are_awaited(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All branches end before the first reward comes; then they come one by one."""
    wait = Searches.wait

    def spent(num_trees: int) -> float:
        engine, late = Engine(model, kv_tokens=16 * 600, max_branches=32), list[Future[float]]()

        def reward(tree: Tree, leaf: Node) -> Future[float]:
            late.append(Future())
            return late[-1]

        def grade_one(searches: Searches) -> None:
            late.pop(0).set_result(1.0)
            wait(searches)

        def search(tree: Tree) -> Iterator[list[Node]]:
            yield tree.root.fork(4)

        monkeypatch.setattr(Searches, "wait", grade_one)
        prompts = [prompt_of(20, seed=i) for i in range(num_trees)]
        trees: list[Tree] = []
        run = engine.run(search, prompts, Sampling(max_tokens=2), reward=reward)
        count = work(lambda: trees.extend(tree for _, tree in run))
        assert [leaf.reward for tree in trees for leaf in tree.leaves()] == [1.0] * 4 * num_trees
        return count / num_trees

    few, many = spent(16), spent(64)
    assert many < 1.2 * few


def test_trees_interleave_in_one_stream(model: Model) -> None:
    """Branches of several trees are decoded in the same step, and short trees come out before long ones."""
    engine = Engine(model, kv_tokens=16 * 600)
    widths, step = [], engine.scheduler.step

    def watched(version: int, most: int = 1) -> list[Node] | None:
        finished = step(version)
        widths.append(len({branch.node.tree.ordinal for branch in engine.scheduler.running.values()}))
        return finished

    engine.scheduler.step = watched

    def rounds(tree: Tree) -> Iterator[list[Node]]:
        for _ in range(6 - tree.ordinal):
            yield tree.root.fork()

    order = [index for index, _ in engine.run(rounds, PROMPTS[:6], Sampling(max_tokens=12))]
    assert max(widths) == 6
    assert order == [5, 4, 3, 2, 1, 0]
