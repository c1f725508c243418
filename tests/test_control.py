"""Streams, aborts, budgets, memory and the check of the books: control over trees while they grow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import assert_idle, check_every_step, expected_tokens, grow, prompt_of, same, tiny_model, work
from trees import fill

from ibtpo_engine import Budget, BudgetSpent, Engine, Event, IntegrityError, Model, Node, Sampling, Tree
from ibtpo_engine import memory as engine_memory
from ibtpo_engine.budget import Limit, within_budgets
from ibtpo_engine.slots import Slots

PROMPT = prompt_of(37)
SAMPLING = Sampling(max_tokens=40, stop_tokens=(2,))


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["native", "module"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(dtype=request.param)


def unlimited(model: Model, n: int = 5) -> list[Node]:
    engine = Engine(model, kv_tokens=8192)
    return engine.extend(engine.tree(PROMPT, key=3).root.fork(n), SAMPLING)


# ---- streams and aborts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [600, 10])
def test_the_events_of_a_branch_are_its_tokens_in_order_and_once(model: Model, pages: int) -> None:
    engine = Engine(model, kv_tokens=16 * pages)
    checks = check_every_step(engine)
    tree = engine.tree(PROMPT, key=3)
    nodes = tree.root.fork(5)
    events: dict[Node, list[Event]] = {node: [] for node in nodes}
    for event in engine.stream(nodes, SAMPLING):
        events[event.node].append(event)
        if event.done:
            event.node.drop()  # or what has finished would fill the tight pool
    same(nodes, unlimited(model))
    for node, mine in events.items():
        for name in Slots.OUTPUTS:
            told = np.concatenate([getattr(event, name) for event in mine])
            assert told.tolist() == getattr(node, name).tolist()
        assert [event.done for event in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].finish == node.finish
        depth = node.start
        for event in mine:
            assert event.start == depth
            depth += len(event.tokens)
    assert len(checks) > 20
    assert (engine.stats()["preemptions"] > 0) == (pages == 10)


def test_a_branch_under_way_is_forked_where_it_is_and_goes_on(model: Model) -> None:
    """As do the others of its stream: all hold the tokens of branches that nobody disturbed."""
    engine = Engine(model, kv_tokens=8192)
    check_every_step(engine)
    nodes = engine.tree(PROMPT, key=3).root.fork(5)
    forked, rest, forks = nodes[1], None, []
    for event in engine.stream(nodes, SAMPLING):
        if event.node is forked and rest is None and event.start == len(PROMPT) + 4:
            with pytest.raises(ValueError, match="is being extended; abort it with keep=True"):
                forked.fork()
            engine.abort([forked], keep=True)
            rest, *forks = engine.extend([forked.resume(), *forked.fork(2)], SAMPLING)
    alone = unlimited(model)
    assert rest is not None and forked.end == rest.start == len(PROMPT) + 5
    for name in Slots.OUTPUTS:
        assert [*getattr(forked, name), *getattr(rest, name)] == pytest.approx(getattr(alone[1], name), abs=1e-5)
    same([node for node in nodes if node is not forked], [node for node in alone if node is not alone[1]])
    assert len({tuple(node.tokens) for node in (rest, *forks)}) == 3
    rest.tree.close()
    assert_idle(engine)


def test_weights_that_change_in_a_stream_leave_what_was_told(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    nodes = engine.tree(PROMPT, key=3).root.fork(3)
    told: dict[Node, list[int]] = {node: [] for node in nodes}
    for count, event in enumerate(engine.stream(nodes, SAMPLING)):
        told[event.node] += event.tokens.tolist()
        if count in (4, 11):
            engine.weights_changed()
        if count in (7, 11):
            engine.release()
    assert {node: node.tokens.tolist() for node in nodes} == told
    same(nodes, unlimited(model, 3))


def test_a_branch_that_outlives_its_weights_carries_the_version_of_the_first(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    nodes = engine.tree(PROMPT).root.fork(2)
    for event in engine.stream(nodes, Sampling(max_tokens=12)):
        if event.node is nodes[0] and event.start - len(PROMPT) in (4, 8):
            engine.weights_changed()
            engine.abort(nodes[1:], keep=True)
    assert [(node.finish, node.version) for node in nodes] == [("length", 0), ("abort", 0)]
    [score] = engine.score(nodes[0], [[3, 4]], keep=True)
    assert score.node is not None and score.node.version == engine.version == 2


@pytest.mark.parametrize("after", [1, 3, 9, 20])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("pages", [600, 15])
def test_aborted_branches_give_back_their_pages_and_disturb_no_other(
    model: Model, after: int, keep: bool, pages: int
) -> None:
    engine = Engine(model, kv_tokens=16 * pages)
    check_every_step(engine)
    tree = engine.tree(PROMPT, key=3)
    nodes, expected, ends = tree.root.fork(5), unlimited(model), {}
    for count, event in enumerate(engine.stream(nodes, SAMPLING)):
        if event.done:
            ends[event.node] = event.finish
        if count == after:
            doomed = [node for node in nodes[1:4] if node.in_flight]
            engine.abort(doomed, keep=keep)
            engine.check_integrity()
            assert not any(node.in_flight for node in doomed)
    assert len(doomed) > 0
    assert len(ends) == 5
    for node, whole in zip(nodes, expected, strict=True):
        if node not in doomed:
            same([node], [whole])
            continue
        assert ends[node] == "abort"
        assert node.dropped == node.is_pending == (node not in tree.root.children)
        assert keep or node.dropped
        assert node.tokens.tolist() == whole.tokens[: len(node)].tolist()
        if node.tokens.size:
            [rest] = engine.extend([node.resume()], SAMPLING)
            assert [*node.tokens, *rest.tokens] == whole.tokens.tolist()
    tree.close()
    assert_idle(engine)


def test_a_stream_that_is_left_takes_its_branches_off(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT) as tree:
        for event in engine.stream(tree.root.fork(3), SAMPLING):
            assert event.node in tree.root.children
            break
        assert not any(node.in_flight for node in tree.root.children)
        engine.check_integrity()
    assert_idle(engine)


@pytest.mark.parametrize("keep", [False, True])
def test_a_search_goes_on_when_its_branches_are_aborted(model: Model, keep: bool) -> None:
    rounds: list[list[str | None]] = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(4)
        rounds.append([node.finish for node in nodes])

    def reward(tree: Tree, leaf: Node) -> float:
        engine.abort([node for node in tree.root.children if node.in_flight], keep=keep)
        return 0.0

    engine = Engine(model, kv_tokens=8192)
    list(engine.run(search, [PROMPT, prompt_of(20)], SAMPLING, reward=reward))
    assert all((len(ends) == 4) == keep and ("abort" in ends) == keep for ends in rounds)
    assert len(rounds) == 2
    assert_idle(engine)


def test_what_a_search_asked_for_can_be_aborted_before_there_is_room_for_it(model: Model) -> None:
    """New trees go first, so a second round waits; until then its branches are pending, and not in flight."""
    asked: list[Node] = []
    aborted: list[Node] = []
    received: list[int] = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        [first, _] = yield tree.root.fork(2)
        asked.extend(first.fork(1, at=1))
        received.append(len((yield asked[-1:])))

    def reward(tree: Tree, leaf: Node) -> float:
        held = [node for node in asked if node.is_pending and not (node.in_flight or node.dropped)]
        aborted.extend(held)
        engine.abort(held)
        return 0.0

    engine = Engine(model, kv_tokens=8192, max_branches=2)
    list(engine.run(search, [prompt_of(20, seed=i) for i in range(4)], SAMPLING, reward=reward))
    assert aborted and all(node.dropped and node not in node.parent.children for node in aborted if node.parent)
    assert sorted(received) == [0] * len(aborted) + [1] * (4 - len(aborted))
    assert_idle(engine)


@pytest.mark.parametrize("keep", [False, True])
def test_a_branch_aborted_alone_costs_the_same_among_few_and_many(model: Model, keep: bool) -> None:
    def each(count: int) -> float:
        engine = Engine(model, kv_tokens=8192, max_branches=count // 2)
        nodes = engine.tree(PROMPT).root.fork(count)
        engine._submit(nodes, SAMPLING)
        engine._step()
        engine._step()
        spent = work(lambda: [engine.abort([node], keep=keep) for node in nodes])
        assert not engine.scheduler.num_branches
        engine.check_integrity()
        return spent / count

    assert each(128) < 1.2 * each(32)


def test_a_branch_of_a_search_aborted_alone_costs_the_same_among_few_and_many(model: Model) -> None:
    """A second search aborts, one by one, what the first waits for."""

    def each(count: int) -> float:
        engine, nodes, spent = Engine(model, kv_tokens=16 * 1024, max_branches=2 * count), list[Node](), list[int]()

        def search(tree: Tree) -> Iterator[list[Node] | Future[None]]:
            if tree.ordinal == 0:
                nodes.extend(tree.root.fork(count))
                assert (yield nodes) == []
            else:
                done = Future[None]()
                done.set_result(None)
                yield done
                spent.append(work(lambda: [engine.abort([node]) for node in nodes]))

        list(engine.run(search, [PROMPT, PROMPT], Sampling(max_tokens=40)))
        assert all(node.dropped for node in nodes)
        return spent[0] / count

    assert each(128) < 1.2 * each(32)


def test_a_branch_extended_costs_the_same_among_few_and_many(model: Model) -> None:
    def each(count: int) -> float:
        engine = Engine(model, kv_tokens=16 * 1024, max_branches=4)
        nodes = engine.tree(PROMPT).root.fork(count)
        return work(lambda: engine.extend(nodes, Sampling(max_tokens=2))) / count

    assert each(512) < 1.05 * each(128)


# ---- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_tokens", [8192, 16 * 12])
@pytest.mark.parametrize("max_branches", [1, 64])
def test_a_token_budget_cuts_the_same_tokens_in_any_batch(model: Model, kv_tokens: int, max_branches: int) -> None:
    engine = Engine(model, kv_tokens=kv_tokens, max_branches=max_branches)
    check_every_step(engine)
    tree = engine.tree(PROMPT, key=3, budget=Budget(tokens=32))
    nodes = engine.extend(tree.root.fork(5), SAMPLING)
    for node, whole, share in zip(nodes, unlimited(model), (7, 7, 6, 6, 6), strict=True):
        assert node.tokens.tolist() == whole.tokens[:share].tolist()
        assert node.finish == ("budget" if len(whole) > share else whole.finish)
    assert "budget" in {node.finish for node in nodes}
    left = 32 - tree.num_sampled
    if left:
        [node] = engine.extend(tree.root.fork(), SAMPLING)
        assert len(node) <= left
    while tree.num_sampled < 32:
        engine.extend(tree.root.fork(), SAMPLING)
    with pytest.raises(BudgetSpent, match=r"1 branches need 1 tokens, 0 left of Budget.tokens=32; drop a branch"):
        engine.extend(tree.root.fork(), SAMPLING)
    other = engine.tree(prompt_of(20), key=9)
    [free] = engine.extend(other.root.fork(), SAMPLING)
    assert free.tokens.tolist() == expected_tokens(model, free, SAMPLING).tolist()


def test_a_page_budget_bounds_what_a_tree_owns(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT, key=3, budget=Budget(pages=9))
    sizes = []
    step = engine.scheduler.step

    def watched(version: int, most: int = 1) -> list[Node] | None:
        ended = step(version)
        pages = {page for node in tree.nodes() if node.kv for page in node.kv.pages}
        sizes.append(len(pages.union(*(kv.pages for kv in engine.scheduler.held()))))
        return ended

    engine.scheduler.step = watched  # type: ignore[method-assign]
    nodes = engine.extend(tree.root.fork(3), Sampling(max_tokens=90))
    assert [(node.finish, node.end) for node in nodes] == [("budget", 64)] * 3
    assert max(sizes) == 9
    with pytest.raises(BudgetSpent, match="0 left of Budget.pages=9"):
        engine.score(tree, [[3]], keep=True)
    nodes[0].drop()
    engine.weights_changed()
    [node] = engine.extend(nodes[1].fork(1, at=7), Sampling(max_tokens=90))
    assert (node.finish, node.end) == ("budget", 64)
    assert max(sizes) == 9
    with pytest.raises(ValueError, match=r"leaves no room in Budget.pages=3"):
        engine.tree(PROMPT, budget=Budget(pages=3))


def test_what_branches_under_way_may_reach_is_not_given_again() -> None:
    tree = Tree(PROMPT, budget=Budget(tokens=10))
    first, second, gone = tree.root.fork(3)
    fill(gone, [3], reward=0.0).drop()
    reserved = {first: tree.root.end + 6, gone: tree.root.end + 4}
    found = within_budgets({second: 1000}, lambda tree: reserved)
    assert found == {second: Limit(depth=tree.root.end + 4, finish="budget")}


def test_a_node_budget_refuses_forks_and_cuts_nothing(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT, budget=Budget(nodes=4))
    with pytest.raises(BudgetSpent, match="5 nodes, 4 left of Budget"):
        tree.root.fork(5)
    nodes = engine.extend(tree.root.fork(3), Sampling(max_tokens=9))
    for call in (lambda: nodes[0].fork(1, at=4), lambda: tree.root.fork(2)):
        with pytest.raises(BudgetSpent, match=r"Budget.nodes=4; drop a branch"):
            call()
    assert len(nodes[0]) == 9
    nodes[1].drop()
    assert len(nodes[0].fork(1, at=4)) == 1
    for name in ("tokens", "nodes", "pages"):
        with pytest.raises(ValueError, match=f"Budget.{name}: 0"):
            Budget(**{name: 0})


def test_what_a_budget_asks_costs_the_same_on_a_small_and_a_large_tree(model: Model) -> None:
    def fork(leaves: int) -> int:
        engine = Engine(model, kv_tokens=8192)
        tree = engine.tree(PROMPT, budget=Budget(tokens=1000, nodes=1000, pages=1000))
        engine.extend(tree.root.fork(leaves), Sampling(max_tokens=3))
        return work(lambda: engine.extend(tree.root.fork(), Sampling(max_tokens=1)))

    assert fork(128) < 1.2 * fork(32)


def test_a_search_out_of_budget_ends_and_the_others_go_on(model: Model) -> None:
    def search(tree: Tree) -> Iterator[list[Node]]:
        for _ in range(100):
            yield tree.root.fork(2)

    engine = Engine(model, kv_tokens=8192)
    for budget in (Budget(tokens=50), Budget(nodes=7), Budget(pages=12)):
        trees = dict(engine.run(search, [PROMPT, prompt_of(20), prompt_of(9)], SAMPLING, budget=budget))
        assert sorted(trees) == [0, 1, 2]
        for tree in trees.values():
            assert 1 < len(tree.leaves()) < 100
            assert not any(node.is_pending for node in tree.root.children)
        assert_idle(engine)


def test_an_error_caught_around_a_search_ends_its_own_tree_alone(model: Model) -> None:
    """As docs/engine.md says: whether the search raised it, or a mask for one of its branches."""

    def allowed(prefix: np.ndarray) -> list[int]:
        if len(prefix) == len(PROMPT) + 3 and prefix[:37].tolist() == PROMPT:
            raise ValueError("mask")
        return list(range(3, 40))

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(2)
        if tree.prompt_len == 20:
            raise ValueError("search")
        yield tree.root.fork(1)

    def careful(tree: Tree) -> Iterator[list[Node]]:
        try:
            yield from search(tree)
        except ValueError as error:
            tree.notes["error"] = str(error)

    engine, sampling = Engine(model, kv_tokens=8192), Sampling(max_tokens=9, allowed=allowed)
    prompts = [PROMPT, prompt_of(20), prompt_of(9)]
    trees = dict(engine.run(careful, prompts, sampling, reward=lambda tree, leaf: None))
    assert [trees[i].notes.get("error") for i in range(3)] == ["mask", "search", None]
    assert [len(trees[i].leaves()) for i in range(3)] == [0, 2, 3]
    assert {leaf.reward for tree in trees.values() for leaf in tree.leaves()} == {None}
    assert_idle(engine)
    with pytest.raises(ValueError, match="mask|search"):
        list(engine.run(search, prompts, sampling))
    assert_idle(engine)


# ---- memory --------------------------------------------------------------------------------------------------


def test_a_pool_takes_its_share_of_what_is_free(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    page = engine_memory.bytes_per_token(model.config, model.dtype) * 16
    engine = Engine(model, kv_tokens=16)
    assert engine.cache.pool.keys.nbytes + engine.cache.pool.values.nbytes == page
    monkeypatch.setattr(engine_memory, "free_memory", lambda device: page * 101)
    assert Engine(model, kv_share=0.3).cache.pool.num_pages == 30
    for share, why in ((0, "outside"), (1.5, "outside"), (0.001, "holds no page")):
        with pytest.raises(ValueError, match=why):
            Engine(model, kv_share=share)
    with pytest.raises(ValueError, match="give one"):
        Engine(model, kv_share=0.3, kv_tokens=16)


def _make_group(folder: Path, names: tuple[str, str], most: str, used: int, stat: str = "anon 0") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (most, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_free_memory_is_what_the_system_and_the_groups_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cached files count as free; a limit of a group above, as Slurm and systemd set it, binds as well."""
    cpu = torch.device("cpu")
    assert 1 << 20 < engine_memory.free_memory(cpu) < 1 << 50
    groups, membership = tmp_path / "cgroup", tmp_path / "membership"
    monkeypatch.setattr(engine_memory, "_CGROUP", groups)
    monkeypatch.setattr(engine_memory, "_MEMBERSHIP", membership)
    assert engine_memory.free_memory(cpu) > 9_000_000  # no file says which groups there are

    names = "memory.max", "memory.current"
    membership.write_text("0::/job/step\n")
    _make_group(groups, names, "9000000", 1_000_000)  # a container's own
    assert engine_memory.free_memory(cpu) == 8_000_000
    _make_group(groups, names, "max", 0)
    assert engine_memory.free_memory(cpu) > 9_000_000
    _make_group(groups / "job", names, "5000000", 4_000_000, "anon 1\ninactive_file 1000000\nactive_file 1500000")
    _make_group(groups / "job" / "step", names, "max", 3_000_000)
    assert engine_memory.free_memory(cpu) == 3_500_000
    _make_group(groups / "job" / "step", names, "3000000", 2_000_000)
    assert engine_memory.free_memory(cpu) == 1_000_000
    _make_group(groups / "job" / "step", names, "3000000", 3_500_000)
    assert engine_memory.free_memory(cpu) == 0

    membership.write_text("9:cpu,cpuacct:/other\n4:memory:/docker/1\n0::/\n")  # version 1, seen from within a container
    old = "memory.limit_in_bytes", "memory.usage_in_bytes"
    below = "inactive_file 1\nactive_file 1\ntotal_inactive_file 500000\ntotal_active_file 0"
    _make_group(groups / "memory", old, "7000000", 6_000_000, below)
    assert engine_memory.free_memory(cpu) == 1_500_000


