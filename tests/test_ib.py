"""The IB estimates against arithmetic done by hand and against a recomputation from scratch."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from engine_helpers import work
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import chain, estimate, fill, random_trajectories

from ibtpo.config import IBConfig
from ibtpo.ib import IBEstimates, step_probability
from ibtpo_engine.tree import Node, Tree

CONFIGS = st.builds(
    IBConfig,
    beta=st.sampled_from([0.5, 5.0]),
    step_probability=st.sampled_from(["geometric", "product", "mean", "min"]),
    zero_parent=st.sampled_from(["one", "zero", "smooth"]),
    value=st.sampled_from(["leaf_mean", "recursive", "shrunk"]),
    shrinkage=st.sampled_from([0.0, 0.5, 3.0]),
    duplicates=st.sampled_from(["separate", "merge"]),
)


def small_tree() -> tuple[Tree, list[list[Node]]]:
    """root - a - (a1 right, a2 wrong), root - b (wrong); step probabilities are powers of two."""
    half = math.log(0.5)
    tree = Tree([1, 2])
    first = chain(tree.root, [([3, 4], half), ([5], half)], 1.0)  # a, a1: pi = 1/2 each
    second = chain(first[0], [([6], 2 * half)], 0.0)  # a2: pi = 1/4
    third = chain(tree.root, [([7, 8], [half, 3 * half])], 0.0)  # b: geometric mean of 1/2 and 1/8 is 1/4
    return tree, [first, second, third]


def test_hand_computed_leaf_means():
    tree, trajectories = small_tree()
    (a, a1), (a2,), (b,) = trajectories
    ib = estimate(tree, trajectories)  # beta 5: offset 1 + 1/5 = 1.2
    assert [ib.value(node) for node in (tree.root, a, a1, a2, b)] == pytest.approx([1 / 3, 1 / 2, 1, 0, 0])
    # a: (1/2)/(1/3) = 1.5; a1: 1/(1/2) = 2; a2 and b: 0; each minus 1.2
    assert [ib.eta1(node) for node in (a, a1, a2, b)] == pytest.approx([0.3, 0.8, -1.2, -1.2])
    assert [ib.eta2(node) for node in (a, a1, a2, b)] == pytest.approx([0.5, 0.5, 0.25, 0.25])
    assert ib.score(tree.root) == pytest.approx(6 / 2 * (0.3 * 0.5 - 1.2 * 0.25))  # -0.45
    assert ib.score(a) == pytest.approx(6 / 2 * (0.8 * 0.5 - 1.2 * 0.25))  # 0.3
    # eta1 at the root: mean -0.45, deviations +-0.75; eta2: mean 0.375, deviations +-0.125
    assert ib.covariance(tree.root) == pytest.approx(0.75 * 0.125)


def test_hand_computed_recursive_values():
    tree, trajectories = small_tree()
    (a, _), *_ = trajectories
    ib = estimate(tree, trajectories, IBConfig(value="recursive"))
    assert ib.value(a) == pytest.approx(1 / 2)
    assert ib.value(tree.root) == pytest.approx((1 / 2 + 0) / 2)  # not 1/3: each child is one draw
    assert ib.eta1(a) == pytest.approx(2 - 1.2)
    assert ib.score(tree.root) == pytest.approx(6 / 2 * (0.8 * 0.5 - 1.2 * 0.25))


def test_hand_computed_shrunk_values():
    """k = 2: the prompt keeps 1/3, a = (1 + 2/3)/4 = 5/12, a1 = (1 + 5/6)/3, a2 = (0 + 5/6)/3, b = (0 + 2/3)/3."""
    tree, trajectories = small_tree()
    (a, a1), (a2,), (b,) = trajectories
    ib = estimate(tree, trajectories, IBConfig(value="shrunk", shrinkage=2.0))
    assert [ib.value(n) for n in (tree.root, a, a1, a2, b)] == pytest.approx([1 / 3, 5 / 12, 11 / 18, 5 / 18, 2 / 9])
    # ratios a 5/4, b 2/3 and a1 22/15, a2 2/3, each minus 1.2
    assert [ib.eta1(n) for n in (a, b, a1, a2)] == pytest.approx([0.05, 2 / 3 - 1.2, 22 / 15 - 1.2, 2 / 3 - 1.2])
    assert ib.score(tree.root) == pytest.approx(3 * (0.05 * 0.5 + (2 / 3 - 1.2) * 0.25))
    assert ib.score(a) == pytest.approx(3 * ((22 / 15 - 1.2) * 0.5 + (2 / 3 - 1.2) * 0.25), abs=1e-6)


def test_a_shrunk_value_follows_its_parent_when_a_leaf_is_added_elsewhere():
    tree, trajectories = small_tree()
    (b,) = trajectories[2]
    ib = estimate(tree, trajectories, IBConfig(value="shrunk", shrinkage=1.0))
    assert ib.value(b) == pytest.approx((0 + 1 / 3) / 2)
    ib.add_leaf(chain(tree.root, [([9], -1.0)], 1.0))
    assert ib.value(b) == pytest.approx((0 + 1 / 2) / 2)


def test_shrunk_values_are_computed_when_asked_for_not_for_each_trajectory():
    tree, trajectories = random_trajectories(Random(3), leaves=50)
    shrunk, plain = (IBEstimates(tree, IBConfig(value=value)) for value in ("shrunk", "leaf_mean"))
    spent, usual = (work(lambda ib=ib: [ib.add_leaf(steps) for steps in trajectories]) for ib in (shrunk, plain))
    assert spent < 1.1 * usual
    assert work(lambda: [shrunk.value(node) for node in tree.nodes()]) < usual


def test_shrinkage_of_zero_is_the_leaf_mean():
    tree, trajectories = random_trajectories(Random(3), leaves=7)
    shrunk, plain = (
        estimate(tree, trajectories, config) for config in (IBConfig(value="shrunk", shrinkage=0.0), IBConfig())
    )
    assert [shrunk.value(node) for node in tree.nodes()] == [plain.value(node) for node in tree.nodes()]
    assert dict(shrunk.branching()) == dict(plain.branching())


def test_hand_computed_standard_errors():
    """eta1*eta2: prompt .15, -.3; a .4, -.3. Squared deviations .10125 and .245, pooled over 1 + 1 degrees."""
    tree, trajectories = small_tree()
    a = trajectories[0][0]
    ib = estimate(tree, trajectories, IBConfig(score_bonus=0.5))
    pooled = (0.10125 + 0.245) / 2
    expected = {tree.root: 6 * math.sqrt((0.10125 + pooled) / 2 / 2), a: 6 * math.sqrt((0.245 + pooled) / 2 / 2)}
    assert dict(ib.branching()) == pytest.approx({node: ib.score(node) + 0.5 * e for node, e in expected.items()})
    plain = estimate(tree, trajectories)
    assert dict(plain.branching()) == {tree.root: plain.score(tree.root), a: plain.score(a)}


def test_a_node_with_one_child_has_the_pooled_error_and_a_chain_has_none():
    tree, trajectories = small_tree()
    trajectories.append(chain(tree.root, [([9], math.log(0.25)), ([10], math.log(0.25))], 0.0))
    ib = estimate(tree, trajectories, IBConfig(score_bonus=1.0))
    (only_child, _) = trajectories[-1]
    # the prompt's ratios are now 2, 0, 0 (value 1/4): .8*.5, -1.2*.25 twice; a's are .4, -.3 as before
    pooled = (0.49 * 2 / 3 + 0.245) / (2 + 1)
    assert dict(ib.branching())[only_child] - ib.score(only_child) == pytest.approx(6 * math.sqrt(pooled))
    alone = Tree([1])
    lonely = estimate(alone, [chain(alone.root, [([2], -1.0), ([3], -1.0)], 1.0)], IBConfig(score_bonus=1.0))
    assert dict(lonely.branching())[alone.root] == lonely.score(alone.root)


def test_hand_computed_balanced_beta():
    """The tree of the test above. Gain g: prompt (.5 - .25 - .25)/3, a (.5 - .25)/2, d 0; confidence 1/3, 3/8, 1/4."""
    tree, trajectories = small_tree()
    trajectories.append(chain(tree.root, [([9], math.log(0.25)), ([10], math.log(0.25))], 0.0))
    a, d = trajectories[0][0], trajectories[-1][0]
    ib = estimate(tree, trajectories, IBConfig(score_beta="balanced"))
    beta = math.sqrt((1 / 72**2 + 1 / 18**2 + 5**2 / 72**2) / (2 / 24**2 + 1 / 12**2))  # std(confidence)/std(g), 0.88
    assert ib.ranking_beta() == pytest.approx(beta, rel=1e-6)
    expected = {tree.root: 0 - 1 / 3 / beta, a: 1 / 8 - 3 / 8 / beta, d: 0 - 1 / 4 / beta}
    assert dict(ib.branching()) == pytest.approx({node: (1 + beta) * j for node, j in expected.items()}, rel=1e-5)
    assert ib.score(a) == pytest.approx(6 * (1 / 8 - 3 / 8 / 5))  # what is logged keeps the configured beta


def test_a_tree_without_evidence_is_ranked_at_the_configured_beta():
    tree, trajectories = small_tree()  # the mean confidence is 3/8 at both nodes
    assert estimate(tree, trajectories, IBConfig(score_beta="balanced")).ranking_beta() == 5.0
    for reward in (0.0, 1.0):
        tree = Tree([1])
        steps = chain(tree.root, [([2], math.log(0.25)), ([3], math.log(0.8))], reward)
        ib = estimate(tree, [steps], IBConfig(score_beta="balanced"))
        assert ib.ranking_beta() == 5.0
        assert dict(ib.branching()) == {tree.root: ib.score(tree.root), steps[0]: ib.score(steps[0])}
    assert IBEstimates(Tree([1]), IBConfig(score_beta="balanced")).ranking_beta() == 5.0


@pytest.mark.parametrize(("rule", "ratio"), [("one", 1.0), ("zero", 0.0), ("smooth", (1 / 3) / (1 / 4))])
def test_a_parent_of_value_zero(rule, ratio):
    """smooth is Laplace's (sum + 1)/(n + 2) on both values: child (0 + 1)/(1 + 2), parent (0 + 1)/(2 + 2)."""
    tree = Tree([1])
    trajectories = [chain(tree.root, [([2], -1.0)], 0.0), chain(tree.root, [([3], -1.0)], 0.0)]
    ib = estimate(tree, trajectories, IBConfig(zero_parent=rule))
    assert ib.eta1(trajectories[0][0]) == pytest.approx(ratio - 1.2)
    assert ib.value(tree.root) == 0.0  # the value itself is never smoothed


