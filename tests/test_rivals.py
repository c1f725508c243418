"""The rival methods against arithmetic done by hand, their limiting cases, and a training step each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_idle, prompt_of, tiny_model
from trees import chain, estimate, fill

from ibtpo.advantage import NodeAdvantage, advantage, over_batch
from ibtpo.advantages.tree_grpo import tree_grpo
from ibtpo.advantages.treepo import treepo, whiten
from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, IBConfig, LossConfig, SamplingConfig, SearchConfig, TrainConfig
from ibtpo.metrics import tree_metrics
from ibtpo.pack import pack
from ibtpo.search import make_search
from ibtpo.searches.eptree import most_surprising
from ibtpo.studies.table_policy import TablePolicy
from ibtpo_engine import Engine, Sampling
from ibtpo_engine.tree import Node, Tree

POLICY = TablePolicy(depth=4)
LONG = TablePolicy(depth=8)


def one_token_steps(tokens: Any) -> range:
    return range(1, len(tokens))


def grow(
    policy: TablePolicy = POLICY, *, key: int = 0, max_tokens: int = 100, splitter: Any = None, **config: Any
) -> Tree:
    search = make_search(SearchConfig(**config), IBConfig(), splitter or one_token_steps, max_tokens)
    return policy.run(search, Tree([7], key=key, seed=1), Random(key))


def paths(tree: Tree) -> list[list[int]]:
    return sorted(leaf.prefix().tolist() for leaf in tree.leaves())


def advantages(tree: Tree, kind: str, **config: Any) -> NodeAdvantage:
    return advantage(tree.export(), tree.notes["ib"], AdvantageConfig(kind=kind, **config))  # type: ignore[arg-type]


def small_tree(rewards: tuple[float, ...] = (1.0, 0.0, 0.0, 1.0)) -> Tree:
    """Depth first: q, a, b, b1, b2, b3, c. Below a there is only b; b has three leaves; c is the fourth."""
    tree = Tree([1, 2])
    first = chain(tree.root, [([3], -1.0), ([4, 4], -1.0), ([5], -1.0)], rewards[0])
    trajectories = [first, *(chain(first[1], [([6 + i], -1.0)], rewards[1 + i]) for i in range(2))]
    trajectories.append(chain(tree.root, [([8, 8, 8], -1.0)], rewards[3]))
    tree.notes["ib"] = estimate(tree, trajectories)
    return tree


def chains(rewards: tuple[float, ...]) -> Tree:
    """Chains of two steps."""
    tree = Tree([1])
    trajectories = [chain(tree.root, [([2 + i], -1.0), ([3, 4], -1.0)], r) for i, r in enumerate(rewards)]
    tree.notes["ib"] = estimate(tree, trajectories)
    return tree


# ---- EPTree --------------------------------------------------------------------------------------------------


def test_eptree_picks_the_largest_surprisals_of_a_chain() -> None:
    tree = Tree([1])
    [leaf] = chain(tree.root, [([2, 3, 4, 5, 6], [-9.0, -1.0, -3.0, -2.0, -8.0])], 1.0)
    # token 2 opens the branch; from depth 5 on, the last token, nothing is picked: 3.0 at offset 2, then 2.0 at 3
    assert most_surprising(leaf, 2, deepest=5) == {leaf: [(3, 2.0), (2, 3.0)]}
    assert most_surprising(leaf, 1, deepest=6) == {leaf: [(4, 8.0)]}
    assert most_surprising(leaf, 9, deepest=2) == {}


class Scripted(TablePolicy):
    """Chains with surprisals 9, 1, 3, 2, 8, whatever went before; every branch samples tokens of its own."""

    def __init__(self) -> None:
        super().__init__(depth=5)
        self.sampled = 10

    def _extend(self, node: Node, rng: Random) -> None:
        depth = node.parent.end - node.tree.prompt_len
        tokens = list(range(self.sampled, self.sampled + 5 - depth))
        self.sampled += len(tokens)
        fill(node, tokens, [-9.0, -1.0, -3.0, -2.0, -8.0][depth:], float(depth > 0))


def test_eptree_by_hand() -> None:
    """M=2, N=2, L=1, T=1, nothing picked from token 4 on: both chains branch before tokens 2 and 3."""
    budget = {"method": "eptree", "initial_branches": 2, "nodes_per_round": 2, "rounds": 2}
    tree = grow(Scripted(), max_tokens=5, splitter=lambda tokens: [], deepest_share=0.8, **budget)
    # the chains are 10..14 and 15..19; of each the later pick, offset 3, is forked first
    assert paths(tree) == [
        [7, 10, 11, 12, 13, 14], [7, 10, 11, 12, 20, 21], [7, 10, 11, 22, 23, 24],
        [7, 15, 16, 17, 18, 19], [7, 15, 16, 17, 25, 26], [7, 15, 16, 27, 28, 29],
    ]  # fmt: skip
    assert [leaf.notes["group"] for leaf in tree.leaves()] == [0, 0, 0, 1, 1, 1]
    assert [(turn, node.end, score) for turn, node, score in tree.notes["branched"]] == [(1, 4, 2), (1, 3, 3)] * 2
    assert [leaf.prefix().tolist()[1] for leaf in tree.notes["iid_leaves"]] == [10, 15]
    # chains earn 0, what branches off them 1
    assert tree.notes["ib"].value(tree.root) == pytest.approx(4 / 6)
    assert {node.notes["round"] for node in tree.nodes()[1:]} == {0, 1}


def test_eptree_cuts_steps_after_growing() -> None:
    tree = grow(LONG, method="eptree", initial_branches=3, nodes_per_round=2, rounds=4, branches_per_node=2)
    assert len(tree.leaves()) == 3 * (1 + 3 * 2 * 2) == tree.notes["ib"]._cells[tree.root].leaves
    assert all(len(node) == 1 for node in tree.nodes()[1:])
    assert SearchConfig(method="eptree", nodes_per_round=2, rounds=2).trajectories == 12


def test_eptree_without_rounds_or_without_room_is_chains() -> None:
    assert paths(grow(method="eptree", rounds=1)) == paths(grow(method="independent", group_size=4))
    assert paths(grow(method="eptree", rounds=5, deepest_share=0.01)) == paths(grow(method="independent", group_size=4))


# ---- TreePO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "branched"),
    [
        (1, []),
        (2, []),
        (3, [1]),  # one of the two paths has a second child at the first boundary
        (4, [1, 1]),
        (8, [1, 1, 2, 2, 2, 2]),
        (11, [1, 1, 2, 2, 2, 2, 3, 3, 3]),  # three of the eight
    ],
)
def test_treepo_doubles_at_every_boundary(width: int, branched: list[int]) -> None:
    """Paths of eight tokens in segments of two: boundaries at 2, 4 and 6."""
    tree = grow(LONG, method="treepo", group_size=width, segment_tokens=2)
    assert len(tree.leaves()) == width
    assert len(tree.root.children) == min(width, 2)
    assert [(node.end - 1) // 2 for _, node, _ in tree.notes["branched"]] == branched
    assert all(len(node) == 2 and len(node.children) <= 2 for node in tree.nodes()[1:])
    assert len(tree.notes["iid_leaves"]) == min(width, 2)


def test_treepo_falls_back_to_random_earlier_boundaries() -> None:
    """Paths of one boundary are full at four; what is left of the width begins at boundaries or the prompt."""
    starts: set[int] = set()
    for key in range(20):
        tree = grow(method="treepo", group_size=7, segment_tokens=2, key=key)
        assert len(tree.leaves()) == 7
        assert [turn for turn, _, _ in tree.notes["branched"]] == [1, 1, 2, 2, 2]
        [first, second, third] = [node for turn, node, _ in tree.notes["branched"] if turn == 2]
        assert first is second  # two children at a boundary
        starts |= {first.end, third.end}
    assert starts == {1, 3}


def test_segments_as_long_as_a_trajectory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"search\.segment_tokens: 512 must be below sampling\.max_tokens=512"):
        TrainConfig(search=SearchConfig(method="treepo"), sampling=SamplingConfig(max_tokens=512))


def test_treepo_without_boundaries_is_chains() -> None:
    tree = grow(method="treepo", group_size=5, segment_tokens=100)
    assert len(tree.root.children) == len(tree.leaves()) == 5


# ---- Tree-GRPO -----------------------------------------------------------------------------------------------


def test_tree_grpo_grows_m_trees_of_k_leaves() -> None:
    budget = {"method": "tree-grpo", "initial_branches": 2, "nodes_per_round": 2, "rounds": 2}
    reached: set[int] = set()
    for key in range(20):
        tree = grow(**budget, key=key)  # type: ignore[arg-type]
        groups = [leaf.notes["group"] for leaf in tree.leaves()]
        assert [groups.count(i) for i in range(2)] == [3, 3]  # (M, N, L, K) = (2, 2, 1, 3)
        for top in tree.root.children[:2]:  # whatever hangs below a chain's first step is of that chain's tree
            assert len({leaf.notes["group"] for leaf in top.leaves()}) == 1
        reached |= {node.end - 1 for _, node, _ in tree.notes["branched"]}
    assert reached == {0, 1, 2, 3}
    longer = grow(method="tree-grpo", initial_branches=2, nodes_per_round=2, rounds=6, branch_at_root=False)
    assert [{leaf.notes["group"] for leaf in top.leaves()} for top in longer.root.children] == [{0}, {1}]
    closed = grow(**budget, branch_at_root=False)  # type: ignore[arg-type]
    assert len(closed.root.children) == 2
    assert SearchConfig(**budget).trajectories == 6  # type: ignore[arg-type]


def test_tree_grpo_branches_a_node_more_than_once_where_there_are_too_few() -> None:
    """Chains of one step have no place but the prompt to branch at."""
    budget = {"initial_branches": 2, "nodes_per_round": 3, "rounds": 2}
    for at_root in (True, False):
        tree = grow(method="tree-grpo", splitter=lambda tokens: [], branch_at_root=at_root, **budget)
        assert tree.root.children == tree.leaves() and len(tree.leaves()) == 2 * (1 + 3)
        assert tree.notes["iid_leaves"] == tree.leaves()[:2]


def test_tree_grpo_without_rounds_is_chains() -> None:
    tree = grow(method="tree-grpo", initial_branches=5, rounds=1)
    assert paths(tree) == paths(grow(method="independent", group_size=5))
    assert sorted(leaf.notes["group"] for leaf in tree.leaves()) == [0, 1, 2, 3, 4]


# ---- VinePPO -------------------------------------------------------------------------------------------------


def test_vineppo_values_are_means_of_rollouts_that_are_gone() -> None:
    tree = grow(method="vineppo", group_size=2, value_rollouts=400)
    assert len(tree.leaves()) == len(tree.root.children) == 2
    # each of the prompt and, per chain, 3 inner steps has 400 rollouts to depth 4: 4*400 + 2*(3 + 2 + 1)*400
    assert tree.notes["auxiliary_tokens"] == 1600 + 4800
    assert tree_metrics([tree])["tokens_sampled"] == 8 + 6400
    assert tree_metrics([tree])["trajectories"] == 2
    mean = float(np.mean(POLICY.facts))
    for node in tree.nodes():
        if not node.is_leaf:
            right = all(token % 2 for token in node.prefix()[1:].tolist())
            assert node.notes["value"] == pytest.approx(right * mean ** (5 - node.end), abs=0.1)
        else:
            assert node.notes["value"] == node.reward


def test_vineppo_values_every_step_of_chains_of_different_lengths() -> None:
    cuts = iter([[], [1, 2, 3]])
    tree = grow(method="vineppo", group_size=2, value_rollouts=2, splitter=lambda tokens: next(cuts))
    assert [len(leaf.path()) for leaf in tree.leaves()] == [2, 5]
    assert all("value" in node.notes for node in tree.nodes())
    assert tree.notes["iid_leaves"] == tree.leaves()


def test_vineppo_rollouts_have_no_weight_in_the_loss() -> None:
    tree = grow(method="vineppo", group_size=3, value_rollouts=20, key=2)
    result = advantages(tree, "vineppo")
    assert not result.skipped
    batches = pack([result], LossConfig(), micro_batch_tokens=1000, max_tokens=100)
    assert sum(len(batch.targets) for batch in batches) == 12  # three chains of four tokens
    assert float(sum(batch.weight.sum() for batch in batches)) == pytest.approx(1.0)
    trained = [token for batch in batches for token in batch.targets.tolist()]
    assert sorted(trained) == sorted(token for node in tree.nodes()[1:] for token in node.tokens.tolist())


def test_vineppo_by_hand() -> None:
    tree = small_tree()
    for node, value in zip(tree.nodes(), (0.5, 0.75, 0.25, 1.0, 0.0, 0.0, 1.0), strict=True):
        node.notes["value"] = value
    assert advantages(tree, "vineppo").a.tolist() == [0, 0.25, -0.5, 0.75, -0.25, -0.25, 0.5]
    assert advantages(tree, "vineppo").a_trajectory is None


def test_vineppo_uses_values_where_rewards_are_equal_and_skips_equal_values() -> None:
    tree = chains((1.0, 1.0))
    for node, value in zip(tree.nodes(), (1.0, 0.5, 1.0, 1.0, 1.0), strict=True):
        node.notes["value"] = value
    result = advantages(tree, "vineppo")
    assert result.a.tolist() == [0, -0.5, 0.5, 0, 0] and not result.skipped
    for node in tree.nodes():
        node.notes["value"] = 1.0
    assert advantages(tree, "vineppo").skipped


def test_vineppo_needs_its_search() -> None:
    with pytest.raises(ValueError, match=r"needs the node values of search\.method=vineppo"):
        advantages(small_tree(), "vineppo")
    with pytest.raises(ValueError, match=r"advantage\.kind: vineppo needs the rollouts of search\.method=vineppo"):
        TrainConfig(advantage=AdvantageConfig(kind="vineppo"))


# ---- TreeRL's advantage --------------------------------------------------------------------------------------


def test_treerl_by_hand() -> None:
    # V: q 1/2, a and b 1/3 (one run, which branched off q), b1 1, b2 0, b3 0 (branched off b), c 1
    run = ((1 / 3 - 1 / 2) + (1 / 3 - 1 / 2)) / math.sqrt(3)
    right, wrong = (1 - 1 / 2) + (1 - 1 / 3), (0 - 1 / 2) + (0 - 1 / 3)
    result = advantages(small_tree(), "treerl")
    assert result.a == pytest.approx([0, run, run, right, wrong, wrong, 1.0])
    assert result.a_trajectory is None


def test_treerl_on_chains_is_twice_the_distance_to_the_mean() -> None:
    result = advantages(chains((1.0, 0.0, 0.0, 1.0)), "treerl")
    assert result.a.tolist() == [0, 1, 1, -1, -1, -1, -1, 1, 1]


# ---- TreePO's advantage --------------------------------------------------------------------------------------


def test_treepo_by_hand() -> None:
    # groups: q {1, 0, 0, 1} mean 1/2; a and b {1, 0, 0} mean 1/3 each; single leaves do not count
    raw = advantages(small_tree(), "treepo")
    assert raw.a_trajectory == pytest.approx(
        [(1 / 2 + 2 / 3 * 2) / 3, (-1 / 2 - 2 / 3) / 3, (-1 / 2 - 2 / 3) / 3, 1 / 2]
    )


def test_treepo_counts_a_group_for_its_own_trajectories_alone() -> None:
    """Depth first: q with leaves {1, 0, 1}, a lone leaf, b with {0, 1} and its two leaves."""
    begin, end = np.array([0, 0, 1, 1, 2]), np.array([3, 1, 3, 2, 3])
    by_hand = [1 / 3, (-2 / 3 - 1 / 2) / 2, (1 / 3 + 1 / 2) / 2]
    assert treepo(np.array([1.0, 0.0, 1.0]), begin, end) == pytest.approx(by_hand)


def test_treepo_on_chains_is_the_distance_to_the_mean() -> None:
    assert advantages(chains((1.0, 0.0, 0.0, 0.0)), "treepo").a_trajectory == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_treepo_is_whitened_over_the_tokens_of_the_batch() -> None:
    # (values, lengths): mean (3*1 + 1*0 + 2*(-1))/6 = 1/6, variance (3*1 + 2*1)/6 - 1/36 = 29/36
    first, second = whiten([np.array([1.0, 0.0]), np.array([-1.0])], [np.array([3, 1]), np.array([2])], 0.0)
    assert first == pytest.approx(np.array([5 / 6, -1 / 6]) / (math.sqrt(29) / 6))
    assert second == pytest.approx(np.array([-7 / 6]) / (math.sqrt(29) / 6))
    assert whiten([], [], 0.0) == []


def test_the_batch_changes_treepo_alone_and_leaves_skipped_trees_out() -> None:
    trees = [small_tree(), chains((0.0, 0.0)), chains((1.0, 0.0, 0.0))]
    config = AdvantageConfig(kind="treepo", std_eps=0.0)
    before = [advantage(tree.export(), tree.notes["ib"], config) for tree in trees]
    after = over_batch(before, config)
    assert [one.skipped for one in after] == [False, True, False]
    assert after[1] is before[1]
    values = np.concatenate([after[i].a_trajectory for i in (0, 2)])
    lengths = np.concatenate([after[i].lengths for i in (0, 2)])
    assert np.average(values, weights=lengths) == pytest.approx(0.0)
    assert np.average(values**2, weights=lengths) == pytest.approx(1.0)
    plain = AdvantageConfig(kind="grpo")
    untouched = [advantage(tree.export(), tree.notes["ib"], plain) for tree in trees]
    assert all(one is other for one, other in zip(over_batch(untouched, plain), untouched, strict=True))


# ---- Tree-GRPO's advantage -----------------------------------------------------------------------------------


def test_tree_grpo_by_hand() -> None:
    rewards, groups = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0, 0, 0, 1, 1, 1])
    # all: mean 2/3, std sqrt(2)/3, z = 1/sqrt(2) or -sqrt(2); first tree: mean 1/3, std sqrt(2)/3; second: all equal
    root = math.sqrt(2)
    right, wrong = 1 / root, -root
    by_hand = [right + root, wrong - 1 / root, wrong - 1 / root, right, right, right]
    assert tree_grpo(rewards, groups, eps=0.0, ddof=0) == pytest.approx(by_hand)
    assert tree_grpo(rewards, groups, eps=0.0, ddof=None) == pytest.approx([1, -1, -1, 1 / 3, 1 / 3, 1 / 3])


def test_tree_grpo_reads_the_trees_off_the_leaves() -> None:
    tree = small_tree()
    for leaf, group in zip(tree.leaves(), (0, 0, 1, 1), strict=True):
        leaf.notes["group"] = group  # rewards 1, 0 | 0, 1: z = 1, -1 | -1, 1, and the same among all four
    assert advantages(tree, "tree-grpo", std_eps=0.0).a_trajectory == pytest.approx([2, -2, -2, 2])


def test_tree_grpo_of_trees_of_one_chain_is_grpo() -> None:
    tree = chains((1.0, 0.0, 0.0))
    for i, leaf in enumerate(tree.leaves()):
        leaf.notes["group"] = i
    grpo = advantages(tree, "grpo").a_trajectory
    assert advantages(tree, "tree-grpo").a_trajectory == pytest.approx(grpo)


@pytest.mark.parametrize("kind", ["treerl", "treepo", "tree-grpo"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_say_nothing(kind: str, reward: float) -> None:
    result = advantages(small_tree((reward,) * 4), kind)
    assert result.skipped and not result.a.any()
    assert not advantages(small_tree((reward,) * 4), kind, uniform_groups="ib_only").skipped


# ---- end to end ----------------------------------------------------------------------------------------------

RIVALS = [
    "random-tree", "treerl", "treepo", "tree-grpo", "vineppo", "ibtree-grpo", "ib-adv-only", "random+ib-adv",
    "eptree+ib-adv", "ib-tpo+",
]  # fmt: skip
TINY = [
    "--digits.min-ops", "2", "--digits.max-ops", "3", "--digits.grade", "last", "--sampled-tokens", "1",
    "--prompts-per-step", "4", "--mini-batches", "1", "--sampling.max-tokens", "24", "--eval.prompts", "1",
    "--eval.samples", "1", "--optim.lr", "1e-3", "--optim.warmup-steps", "1", "--search.segment-tokens", "4",
]  # fmt: skip


@pytest.mark.parametrize("method", ["eptree", "treepo", "tree-grpo", "vineppo"])
def test_an_engine_grows_the_trees_and_keeps_nothing(method: str) -> None:
    """On a pool too small for all branches at once; VinePPO's rollouts are dropped while other trees grow."""
    config = SearchConfig(method=method, rounds=3, segment_tokens=4, value_rollouts=2)  # type: ignore[arg-type]
    search = make_search(config, IBConfig(), one_token_steps, 16)
    engine = Engine(tiny_model(), kv_tokens=1024)
    prompts = [prompt_of(6, seed=i) for i in range(3)]

    def reward(tree: Tree, leaf: Node) -> float:
        return float(leaf.tokens[-1] % 2)

    before = engine.stats()["computed"]
    trees = [tree for _, tree in engine.run(search, prompts, Sampling(max_tokens=16), reward=reward)]
    assert len(trees) == 3
    assert all(len(tree.leaves()) == config.trajectories for tree in trees)
    sampled = sum(tree.num_sampled + tree.notes.get("auxiliary_tokens", 0) for tree in trees)
    assert engine.stats()["computed"] - before >= sampled - sum(len(tree.leaves()) for tree in trees)
    assert_idle(engine)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy warm-started just so far that it ends its lines and is right now and then."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start") / "run"
    warm = ["--warm-start.max-updates", "90", "--warm-start.decay-updates", "20"]
    assert main(["train", "--out", str(folder), *TINY, *warm]) == 0
    return folder / "checkpoints" / "step-000000"


@pytest.mark.parametrize("preset", RIVALS)
def test_every_preset_takes_a_training_step(preset: str, start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(["train", "--preset", preset, "--model", str(start), "--out", str(folder), *TINY]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if "tokens_sampled" in row]
    assert row["optimizer_steps"] == 1
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    assert row["tokens_trained"] > 0 and row["trajectories"] > 4
    if preset == "vineppo":
        assert row["tokens_sampled"] > row["trajectory_tokens"]
