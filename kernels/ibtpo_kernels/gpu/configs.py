"""Tile shapes of every Triton kernel: one table, fixed, so that a result never depends on what a tuner measured.

A choice depends on the head size (padded to a power of two), the bytes of an element and the compute capability, not on
the batch. The limits behind the numbers: 255 registers a thread without spilling, and shared memory of 99 KiB (sm_86,
sm_89, sm_120), 163 KiB (sm_80) or 227 KiB (sm_90, sm_100) a thread block; sm_8x and sm_12x share their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ibtpo_kernels.gpu.launch import FUSED

MAX_HEAD = 256  # heads are padded to 16, 32, 64, 128 or 256
SPLIT = 256  # tokens a decode work item: the unit of the canonical reduction, so a constant of the results


@dataclass(frozen=True)
class Tiles:
    """One kernel's launch: `block_m` query rows against `block_n` keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    step: int = 0  # numbers of a head that a product takes at a time; 0: all
    uncapped: bool = False  # allow 255 registers: else the assembler sometimes spills to stay within 128

    def steps(self, head_dim: int) -> int:
        """Numbers of a head, padded to `head_dim`, that a product takes at a time."""
        return self.step or head_dim

    @property
    def options(self) -> dict[str, int]:
        """Launch options of Triton."""
        options = {"num_warps": self.warps, "num_stages": self.stages, **FUSED}
        return options | {"maxnreg": 255} if self.uncapped else options


def padded(size: int) -> int:
    """The power of two, at least 16, to which a head of this size is padded for matrix instructions."""
    return max(16, 1 << (size - 1).bit_length())


def family(major: int) -> int:
    """The family whose tiles a compute capability uses: 8 for sm_8x and sm_12x, 9 for sm_90, 10 for sm_10x and sm_11x.

    sm_12x, on GeForce cards, has the shared memory and matrix instructions of sm_86, not those of sm_10x.
    """
    return 8 if major == 12 else min(major, 10)


@cache
def capability(device: torch.device) -> int:
    """`family` of a device; the interpreter counts as 9."""
    return family(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 9


# {(bytes an element, padded head size): {capability: tiles}}; a head size not listed uses the next larger one, a
# capability the next lower one. Found by compiling ahead of time: the largest tile without spilled registers, or a
# smaller one if it lets two thread blocks share a multiprocessor. float32 multiplies as three tf32 products, which keep
# operands in registers twice; so heads of 256 are multiplied in steps, see `blocks.products_of_rows`.
_FORWARD = {
    (2, 64): {8: Tiles(128, 64, 8, 3), 9: Tiles(128, 64, 4, 3)},
    (2, 128): {8: Tiles(128, 64, 8, 2), 9: Tiles(128, 64, 8, 3)},
    (2, 256): {8: Tiles(64, 32, 8, 2), 9: Tiles(128, 32, 8, 2), 10: Tiles(64, 64, 8, 2)},
    (4, 32): {8: Tiles(32, 32, 4, 1, uncapped=True), 9: Tiles(64, 32, 4, 1, uncapped=True)},
    (4, 64): {8: Tiles(32, 32, 4, 1), 9: Tiles(64, 32, 4, 1), 10: Tiles(32, 32, 4, 1)},
    (4, 128): {8: Tiles(16, 32, 4, 1, uncapped=True)},
    (4, 256): {8: Tiles(16, 16, 8, 1, step=64)},
}
_BACKWARD_KEYS = {
    (2, 64): {8: Tiles(64, 64, 8, 3), 9: Tiles(64, 128, 8, 3)},
    (2, 128): {8: Tiles(64, 64, 8, 2), 9: Tiles(64, 128, 8, 2)},
    (2, 256): {8: Tiles(32, 32, 8, 1), 10: Tiles(64, 64, 8, 1)},
    (4, 32): {8: Tiles(32, 16, 4, 1, uncapped=True)},
    (4, 64): {8: Tiles(32, 32, 4, 1)},
    (4, 128): {8: Tiles(16, 16, 4, 1)},
    (4, 256): {8: Tiles(16, 16, 8, 1, step=64)},
}
_BACKWARD_QUERIES = {
    (2, 64): {8: Tiles(128, 64, 8, 3)},
    (2, 128): {8: Tiles(64, 64, 8, 2), 9: Tiles(128, 64, 8, 2)},
    (2, 256): {8: Tiles(64, 32, 8, 1), 9: Tiles(32, 32, 8, 1, uncapped=True), 10: Tiles(64, 64, 8, 1)},
    (4, 32): {8: Tiles(16, 32, 4, 1, uncapped=True)},
    (4, 64): {8: Tiles(32, 32, 4, 1), 9: Tiles(16, 32, 4, 1)},
    (4, 128): {8: Tiles(16, 16, 4, 1)},
    (4, 256): {8: Tiles(16, 16, 8, 1, step=64)},
}
_Table = dict[tuple[int, int], dict[int, Tiles]]


def _look_up(table: _Table, head_dim: int, element_size: int, major: int) -> Tiles:
    listed = min(size for element, size in table if element == element_size and size >= head_dim)
    by_capability = table[element_size, listed]
    return by_capability[max(known for known in by_capability if known <= major or known == 8)]


def tree_forward(head_dim: int, element_size: int, major: int) -> Tiles:
    """Tiles of the forward kernel."""
    return _look_up(_FORWARD, head_dim, element_size, major)


def tree_backward_keys(head_dim: int, element_size: int, major: int) -> Tiles:
    """Tiles of the dK/dV kernel: block_n keys stay, block_m query rows stream past."""
    return _look_up(_BACKWARD_KEYS, head_dim, element_size, major)


def tree_backward_queries(head_dim: int, element_size: int, major: int) -> Tiles:
    """Tiles of the dQ kernel."""
    return _look_up(_BACKWARD_QUERIES, head_dim, element_size, major)


def linear(element_size: int) -> Tiles:
    """Tiles of the batch-invariant product, the same for every shape and capability: block_m rows, block_n columns."""
    return Tiles(32, 32, 4, 1) if element_size == 4 else Tiles(64, 64, 4, 3)


def decode_rows(group: int, head_dim: int, element_size: int, *, uniform: bool = False) -> tuple[int, int]:
    """(narrow, wide) rows of a decode tile, for private and for shared pages; equal in float32 and if `uniform`."""
    narrow = padded(group)
    if element_size == 4 or uniform:
        return narrow, narrow
    return narrow, max(narrow, 32 if head_dim == 256 else 64)


def decode(head_dim: int, element_size: int, has_wide: bool, major: int) -> Tiles:
    """Tiles of the decode kernel; head_dim is the real one, block_m is chosen per item, see `decode_rows`."""
    dim = padded(head_dim)
    if element_size == 4:
        return Tiles(0, 16, 8, 1, 64, uncapped=True) if dim == 256 else Tiles(0, 32, 4, 1, uncapped=True)
    if dim == 256:
        return Tiles(0, 32, 8 if has_wide else 4, 2, uncapped=has_wide)
    keys = 32 if major == 8 and has_wide and 64 < head_dim < dim else 64  # the mask of a padded head costs registers
    return Tiles(0, keys, 8 if has_wide else 4, 3, uncapped=has_wide or dim == 16)
