"""Philox4x32-10, the counter-based generator behind every sampled token.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A number is a pure
function of its name (stream, position): no state is carried from draw to draw, so a sample cannot depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Encrypt 128-bit counters under 64-bit keys.

    Args:
        counter: int64 [B, 4], four 32-bit words each in [0, 2^32).
        key: int64 [B, 2], two 32-bit words each in [0, 2^32).

    Returns:
        int64 [B, 4], four random 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER[0])
        high1, low1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; the int64 product wraps, which keeps all 64 bits."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


def uniform(keys: Tensor) -> Tensor:
    """One double in [0, 1), a multiple of 2^-53, for each (stream, position).

    Args:
        keys: int64 [B, 2]; `stream` becomes the Philox key, `position` the low half of its counter.

    Returns:
        float64 [B].
    """
    halves = torch.stack((keys & _LOW, (keys >> 32) & _LOW), -1)  # [B, 2, 2]: low half first
    stream, position = halves.unbind(-2)
    words = philox4x32(torch.cat((position, torch.zeros_like(position)), -1), stream)
    return ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double() * 2.0**-53
