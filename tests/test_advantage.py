"""Advantages against arithmetic done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from trees import chain, estimate

from ibtpo.advantage import advantage
from ibtpo.config import AdvantageConfig, IBConfig
from ibtpo_engine.tree import Node, Tree


def small_tree(rewards: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> tuple[Tree, list[list[Node]]]:
    """Packed order: prompt, a, a1, a2, b; a has two trajectories below it, b is one."""
    half = math.log(0.5)
    tree = Tree([1, 2])
    first = chain(tree.root, [([3, 4], half), ([5], half)], rewards[0])
    second = chain(first[0], [([6], 2 * half)], rewards[1])
    third = chain(tree.root, [([7, 8], 2 * half)], rewards[2])
    return tree, [first, second, third]


def of(rewards=(1.0, 0.0, 0.0), *, ib: IBConfig | None = None, reference=None, **config: object):
    tree, trajectories = small_tree(rewards)
    estimates = estimate(tree, trajectories, ib)
    return advantage(tree.export(), estimates, AdvantageConfig(**config), reference_logprob=reference)


def test_hand_computed_ib_tpo():
    result = of(std_eps=0.0, ib_weight=0.1)
    std = math.sqrt(2) / 3  # of (1, 0, 0): sqrt(1/3 - 1/9)
    # values: prompt 1/3, a 1/2, a1 1, a2 0, b 0
    assert result.a_gl == pytest.approx(np.array([0, 1 / 6, 2 / 3, -1 / 3, -1 / 3]) / std)
    # eta1: a (1/2)/(1/3) - 1.2 = .3, a1 2 - 1.2 = .8, a2 and b -1.2; eta2: 1/2, 1/2, 1/4, 1/4
    assert result.a_ib == pytest.approx([0, 0.15, 0.4, -0.3, -0.3])
    assert result.a == pytest.approx(result.a_gl + 0.1 * result.a_ib)
    assert result.a_trajectory is None and not result.skipped


def test_hand_computed_grpo():
    result = of(kind="grpo", std_eps=0.0)
    scale = math.sqrt(2) / 3
    assert result.a_trajectory == pytest.approx(np.array([2 / 3, -1 / 3, -1 / 3]) / scale)
    assert result.a == pytest.approx(np.array([0, 1 / 6, 2 / 3, -1 / 3, -1 / 3]) / scale)  # means over trajectories


def test_trajectories_through_each_node():
    result = of()
    assert result.multiplicity.tolist() == [3, 2, 1, 1, 1]
    assert result.leaf_begin.tolist() == [0, 0, 0, 1, 2]
    assert result.lengths.tolist() == [3, 3, 2]
    assert result.sum_leaves(np.array([1.0, 10.0, 100.0])).tolist() == [111, 11, 1, 10, 100]


def test_shared_tokens_meet_positive_and_negative_trajectories_apart():
    result = of(kind="grpo", std_eps=0.0)
    mass, positive, negative, positive_weight, negative_weight = result.weigh(np.array([1.0, 2.0, 4.0]))
    scale = math.sqrt(2) / 3
    assert mass.tolist() == [7, 3, 1, 2, 4]
    assert positive[1:] == pytest.approx(np.array([2 / 3, 2 / 3, 0, 0]) / scale)
    assert negative[1:] == pytest.approx(np.array([-2 / 3, 0, -2 / 3, -4 / 3]) / scale)
    assert positive_weight[1:].tolist() == [1, 1, 0, 0] and negative_weight[1:].tolist() == [2, 0, 2, 4]
    steps = of()
    mass, positive, negative, positive_weight, negative_weight = steps.weigh(np.ones(3))
    assert positive + negative == pytest.approx(mass * steps.a)  # a step has one advantage
    assert (positive * negative == 0).all()
    assert (positive_weight == mass * (steps.a > 0)).all() and (negative_weight == mass * (steps.a < 0)).all()


def test_standard_deviations():
    population = of(kind="grpo", std_eps=0.5)
    sample = of(kind="grpo", std_eps=0.0, std="sample")
    assert population.a_trajectory[0] == pytest.approx((2 / 3) / (math.sqrt(2) / 3 + 0.5))
    assert sample.a_trajectory[0] == pytest.approx((2 / 3) / math.sqrt(1 / 3))  # (4/9 + 1/9 + 1/9) / (3 - 1) = 1/3
    assert of(kind="grpo", std="none").a_trajectory == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert of(std="none").a_gl == pytest.approx([0, 1 / 6, 2 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_groups_of_equal_rewards(reward, std):
    assert of((reward,) * 3, std=std).skipped
    alone = of((reward,) * 3, std=std, uniform_groups="ib_only")
    assert not alone.skipped and not alone.a_gl.any()
    # every ratio is 1, so A_IB is -pi/beta: a pure entropy bonus
    assert alone.a == pytest.approx(0.1 * np.array([0, -0.5, -0.5, -0.25, -0.25]) / 5)
    assert not of((reward,) * 3, kind="grpo", uniform_groups="ib_only").a_trajectory.any()


def test_a_single_trajectory_has_no_deviation():
    tree = Tree([1])
    trajectories = [chain(tree.root, [([2], -1.0)], 1.0)]
    assert advantage(tree.export(), estimate(tree, trajectories), AdvantageConfig(std="sample")).skipped


def test_reference_confidence():
    reference = np.log([1, 1, 0.5, 0.125, 0.25, 0.125, 1, 0.25])  # prompt, a, a1, a2, b
    result = of(pi_ref="reference", reference=reference)
    assert result.a_ib == pytest.approx([0, 0.3 * 0.25, 0.8 * 0.25, -1.2 * 0.125, -1.2 * 0.5])
    with pytest.raises(ValueError, match="reference_logprob for all 8 tokens"):
        of(pi_ref="reference")


def test_recursive_values_enter_both_terms():
    result = of(ib=IBConfig(value="recursive"), std_eps=0.0)  # prompt: (1/2 + 0)/2 = 1/4
    std = math.sqrt(2) / 3
    assert result.a_gl == pytest.approx(np.array([0, 1 / 4, 3 / 4, -1 / 4, -1 / 4]) / std)
    assert result.a_ib[1] == pytest.approx((2 - 1.2) / 2)


def test_a_tree_without_trajectories_is_refused():
    tree = Tree([1])
    with pytest.raises(ValueError, match="no finished trajectory"):
        advantage(tree.export(), estimate(tree, []), AdvantageConfig())
