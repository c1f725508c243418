"""Which trees of a run go first: new ones while there is memory, then those with the fewest rounds behind them."""

from __future__ import annotations

from collections.abc import Iterator

from engine_helpers import assert_idle, prompt_of, same, tiny_model

from ibtpo_engine import Ahead, Engine, Node, Sampling, Tree
from ibtpo_engine.growing import Growing, Growth, Searches

PROMPTS = [prompt_of(20, seed=i) for i in range(8)]
SAMPLING = Sampling(max_tokens=12, temperature=0)
ROUNDS = 5


def grow(max_branches: int, kv_tokens: int) -> tuple[list[tuple[int, int]], list[Node], Engine]:
    """Trees of four branches and then a fifth to a ninth, one after another.

    Returns:
        (prompt, round) in the order that the searches asked, every node, the engine.
    """
    asked: list[tuple[int, int]] = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        asked.append((tree.key, 0))
        [first, *_] = yield tree.root.fork(4)
        for turn in range(1, ROUNDS + 1):
            asked.append((tree.key, turn))
            yield first.fork(1, at=1)

    engine = Engine(tiny_model(), kv_tokens=kv_tokens, max_branches=max_branches)
    trees = dict(engine.run(search, PROMPTS, SAMPLING))
    assert_idle(engine)
    return asked, [node for i in sorted(trees) for node in trees[i].nodes()], engine


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
            went.append(tree.key)
            yield Ahead([], [])

    def submit(growth: Growing) -> None:
        pass

    searches = Searches(search, PROMPTS[:3], None, None, lambda prompt, key: engine.tree(prompt), submit)
    room = iter([True, True, False])
    assert searches.open()
    assert [*searches.resume(lambda: True, breadth=1)] == []
    assert searches.open()
    assert went == [0, 0, 1]
    assert [*searches.resume(lambda: next(room), breadth=3)] == []
    assert went == [0, 0, 1, 2, 1], "a tree is opened, the one with fewer rounds goes on, and there is no more room"
    assert [*searches.resume(lambda: False, breadth=0)] == []
    assert went[5:] == [2, 0, 1], "without a bound all go on, room or not"
    searches.close()
    assert_idle(engine)