def test_release_frees_the_memory_and_restore_takes_it(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = grow(engine, PROMPT, SAMPLING, key=3)
    gone = [weakref.ref(engine.cache.pool.keys), weakref.ref(engine.cache.pool.values)]
    storage = [ref().untyped_storage()._weak_ref() for ref in gone]
    engine.release()
    assert [ref() for ref in gone] == [None, None]
    assert all(torch.UntypedStorage._expired(ref) for ref in storage), "nothing else holds the pool"
    engine.check_integrity()
    engine.restore()
    assert engine.cache.pool.keys.numel() > 0
    [fork] = engine.extend(tree.leaves()[0].fork(1, at=1), SAMPLING)
    assert fork.tokens.tolist() == expected_tokens(model, fork, SAMPLING).tolist()


def test_pinned_trees_survive_any_pressure(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 30)
    check_every_step(engine)
    tree = grow(engine, PROMPT, SAMPLING, key=3)
    pages = {node: list(node.kv.pages) for node in tree.nodes()}

    def search(other: Tree) -> Iterator[list[Node]]:
        yield other.root.fork(2)

    pinned = engine.cache.owned_by(tree)
    list(engine.run(search, [prompt_of(20 + i, seed=i) for i in range(8)], Sampling(max_tokens=20)))
    stats = engine.stats()
    assert stats["evicted_pages"] + stats["preemptions"] > 0
    assert engine.cache.owned_by(tree) == pinned
    assert pages == {node: node.kv.pages for node in tree.nodes()}
    computed = stats["computed"]
    leaf = tree.leaves()[0]
    engine.extend(leaf.fork(), Sampling(max_tokens=leaf.end - len(PROMPT) + 1))
    assert engine.stats()["computed"] - computed == 1


# ---- the check of the books ----------------------------------------------------------------------------------


def _share_a_page_with_nobody(engine: Engine, tree: Tree) -> None:
    engine.cache.pool.share(tree.leaves()[0].kv.pages[:1])


BREAKAGES: dict[str, Callable[[Engine, Tree], object]] = {
    "references counted": _share_a_page_with_nobody,
    "times in the free list": lambda engine, tree: engine.cache.pool._free.append(engine.cache.pool._free[0]),
    "the index counts": lambda engine, tree: setattr(engine.cache.index, "num_entries", 99),
    "the index lists": lambda engine, tree: engine.cache.index._leaves.clear(),
    "is loose": lambda engine, tree: setattr(engine.cache.index._entries()[0], "key", b"0" * 64),
    "was dropped": lambda engine, tree: setattr(tree.leaves()[0], "dropped", True),
    "does not begin": lambda engine, tree: setattr(tree.leaves()[0], "start", 3),
    "is computed to": lambda engine, tree: setattr(tree.leaves()[0].kv, "computed", 400),
    "draw the same": lambda engine, tree: setattr(tree.root.children[0], "stream", tree.root.children[1].stream),
    "in flight": lambda engine, tree: setattr(tree.root.fork()[0], "in_flight", True),
    "a tree counts": lambda engine, tree: setattr(tree.used, "pages", 99),
    "known by their nodes": lambda engine, tree: engine.scheduler.branches.clear(),
    "miscounted": lambda engine, tree: engine.scheduler.slots._free.pop(),
    "out of order": lambda engine, tree: engine.scheduler.waiting.reverse(),
    "other pages": lambda engine, tree: engine.scheduler.slots.table.fill(0),
    "runs at depth": lambda engine, tree: engine.scheduler.slots.limit.fill(0),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_the_check_says_what_is_wrong(model: Model, what: str) -> None:
    engine = Engine(model, kv_tokens=8192, max_branches=3)
    tree = grow(engine, PROMPT, SAMPLING, key=3)
    engine._submit(tree.root.fork(6), SAMPLING)
    engine._step()
    engine.check_integrity()
    BREAKAGES[what](engine, tree)
    with pytest.raises(IntegrityError, match=what):
        engine.check_integrity()
