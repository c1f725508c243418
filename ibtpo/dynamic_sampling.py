"""Dynamic sampling (DAPO, arXiv 2503.14476): further prompts take the place of groups that teach nothing.

A group whose rewards are all equal has no group-relative advantage and the update skips it. So that a step still has
the number of groups it was configured with, as many prompts as were lost are drawn again, a bounded number of times.
All trees drawn are returned: their tokens were sampled, their rewards count in the means, the data have moved on.
"""

from __future__ import annotations

from collections.abc import Callable

from ibtpo.grow import Grower
from ibtpo.metrics import is_mixed
from ibtpo.tasks import Problem
from ibtpo_engine import Sampling, Search, Tree


def grow_mixed(
    grower: Grower,
    pose: Callable[[int], Problem],
    search: Search,
    sampling: Sampling,
    *,
    first: int,
    count: int,
    redraws: int,
) -> tuple[list[Tree], list[Problem], float]:
    """Grow trees on the next problems until `count` of them are mixed, or the redraws are used up.

    Args:
        grower: grows and grades.
        pose: the training problem of an index; the index is the tree's key, too.
        search, sampling: how.
        first: index of the first problem; those drawn are [first, first + number of trees).
        count: problems drawn first, and mixed groups wanted.
        redraws: times that as many problems as are missing are drawn again; 0: never.

    Returns:
        all trees and their problems in the order drawn; seconds spent in grading.

    Raises:
        Interrupted: the grower was asked to stop.
    """
    trees: list[Tree] = []
    problems: list[Problem] = []
    seconds, missing = 0.0, count
    for _ in range(1 + redraws):
        keys = list(range(first + len(trees), first + len(trees) + missing))
        posed = [pose(key) for key in keys]
        grown, graded = grower.grow(posed, keys, search, sampling)
        trees, problems, seconds = trees + grown, problems + posed, seconds + graded
        missing -= sum(map(is_mixed, grown))
        if missing == 0:
            break
    return trees, problems, seconds
