"""Step-level advantages (paper, section 4) and GRPO's group-relative advantages, on a packed tree.

    A_GL(s) = (phat(s) - phat(q)) / (std({R}) + eps)                                  global: against the root
    A_IB(s) = (phat(s)/phat(parent) - (1 + 1/beta)) * pi_ref(s)  =  eta1(s) * pi_ref(s)   local: against the parent
    A(s)    = A_GL(s) + lambda * A_IB(s)                                              the same for every token of s

IB-TPO's A belongs to a step, GRPO's to a trajectory. A token shared by several trajectories gets the advantages of all
of them, and the clipped objective is linear in the positive and in the negative part of an advantage::

    -min(r*A, clip(r)*A) = -( max(A, 0) * min(r, 1 + clip_high)  +  min(A, 0) * max(r, 1 - clip_low) )

so the loss needs only two sums a token in either case: see `NodeAdvantage.weigh`. The formulas of the other methods
(`treerl` and `vineppo` for steps, `treepo` and `tree-grpo` for trajectories) are in `ibtpo/advantages/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ibtpo.advantages.tree_grpo import deviation, tree_grpo
from ibtpo.advantages.treepo import treepo, whiten
from ibtpo.advantages.treerl import treerl
from ibtpo.advantages.vineppo import vineppo
from ibtpo.config import AdvantageConfig
from ibtpo.ib import IBEstimates, step_probability
from ibtpo_engine.export import PackedTree

Doubles = npt.NDArray[np.float64]
Reals = npt.NDArray[np.floating[Any]]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class NodeAdvantage:
    """The advantages of one tree; arrays [S] have an entry for each of ``packed.nodes``, 0 for the prompt.

    The G trajectories are numbered in the order of their leaves in `packed.nodes`, so those through a node are a range.

    Attributes:
        packed: the tree.
        a_gl, a_ib: float64 [S], the global and the local part as in the paper.
        a: float64 [S], advantage of a step's tokens: A_GL + lambda*A_IB, or for GRPO the mean over its trajectories.
        a_trajectory: float64 [G], set if advantages belong to trajectories (as GRPO's do); `a` is for display then.
        leaf_begin, leaf_end: int64 [S]; the trajectories through a node are [leaf_begin, leaf_end).
        lengths: int64 [G], sampled tokens of each trajectory.
        skipped: the group is dropped from loss and means, since all its rewards or values are equal.
    """

    packed: PackedTree
    a_gl: Doubles
    a_ib: Doubles
    a: Doubles
    a_trajectory: Doubles | None
    leaf_begin: Longs
    leaf_end: Longs
    lengths: Longs
    skipped: bool

    @property
    def multiplicity(self) -> Longs:
        """int64 [S], m: number of trajectories through each node."""
        return self.leaf_end - self.leaf_begin

    def sum_leaves(self, per_trajectory: Doubles) -> Doubles:
        """[G] -> [S], sums over the trajectories through each node."""
        bounds = np.stack([self.leaf_begin, self.leaf_end], axis=1).ravel()
        sums = np.add.reduceat(np.append(per_trajectory, 0.0), bounds)[::2]
        return np.where(self.multiplicity > 0, sums, 0.0)  # for an empty range reduceat returns an element

    def weigh(self, weight: Doubles) -> tuple[Doubles, Doubles, Doubles, Doubles, Doubles]:
        """Sums of w_i, w_i*max(A_i, 0) and w_i*min(A_i, 0) over the trajectories i through each node.

        For metrics also the sums of w_i over those with A_i > 0, and over those with A_i < 0.

        Args:
            weight: [G], w_i, the weight of one token of trajectory i in the loss.

        Returns:
            five float64 [S].
        """
        mass = self.sum_leaves(weight)
        if self.a_trajectory is None:
            of_step = (np.maximum(self.a, 0.0), np.minimum(self.a, 0.0), self.a > 0, self.a < 0)
            return mass, mass * of_step[0], mass * of_step[1], mass * of_step[2], mass * of_step[3]
        a = self.a_trajectory
        positive, negative = (self.sum_leaves(weight * part) for part in (np.maximum(a, 0.0), np.minimum(a, 0.0)))
        return mass, positive, negative, self.sum_leaves(weight * (a > 0)), self.sum_leaves(weight * (a < 0))


def advantage(
    packed: PackedTree,
    estimates: IBEstimates,
    config: AdvantageConfig,
    *,
    reference_logprob: Reals | None = None,
) -> NodeAdvantage:
    """Advantages of every step, or of every trajectory, of a finished tree.

    Args:
        packed: the tree, as exported.
        estimates: its IB estimates, which the search left in ``tree.notes["ib"]``.
        config: kind, lambda, and the choices the paper leaves open.
        reference_logprob: [N], the frozen reference's log-prob of every token of `packed` (prompt entries unread);
            needed if ``config.pi_ref == "reference"``.

    Raises:
        ValueError: no finished trajectory, or the reference's log-probs are needed and missing.
    """
    leaves = [node for node in packed.nodes if node.is_leaf]
    if not leaves:
        raise ValueError("advantage: the tree has no finished trajectory")
    rewards = np.array([leaf.reward for leaf in leaves], np.float64)
    uniform = bool(rewards.min() == rewards.max())
    ddof = {"population": 0, "sample": 1, "none": None}[config.std]
    scale = math.inf if uniform else deviation(rewards, eps=config.std_eps, ddof=ddof)
    values = np.array([estimates.value(node) for node in packed.nodes])
    a_gl = (values - values[0]) / scale
    a_ib = _local(packed, estimates, config, reference_logprob)
    begin, end = _leaf_ranges(packed)
    steps = NodeAdvantage(
        packed=packed,
        a_gl=a_gl,
        a_ib=a_ib,
        a=a_gl + config.ib_weight * a_ib,
        a_trajectory=None,
        leaf_begin=begin,
        leaf_end=end,
        lengths=np.array([leaf.end for leaf in leaves]) - leaves[0].tree.prompt_len,
        skipped=uniform and config.uniform_groups == "skip",
    )
    if config.kind == "ib-tpo":
        return steps
    if config.kind == "treerl":
        below = steps.sum_leaves(rewards) / steps.multiplicity
        return replace(steps, a=treerl(packed, below, steps.multiplicity))
    if config.kind == "vineppo":
        a = vineppo(packed)
        return replace(steps, a=a, skipped=not a.any())  # equal rewards say nothing of the values
    if config.kind == "tree-grpo":
        groups = np.array([leaf.notes.get("group", 0) for leaf in leaves], np.int64)
        return _of_trajectories(steps, tree_grpo(rewards, groups, eps=config.std_eps, ddof=ddof))
    if config.kind == "treepo":
        return _of_trajectories(steps, treepo(rewards, begin, end))
    return _of_trajectories(steps, (rewards - rewards.mean()) / scale)


def _of_trajectories(steps: NodeAdvantage, a_trajectory: Doubles) -> NodeAdvantage:
    """Replace the advantages of steps by those of trajectories [G]; a node's `a` is the mean of its trajectories'."""
    mean = steps.sum_leaves(a_trajectory) / np.maximum(steps.multiplicity, 1)
    mean[0] = 0.0
    return replace(steps, a=mean, a_trajectory=a_trajectory)


def over_batch(advantages: Sequence[NodeAdvantage], config: AdvantageConfig) -> list[NodeAdvantage]:
    """Whiten TreePO's advantages over all trees of a training step; other kinds are returned unchanged.

    Skipped trees are neither counted nor changed.
    """
    if config.kind != "treepo":
        return list(advantages)
    kept = [one for one in advantages if not one.skipped]
    scaled = whiten([_trajectories(one) for one in kept], [one.lengths for one in kept], config.std_eps)
    of_kept = iter(scaled)
    return [one if one.skipped else _of_trajectories(one, next(of_kept)) for one in advantages]


def _trajectories(one: NodeAdvantage) -> Doubles:
    assert one.a_trajectory is not None
    return one.a_trajectory


def _local(
    packed: PackedTree, estimates: IBEstimates, config: AdvantageConfig, reference_logprob: Reals | None
) -> Doubles:
    """A_IB of every node, 0 for the prompt."""
    if config.pi_ref == "sampling":
        confidence = [estimates.eta2(node) for node in packed.nodes[1:]]
    elif reference_logprob is None or len(reference_logprob) != len(packed):
        raise ValueError(
            f"advantage: pi_ref=reference needs reference_logprob for all {len(packed)} tokens of the tree"
        )
    else:
        steps = np.split(reference_logprob, packed.first[1:])[1:]
        confidence = [step_probability(step, estimates.config.step_probability) for step in steps]
    gain = [estimates.eta1(node) for node in packed.nodes[1:]]
    return np.array([0.0, *(g * c for g, c in zip(gain, confidence, strict=True))])


def _leaf_ranges(packed: PackedTree) -> tuple[Longs, Longs]:
    """First and one-past-last trajectory through each node; in depth-first order a subtree's leaves are consecutive."""
    last = packed.end[packed.first]  # one past the subtree's last token ...
    after = np.searchsorted(packed.first, last)  # ... and so the first node past it
    leaves_before = np.concatenate([[0], np.cumsum([node.is_leaf for node in packed.nodes])])
    return leaves_before[:-1], leaves_before[after]
