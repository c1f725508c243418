"""The searches grow the trees they promise, branch where they say, and repeat exactly."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from trees import fill

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.ib import IBEstimates
from ibtpo.search import make_search
from ibtpo.searches.guided import anywhere, highest_scores
from ibtpo.studies.table_policy import TablePolicy
from ibtpo_engine.tree import Node, Tree

POLICY = TablePolicy()


def one_token_steps(tokens):
    return range(1, len(tokens))


def grow(config: SearchConfig, *, key: int = 0, samples: int = 0, max_tokens: int = 100, **ib: object) -> Tree:
    search = make_search(config, IBConfig(**ib), one_token_steps, max_tokens)
    return POLICY.run(search, Tree([7], key=key, seed=1), Random(samples))


@pytest.mark.parametrize("method", ["ibtree", "random-tree"])
@pytest.mark.parametrize(("b0", "rounds", "k", "b"), [(4, 9, 1, 1), (1, 1, 1, 1), (2, 4, 3, 2), (1, 3, 5, 1)])
def test_a_tree_has_b0_plus_l_minus_1_times_k_times_b_trajectories(method, b0, rounds, k, b):
    config = SearchConfig(method=method, initial_branches=b0, rounds=rounds, nodes_per_round=k, branches_per_node=b)
    tree = grow(config)
    assert len(tree.leaves()) == config.trajectories == b0 + (rounds - 1) * k * b
    assert len(tree.notes["iid_leaves"]) == b0
    assert {node.notes["round"] for node in tree.nodes()[1:]} == set(range(rounds))
    assert [turn for turn, _, _ in tree.notes["branched"]] == [turn for turn in range(1, rounds) for _ in range(k)]


def test_independent_sampling_gives_chains_of_steps():
    tree = grow(SearchConfig(method="independent", group_size=5))
    assert len(tree.leaves()) == len(tree.root.children) == len(tree.notes["iid_leaves"]) == 5
    assert all(len(node) == 1 and len(node.children) <= 1 for node in tree.nodes()[1:])
    assert tree.notes["branched"] == []


def test_every_round_branches_where_the_score_is_highest():
    """Replays the rounds: the estimates of the tree as it was then name the same node."""
    config = SearchConfig(method="ibtree", initial_branches=3, rounds=8)
    tree = grow(config, zero_parent="zero")
    replay = IBEstimates(tree, tree.notes["ib"].config)
    for turn in range(config.rounds):
        if turn > 0:
            (_, picked, score) = tree.notes["branched"][turn - 1]
            scores = dict(replay.branching())
            assert scores[picked] == score == max(scores.values())
        for leaf in (leaf for leaf in tree.leaves() if leaf.notes["round"] == turn):
            replay.add_leaf([node for node in leaf.path()[1:] if node.notes["round"] == turn])


def test_random_branching_reaches_every_inner_node_equally_often():
    counts = dict.fromkeys(range(POLICY.depth), 0)
    config = SearchConfig(method="random-tree", initial_branches=1, rounds=2)
    for key in range(2000):
        ((_, node, _),) = grow(config, key=key).notes["branched"]
        counts[node.end - 1] += 1
    assert all(abs(count - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("method", ["ibtree", "random-tree"])
def test_the_prompt_is_branched_only_if_allowed(method):
    config = SearchConfig(method=method, initial_branches=3, rounds=30, branch_at_root=False)
    tree = grow(config)
    assert len(tree.root.children) == 3
    open_tree = grow(SearchConfig(method=method, initial_branches=3, rounds=30))
    assert len(open_tree.root.children) > 3


def test_nodes_at_the_length_limit_are_not_branched():
    tree = grow(SearchConfig(method="random-tree", initial_branches=2, rounds=40), max_tokens=2)
    assert max(node.end - tree.prompt_len for _, node, _ in tree.notes["branched"]) == 1


def test_the_prompt_is_branched_where_nothing_else_can_be():
    tree = grow(SearchConfig(method="ibtree", branch_at_root=False, rounds=4), max_tokens=1)
    assert [node for _, node, _ in tree.notes["branched"]] == [tree.root] * 3
    short = make_search(SearchConfig(method="ibtree", branch_at_root=False, rounds=3), IBConfig(), lambda tokens: [], 9)
    tree = POLICY.run(short, Tree([7]), Random(0))  # trajectories of a single step: nothing but the prompt has children
    assert len(tree.root.children) == 6


def shape(tree: Tree) -> list[tuple[int, int]]:
    return [(node.start, int(node.tokens[0])) for node in tree.nodes()]


def test_a_replay_is_exact_and_independent_of_the_global_random_state():
    for method in ("ibtree", "random-tree"):
        config = SearchConfig(method=method)
        assert shape(grow(config)) == shape(grow(config))
        picks = [
            [node.end for _, node, _ in grow(SearchConfig(method="random-tree"), key=key).notes["branched"]]
            for key in range(5)
        ]
        assert len({tuple(pick) for pick in picks}) > 1  # other trees, other choices


def test_ties_are_broken_at_random():
    tree = Tree([1])
    nodes = [(fill(tree.root.fork()[0], [2]), score) for score in (0.5, 1.0, 1.0, 1.0)]
    picked = [highest_scores(nodes, 1, Random(seed))[0] for seed in range(60)]
    assert {node: picked.count(node) > 8 for node, _ in nodes[1:]} == dict.fromkeys(dict(nodes[1:]), True)
    assert [dict(nodes)[node] for node in highest_scores(nodes, 4, Random(0))] == [1, 1, 1, 0.5]
    assert len(set(anywhere(nodes, 9, Random(0)))) == 4


def test_a_search_asks_for_pending_nodes_only():
    growth = make_search(SearchConfig(), IBConfig(), one_token_steps, 10)(tree := Tree([1]))
    pending: list[Node] = next(growth)
    assert [node.is_pending and node.parent is tree.root for node in pending] == [True] * 4


# ---- rounds ahead of their outcomes ------------------------------------------------------------------------------


def test_searches_without_rounds_refuse_to_look_ahead() -> None:
    with pytest.raises(ValueError, match=r"search.lookahead: 2 .*set it to 1 for eptree"):
        SearchConfig(method="eptree", lookahead=2)


@pytest.mark.parametrize("method", ["ibtree", "random-tree"])
@pytest.mark.parametrize("lookahead", [2, 3, 8, 20])
def test_rounds_ahead_grow_as_many_trajectories_and_count_them_all(method: str, lookahead: int) -> None:
    """And no node has two branches under way while another could be branched."""
    policy = TablePolicy((0.9, 0.6, 0.3), 4)
    config = SearchConfig(method=method, rounds=9, lookahead=lookahead)
    widest = 0
    for key in range(20):
        tree = Tree([1], key=key)
        policy.run(make_search(config, IBConfig(), lambda tokens: range(1, len(tokens)), 4), tree, Random(key))
        assert len(tree.leaves()) == config.trajectories == 12
        estimates = tree.notes["ib"]
        assert estimates.value(tree.root) == pytest.approx(np.mean([leaf.reward for leaf in tree.leaves()]))
        rounds = [leaf.notes["round"] for leaf in tree.leaves()]
        assert sorted(rounds) == [0] * 4 + list(range(1, 9))
        branched = [node for _, node, _ in tree.notes["branched"]]
        for i in range(len(branched) - 1):
            widest = max(widest, len(set(branched[i : i + lookahead])))
    assert widest == min(lookahead, 8)


def test_with_one_round_under_way_it_is_the_plain_search() -> None:
    """Round by round the search waits for its own branches: nothing but lists is yielded."""
    yielded = []

    def watched(tree: Tree):
        growth = make_search(SearchConfig(), IBConfig(), lambda tokens: range(1, len(tokens)), 4)(tree)
        sent = None
        while True:
            try:
                asked = growth.send(sent)
            except StopIteration:
                return
            yielded.append(asked)
            sent = yield asked

    TablePolicy((0.9, 0.6, 0.3), 4).run(watched, Tree([1], key=0), Random(0))
    assert len(yielded) == 9
    assert all(isinstance(asked, list) for asked in yielded)
