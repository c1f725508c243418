"""Budgets moved between the trees of a training step (ours): from those of equal rewards to the mixed ones.

A group of equal rewards has no gradient, so what is sampled for it is lost. After `stop_uniform_after` trajectories
every tree waits for the others; those that are not mixed by then end, and the rounds they leave go to those that
are. With 4 rounds left to each of five trees, of which the second and the fifth are not mixed::

    left      4   4   4   4   4
    mixed     x   -   x   x   -
    grows     7   0   7   6   0       20 rounds in all

No tree grows by more than twice what it had left: a step with few mixed trees does not spend everything on these,
what is left over is not sampled. Where no tree is mixed, all go on as if nothing were moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future


class Sharing:
    """Where the trees that are grown together meet; good for one `Engine.run`.

    Args:
        keys: of all the trees, in the order in which odd rounds are given out.
        left: rounds each of them has left when it gets here.
    """

    def __init__(self, keys: Sequence[int], left: int) -> None:
        self._mixed: dict[int, bool | None] = dict.fromkeys(keys)
        self._left = left
        self._rounds: Future[dict[int, int]] = Future()

    def meet(self, key: int, *, mixed: bool) -> Future[dict[int, int]]:
        """Tell of a tree that got here; what is returned, rounds by key, is known once all have.

        Raises:
            ValueError: the key is not one of the trees, or was told before.
        """
        if self._mixed.get(key, mixed) is not None:
            raise ValueError(f"Sharing: tree {key} is not among the trees that share, or was here before")
        self._mixed[key] = mixed
        known = [mixed for mixed in self._mixed.values() if mixed is not None]
        if len(known) == len(self._mixed):
            self._rounds.set_result(dict(zip(self._mixed, share_rounds(known, self._left), strict=True)))
        return self._rounds


def share_rounds(mixed: Sequence[bool], left: int) -> list[int]:
    """Rounds each tree still grows, of `left` that each had: equal parts for the mixed, what is odd for the first."""
    if not any(mixed):
        return [left] * len(mixed)
    part, odd = divmod(left * len(mixed), sum(mixed))
    before = [sum(mixed[:i]) for i in range(len(mixed))]
    return [min(part + (before[i] < odd), 2 * left) if mixed[i] else 0 for i in range(len(mixed))]
