"""Statistics over a few seeds: means with bootstrap intervals, paired differences, areas under curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ibtpo.metrics import bootstrap_interval

RESAMPLES = 10_000


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds with its 95 % percentile bootstrap interval; the interval is NaN for a single seed.

    With five seeds the coverage of such an interval is below 95 %: docs/log.md has the measured coverage.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_apart_from_zero(self) -> bool:
        """Does the interval exclude 0?"""
        return self.low > 0.0 or self.high < 0.0


def seed_mean(values: Sequence[float]) -> SeedMean | None:
    """Mean and interval of one value a seed; None if there are none."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    low, high = bootstrap_interval(known, resamples=RESAMPLES) if len(known) > 1 else (math.nan, math.nan)
    return SeedMean(math.fsum(known) / len(known), low, high, len(known))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> SeedMean | None:
    """`values` minus `baseline`, over the seeds they share; None if there are none."""
    return seed_mean([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def area_under(x: Sequence[float], y: Sequence[float], end: float) -> float:
    """Mean height of a curve between 0 and `end`, by trapezoids; the first and last values extend to the edges.

    NaN without points. The part beyond `end` is cut off, so that runs which overshoot a budget can be compared.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not points:
        return math.nan
    known_x, known_y = map(np.array, zip(*points, strict=True))
    inner = known_x[(known_x > 0.0) & (known_x < end)]
    grid = np.array([0.0, *inner, end])
    heights = np.interp(grid, known_x, known_y)
    return float(np.diff(grid) @ (heights[1:] + heights[:-1]) / (2 * end))  # np.trapezoid came with numpy 2
