"""Dynamic sampling (DAPO, arXiv 2503.14476): further prompts replace groups without a gradient.

A group whose rewards are all equal has no group-relative advantage, and the update skips it. So that a step still has
its configured number of groups, as many further prompts as there are such groups are drawn, a bounded number of times.
All trees drawn are returned: their tokens and rewards count in the metrics, and their problems are used up.
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
        search, sampling: how trees are grown.
        first: index of the first problem; those drawn are [first, first + number of trees).
        count: problems drawn first, and mixed groups wanted.
        redraws: how often the missing number of problems may be drawn; 0: never.

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
