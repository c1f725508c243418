"""Tree-GRPO's advantage of a trajectory (arXiv 2509.21240): its z-score in its tree plus that among all trajectories.

    A(i) = (R_i - mean of its tree) / (std of its tree + eps)  +  (R_i - mean of the group) / (std of the group + eps)

A leaf's tree is ``leaf.notes["group"]``; if the search has not set it, the group is one tree.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def tree_grpo(rewards: Doubles, groups: Longs, *, eps: float, ddof: int | None) -> Doubles:
    """float64 [G].

    Args:
        rewards: [G].
        groups: [G], the tree each trajectory belongs to.
        eps: added to the deviations.
        ddof: 0 or 1, delta degrees of freedom of the deviations; None: do not divide by deviations.
    """
    inside = np.zeros(len(rewards))
    for group in np.unique(groups):
        inside[groups == group] = z_score(rewards[groups == group], eps=eps, ddof=ddof)
    return inside + z_score(rewards, eps=eps, ddof=ddof)


def z_score(rewards: Doubles, *, eps: float, ddof: int | None) -> Doubles:
    """(R - mean)/(std + eps); 0 if all rewards are equal."""
    if rewards.min() == rewards.max():
        return np.zeros(len(rewards))
    scores: Doubles = (rewards - rewards.mean()) / deviation(rewards, eps=eps, ddof=ddof)
    return scores


def deviation(rewards: Doubles, *, eps: float, ddof: int | None) -> float:
    """std + eps, the divisor of a distance to the mean; 1 without `ddof`."""
    return 1.0 if ddof is None else float(rewards.std(ddof=ddof)) + eps
