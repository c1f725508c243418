"""Which trees of a run go first: new ones while there is memory, then those with the fewest rounds behind them."""

from __future__ import annotations

from collections.abc import Iterator

from engine_helpers import assert_idle, prompt_of, same, tiny_model

from ibtpo_engine import Ahead, Engine, Node, Sampling, Tree
from ibtpo_engine.branches import Branch
from ibtpo_engine.growing import Growing, Growth, Searches

PROMPTS = [prompt_of(20, seed=i) for i in range(8)]
SAMPLING = Sampling(max_tokens=12, temperature=0)
ROUNDS = 5


def grow(max_branches: int, kv_tokens: int) -> tuple[list[tuple[int, int]], list[Node], Engine]:
    """Trees of four branches and then a fifth to a ninth, one after another.

    Returns:
        (prompt, round) in the order that branches were submitted, every node, the engine.
    """

    def search(tree: Tree) -> Iterator[list[Node]]:
        [first, *_] = yield tree.root.fork(4)
        for turn in range(1, ROUNDS + 1):
            [new] = first.fork(1, at=1)
            new.notes["turn"] = turn
            yield [new]

    engine = Engine(tiny_model(), kv_tokens=kv_tokens, max_branches=max_branches)
    submitted, submit = [], engine.scheduler.submit

    def watched(branch: Branch) -> Branch:
        submitted.append((branch.node.tree.key, branch.node.notes.get("turn", 0)))
        return submit(branch)

    engine.scheduler.submit = watched  # type: ignore[method-assign]
    trees = dict(engine.run(search, PROMPTS, SAMPLING))
    assert_idle(engine)
    return list(dict.fromkeys(submitted)), [node for i in sorted(trees) for node in trees[i].nodes()], engine


def test_while_there_is_memory_every_tree_is_opened_before_any_goes_on() -> None:
    """Eight trees of four branches keep eight branches busy four times; so do their rounds, one of each tree."""
    asked, nodes, engine = grow(max_branches=8, kv_tokens=16_384)
    assert [turn for _, turn in asked] == sorted(turn for _, turn in asked), "a tree went on before others began"
    assert engine.stats()["steps"] <= (4 + ROUNDS) * (SAMPLING.max_tokens + 2)
    same(nodes, grow(max_branches=256, kv_tokens=16_384)[1])


def test_where_half_the_pool_is_taken_trees_under_way_go_first() -> None:
    asked, nodes, engine = grow(max_branches=8, kv_tokens=16 * 40)
    begun_last = asked.index((len(PROMPTS) - 1, 0))
    assert max(turn for _, turn in asked[:begun_last]) == ROUNDS, "no tree was complete when the last was opened"
    assert engine.stats()["preemptions"] == 0
    same(nodes, grow(max_branches=256, kv_tokens=16_384)[1])


def test_more_trees_than_branches_are_not_opened() -> None:
    """Or the first would wait for the last of a stream of prompts."""
    asked, nodes, _ = grow(max_branches=2, kv_tokens=16_384)
    under_way: set[int] = set()
    for prompt, turn in asked:
        under_way.add(prompt)
        assert len(under_way) <= 3  # one more may begin where the batch is not full
        if turn == ROUNDS:
            under_way.discard(prompt)
    same(nodes, grow(max_branches=256, kv_tokens=16_384)[1])


def test_the_fewest_rounds_behind_go_first_and_only_while_there_is_room() -> None:
    went: list[int] = []
    engine = Engine(tiny_model(), kv_tokens=1024)

    def search(tree: Tree) -> Growth:
        while True:
            yield Ahead([], [])

    def submit(growth: Growing) -> None:
        went.append(growth.tree.key)

    searches = Searches(search, PROMPTS[:3], None, None, lambda prompt, key: engine.tree(prompt), submit)
    room = iter([True, True, False])
    assert searches.open()
    assert [*searches.resume(lambda: True, breadth=1)] == []
    assert searches.open()
    assert went == [0, 0, 1]
    assert [*searches.resume(lambda: next(room), breadth=3)] == []
    assert went == [0, 0, 1, 2, 1], "a tree is opened, the one with fewer rounds goes on, and there is no more room"
    assert [growth.tree.key for growth in searches.growing.values() if growth.is_ready()] == [1, 2]
    assert [*searches.resume(lambda: False, breadth=0)] == []
    assert went[5:] == [2, 0, 1], "without a bound all go on, room or not"
    searches.close()
    assert_idle(engine)


def test_what_is_done_is_handed_over_though_there_is_no_room() -> None:
    """Eight trajectories in batches of two: a tree is closed, and its pages free, before the next but one is opened."""
    engine = Engine(tiny_model(), kv_tokens=16_384, max_branches=2)
    opened: list[int] = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        opened.append(tree.key)
        yield tree.root.fork(2)

    for number, _ in enumerate(engine.run(search, PROMPTS, SAMPLING), 1):
        assert len(opened) <= number
    assert len(opened) == len(PROMPTS)
    assert_idle(engine)