def test_smoothing_applies_to_every_ratio():
    tree, trajectories = small_tree()
    ib = estimate(tree, trajectories, IBConfig(zero_parent="smooth"))
    # a: (1 + 1)/(2 + 2) = 1/2 over the root's (1 + 1)/(3 + 2) = 2/5
    assert ib.eta1(trajectories[0][0]) == pytest.approx(1.25 - 1.2)


def test_one_child_scores_by_its_confidence_alone():
    """A ratio of 1 leaves -(1 + beta)/beta * pi: the least confident next step wins among unbranched nodes."""
    for reward in (0.0, 1.0):
        tree = Tree([1])
        ib = estimate(tree, [chain(tree.root, [([2], math.log(0.25)), ([3], math.log(0.8))], reward)])
        assert ib.score(tree.root) == pytest.approx(-6 / 5 * 0.25)
        assert ib.score(tree.root.children[0]) == pytest.approx(-6 / 5 * 0.8)


def test_step_probabilities():
    logprob = np.log([0.5, 0.125])
    expected = {"geometric": 0.25, "product": 0.0625, "mean": 0.3125, "min": 0.125}
    assert {kind: step_probability(logprob, kind) for kind in expected} == pytest.approx(expected)


def test_merged_duplicates_pool_their_leaves_and_keep_their_multiplicity():
    half = math.log(0.5)
    tree = Tree([1])
    trajectories = [
        chain(tree.root, [([2], half), ([3], half)], 1.0),
        chain(tree.root, [([2], half), ([4], half)], 0.0),
        chain(tree.root, [([5], 2 * half)], 0.0),
    ]
    (a, _), (a_again, _), _ = trajectories
    ib = estimate(tree, trajectories, IBConfig(duplicates="merge"))
    assert ib.value(a) == ib.value(a_again) == pytest.approx(1 / 2)  # one right of two
    # ratio (1/2)/(1/3) = 1.5 twice, 0 once
    assert ib.score(tree.root) == pytest.approx(6 / 3 * (2 * 0.3 * 0.5 - 1.2 * 0.25), abs=1e-6)
    # below a: both next steps, ratios 2 and 0
    assert ib.score(a) == ib.score(a_again) == pytest.approx(6 / 2 * (0.8 * 0.5 - 1.2 * 0.5), abs=1e-6)
    assert [node for node, _ in ib.branching()] == [tree.root, a]
    apart = estimate(tree, trajectories)
    assert [apart.value(a), apart.value(a_again)] == [1.0, 0.0]


