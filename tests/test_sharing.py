"""Budgets moved from trees of equal rewards to mixed ones: who gets what, on engines, and what is refused."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import assert_idle, prompt_of, same, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import ibtpo.studies.measure
from ibtpo.config import IBConfig, SearchConfig
from ibtpo.config_io import base_config, merge
from ibtpo.metrics import is_mixed, tree_metrics
from ibtpo.policy import built_in_policy
from ibtpo.search import make_search
from ibtpo.searches.sharing import Sharing, share_rounds
from ibtpo.tasks import DigitChain, Problem
from ibtpo.train import train
from ibtpo_engine import BackendEngine, Engine, EngineBackend, Node, Sampling, Tree

MODEL = tiny_model()
SAMPLING = Sampling(max_tokens=10, stop_tokens=(2,))
PROMPTS = [prompt_of(5 + i, seed=i) for i in range(6)]
STOP = {"initial_branches": 3, "rounds": 7, "stop_uniform_after": 5}  # at 5 of 9, with 4 rounds left

# ---- who gets what ---------------------------------------------------------------------------------------------


def test_rounds_are_shared_as_worked_by_hand() -> None:
    """20 rounds for three mixed trees: 6 each, and 2 are odd."""
    assert share_rounds([True, False, True, True, False], 4) == [7, 0, 7, 6, 0]
    assert share_rounds([False, True, False, True], 3) == [0, 6, 0, 6]
    assert share_rounds([True, True, False], 5) == [8, 7, 0]


def test_a_single_mixed_tree_does_not_get_everything() -> None:
    assert share_rounds([False, False, True, False, False], 4) == [0, 0, 8, 0, 0]


def test_nothing_moves_where_all_are_alike() -> None:
    assert share_rounds([True] * 3, 4) == share_rounds([False] * 3, 4) == [4, 4, 4]


@given(mixed=st.lists(st.booleans(), min_size=1), left=st.integers(1, 9))
def test_the_total_is_never_more_and_all_of_it_if_half_are_mixed(mixed: list[bool], left: int) -> None:
    rounds = share_rounds(mixed, left)
    assert sum(rounds) <= left * len(mixed)
    if 2 * sum(mixed) >= len(mixed) or not any(mixed):
        assert sum(rounds) == left * len(mixed)
    if any(mixed):
        grown = [count for count, is_so in zip(rounds, mixed, strict=True) if is_so]
        assert left <= min(grown) <= max(grown) <= min(min(grown) + 1, 2 * left)
        assert grown == sorted(grown, reverse=True)
        assert all(count == 0 for count, is_so in zip(rounds, mixed, strict=True) if not is_so)


def test_the_order_of_coming_does_not_matter_and_nobody_comes_twice() -> None:
    for order in ([3, 5, 9], [9, 3, 5], [5, 9, 3]):
        sharing = Sharing([3, 5, 9], left=2)
        for key in order:
            rounds = sharing.meet(key, mixed=key != 5)
        assert rounds.result() == {3: 3, 5: 0, 9: 3}
        with pytest.raises(ValueError, match="tree 3 is not among"):
            sharing.meet(3, mixed=True)
    with pytest.raises(ValueError, match="tree 4 is not among"):
        sharing.meet(4, mixed=True)


# ---- on engines ------------------------------------------------------------------------------------------------


def reward(tree: Tree, leaf: Node) -> float:
    """Half of the completions of prompts 0, 2 and 4 are right, none of the others."""
    return float(tree.key % 2 == 0 and zlib.crc32(leaf.prefix().tobytes()) % 2)


def grow(
    engine: Engine | BackendEngine | None = None, keys: Sequence[int] = range(6), *, share: bool = True, **config: Any
) -> list[Tree]:
    engine = engine or Engine(MODEL, kv_tokens=8192)
    search = make_search(
        SearchConfig(**(STOP | config)),
        IBConfig(),
        lambda tokens: range(1, len(tokens)),
        SAMPLING.max_tokens,
        list(keys) if share else (),
    )
    trees = dict(engine.run(search, [PROMPTS[key] for key in keys], SAMPLING, reward=reward, keys=keys))
    return [trees[i] for i in range(len(keys))]


def numbers(trees: Sequence[Tree]) -> list[int]:
    return [len(tree.leaves()) for tree in trees]


def assert_same(left: Sequence[Tree], right: Sequence[Tree]) -> None:
    for one, other in zip(left, right, strict=True):
        same(one.nodes()[1:], other.nodes()[1:])


@pytest.mark.parametrize("method", ["ibtree", "random-tree"])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_mixed_trees_go_on_with_what_the_others_leave(method: str, lookahead: int) -> None:
    trees = grow(method=method, lookahead=lookahead)
    assert [is_mixed(tree) for tree in trees] == [True, False] * 3
    assert numbers(trees) == [13, 5] * 3
    assert sum(numbers(trees)) == 6 * 9
    assert [tree.notes["moved"] for tree in trees] == [4, -4] * 3
    assert tree_metrics(trees)["trajectories_moved"] == 12
    for tree in trees:
        rounds = len(tree.leaves()) - 3
        assert [turn for turn, _, _ in tree.notes["branched"]] == list(range(1, rounds + 1))
        assert sorted(leaf.notes["round"] for leaf in tree.leaves()) == [0, 0, *range(rounds + 1)]
        assert tree.notes["ib"].value(tree.root) == pytest.approx(
            sum(leaf.reward or 0.0 for leaf in tree.leaves()) / len(tree.leaves())
        )


def test_rounds_of_several_branches_end_at_the_first_that_reaches_the_number() -> None:
    """3 + 4*2 = 11 trajectories; at 3 + 1*2 = 5 >= 4 three rounds of two are left to each of four trees."""
    trees = grow(keys=range(4), rounds=5, branches_per_node=2, stop_uniform_after=4)
    assert numbers(trees) == [17, 5, 17, 5]
    assert sum(numbers(trees)) == 4 * 11


@pytest.mark.parametrize("method", ["ibtree", "random-tree"])
def test_it_is_the_plain_search_where_nothing_moves(method: str) -> None:
    """All mixed, none mixed, one tree, trees that are not told of each other: the same trees to the token."""
    for keys in ([0, 2, 4], [1, 3, 5], [1]):
        plain = grow(keys=keys, method=method, stop_uniform_after=0)
        assert numbers(plain) == [9] * len(keys)
        assert_same(grow(keys=keys, method=method), plain)
        assert_same(grow(keys=keys, method=method, share=False), plain)
    assert "trajectories_moved" not in tree_metrics(plain)


def test_trees_begin_as_those_of_the_plain_search() -> None:
    """Moving changes how long a tree grows, not how: what both have is the same."""
    for tree, plain in zip(grow(), grow(stop_uniform_after=0), strict=True):
        rounds = min(len(tree.leaves()), 9) - 3
        for one in (tree, plain):
            one.notes["first"] = [
                leaf.prefix().tolist()
                for leaf in sorted(one.leaves(), key=lambda leaf: leaf.notes["round"])
                if leaf.notes["round"] <= rounds
            ]
        assert sorted(tree.notes["first"]) == sorted(plain.notes["first"])


def test_neither_the_batch_nor_the_pool_decides() -> None:
    """One branch at a time, a pool too small for all trees that wait, a backend: the same trees."""
    trees = grow()
    narrow, small = Engine(MODEL, kv_tokens=8192, max_branches=1), Engine(MODEL, kv_tokens=160)
    assert_same(grow(narrow), trees)
    assert_same(grow(small), trees)
    assert small.stats()["computed"] > narrow.stats()["computed"], "the pool was not too small"
    for engine in (narrow, small):
        assert_idle(engine)
    backend = [grow(BackendEngine(EngineBackend(narrow), max_calls=calls)) for calls in (1, 32)]
    assert numbers(backend[0]) == [13, 5] * 3
    assert_same(*backend)


class Coin(DigitChain):
    """Grades by a hash; half of the prompts can only be wrong."""

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float:
        return float(zlib.crc32(str(problem.prompt).encode()) % 2 and zlib.crc32(completion.encode()) % 2)


def test_a_sampler_study_moves_budgets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4 of 7 trajectories, 3 rounds left: trees end there, as they would or with up to three more."""
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(tmp_path / "policy")
    changes = {
        "search": {"initial_branches": 3, "rounds": 5, "stop_uniform_after": 4, "step_tokens": 1},
        "sampling": {"max_tokens": 6},
    }
    config = merge(base_config(task=None, preset="ib-tpo", file=None, run=None), changes, source="")
    monkeypatch.setattr(ibtpo.studies.measure, "make_task", lambda config: Coin(config.digits))
    spec = {"kind": "samplers", "options": {"prompts": 8}}
    rows = ibtpo.studies.measure.measure(spec, config, tmp_path, tmp_path / "policy")["prompts"]
    grown = {row["eff_rate"]: {r["trajectories"] for r in rows if r["eff_rate"] == row["eff_rate"]} for row in rows}
    assert grown[0.0] == {4}
    assert max(grown[1.0]) > 7 and min(grown[1.0]) >= 7
    assert sum(row["trajectories"] for row in rows) <= 8 * 7


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "eptree"}, "search.method=eptree does not grow by; use ibtree or random-tree, or set it to 0"),
        ({"method": "independent"}, "search.method=independent does not"),
        ({"stop_uniform_after": 2}, "stop_uniform_after: 2 must be at least 3, the trajectories a tree begins with"),
        ({"initial_branches": 1, "stop_uniform_after": 1}, "stop_uniform_after: 1 must be at least 2"),
        ({"stop_uniform_after": 9}, "stop_uniform_after: 9 .* below 9, those it has in all"),
        ({"stop_uniform_after": -1}, "stop_uniform_after: -1 lies outside"),
    ],
)
def test_settings_that_move_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**(STOP | changes))


def test_stopping_and_training_on_equal_rewards_exclude_each_other(tmp_path: Path) -> None:
    changes = {
        "out": str(tmp_path / "run"),
        "search": {"stop_uniform_after": 6},
        "advantage": {"uniform_groups": "ib_only"},
    }
    config = merge(base_config(task=None, preset="ib-tpo", file=None, run=None), changes, source="")
    with pytest.raises(ValueError, match=r"stop_uniform_after: 6 ends trees .* set it to skip, or the other to 0"):
        train(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()
