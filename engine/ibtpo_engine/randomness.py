"""Names for random numbers, so that no sample depends on the other branches of its batch.

Every branch has a 64-bit *stream*: a hash of (seed, tree key) at the root and of (parent's stream, depth of the
fork, number of earlier forks there) below. A token's random number is Philox(stream, position). Hence siblings
differ, batch and pool size do not matter, and a replay is exact.
"""

from __future__ import annotations

from collections.abc import Iterable

_MASK = (1 << 64) - 1
_SEEDED = -2  # hashed with a branch's own seed in place of (tree key, -1), which names a root


def _splitmix(x: int) -> int:
    """One round of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers that mixes every bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def seeded_stream(seed: int, births: Iterable[tuple[int, int]]) -> int:
    """The stream of a branch that has a seed of its own.

    Args:
        seed: any integer.
        births: (depth of the fork, number of earlier forks there) of each stream on the branch's path, from the top;
            they distinguish siblings, and branches below different leaves.
    """
    stream = mix(seed, _SEEDED)
    for depth, ordinal in births:
        stream = mix(stream, depth, ordinal)
    return stream


def mix(*values: int) -> int:
    """Hash integers, in order, to one signed 64-bit integer."""
    state = 0
    for value in values:
        state = _splitmix(state ^ (int(value) & _MASK))
    return state - (1 << 64) if state >> 63 else state