def brute_force(tree: Tree, config: IBConfig) -> dict[Node, tuple[float, float, float]]:
    """(value, score, covariance) of every node, from the tree alone; NaN where there are no children."""
    merged = config.duplicates == "merge"

    def same(node: Node) -> list[Node]:  # all nodes with the same steps above them and the same tokens
        if node.parent is None or not merged:
            return [node]
        aunts = [child for parent in same(node.parent) for child in parent.children]
        return [other for other in aunts if other.tokens.tolist() == node.tokens.tolist()]

    def children(node: Node) -> list[Node]:
        return [child for twin in same(node) for child in twin.children]

    def rewards(node: Node) -> list[float]:
        return [leaf.reward for twin in same(node) for leaf in twin.leaves()]

    def value(node: Node) -> float:
        if config.value == "leaf_mean":
            return float(np.mean(rewards(node)))
        if config.value == "shrunk":
            k = 0.0 if node.parent is None else config.shrinkage
            prior = 0.0 if node.parent is None else value(node.parent)
            return (sum(rewards(node)) + k * prior) / (len(rewards(node)) + k)
        ends = [twin.reward for twin in same(node) if twin.is_leaf]
        return float(np.mean([value(child) for child in children(node)] + ends))

    def ratio(child: Node, parent: Node) -> float:
        if config.zero_parent == "smooth":
            smoothed = [(value(n) * len(rewards(n)) + 1) / (len(rewards(n)) + 2) for n in (child, parent)]
            return smoothed[0] / smoothed[1]
        if value(parent) == 0:
            return 1.0 if config.zero_parent == "one" else 0.0
        return value(child) / value(parent)

    def pi(node: Node) -> float:
        p = np.exp(node.logprob.astype(np.float64))
        return float({
            "geometric": np.prod(p) ** (1 / len(p)), "product": np.prod(p), "mean": np.mean(p), "min": np.min(p)
        }[config.step_probability])  # fmt: skip

    result = {}
    for node in tree.nodes():
        eta1 = [ratio(child, node) - (1 + 1 / config.beta) for child in children(node)]
        eta2 = [pi(child) for child in children(node)]
        score = covariance = math.nan
        if eta1:
            score = (1 + config.beta) * float(np.mean(np.multiply(eta1, eta2)))
            covariance = float(np.cov(eta1, eta2, ddof=0)[0, 1])
        result[node] = (value(node), score, covariance)
    return result


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9), CONFIGS, st.booleans())
def test_incremental_estimates_equal_a_recomputation_from_scratch(rng, leaves, config, binary):
    """After every added trajectory; two tokens only, so that duplicates occur."""
    tree, trajectories = random_trajectories(
        Random(rng.random()), leaves=leaves, max_steps=3, max_length=1, vocabulary=2, binary=binary
    )
    for node in tree.nodes():  # the same step has the same probability
        node.logprob[:] = [-0.3 - 0.5 * token for token in node.tokens]
    ib = estimate(tree, trajectories, config)
    for node, (value, score, covariance) in brute_force(tree, config).items():
        assert ib.value(node) == pytest.approx(value)
        if node.children:
            assert ib.score(node) == pytest.approx(score, abs=1e-12)
            assert ib.covariance(node) == pytest.approx(covariance, abs=1e-12)


def test_a_fork_inside_a_counted_step_is_refused():
    tree = Tree([1])
    (step,) = chain(tree.root, [([2, 3, 4], -1.0)], 1.0)
    ib = estimate(tree, [[step]])
    branch = fill(step.fork(at=1)[0], [5], reward=0.0)
    with pytest.raises(ValueError, match="fork at the ends of nodes only"):
        ib.add_leaf([branch])
    below = fill(tree.root.fork()[0], [6], reward=0.0)
    ib.add_leaf([below])  # the root was not cut
    assert ib.value(tree.root) == 0.5


def test_a_branch_below_a_step_that_was_cut_later_is_refused():
    tree = Tree([1])
    steps = chain(tree.root, [([2, 3, 4], -1.0), ([5], -1.0)], 1.0)
    ib = estimate(tree, [steps])
    steps[0].split(1)
    with pytest.raises(ValueError, match="fork at the ends of nodes only"):
        ib.add_leaf([fill(steps[0].fork()[0], [6], reward=0.0)])


@pytest.mark.parametrize("reward", [None, -0.1, 1.5, math.nan])
def test_rewards_must_lie_in_the_unit_interval(reward):
    tree = Tree([1])
    leaf = fill(tree.root.fork()[0], [2])
    leaf.reward = reward
    with pytest.raises(ValueError, match="reward"):
        IBEstimates(tree, IBConfig()).add_leaf([leaf])


def test_a_trajectory_counts_once_and_questions_without_an_answer_are_refused():
    tree, trajectories = small_tree()
    ib = estimate(tree, trajectories)
    with pytest.raises(ValueError, match="counted already"):
        ib.add_leaf(trajectories[0])
    with pytest.raises(ValueError, match="the root is the prompt"):
        ib.eta1(tree.root)
    with pytest.raises(ValueError, match="no children"):
        ib.score(trajectories[2][0])
