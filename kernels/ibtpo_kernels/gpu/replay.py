"""Decode plans for a captured CUDA graph that outlives them: buffers and launches stay the same for every plan.

A graph repeats launches: the grid, the scratch memory and every address stay those of the capture, but a plan is only
valid until a branch begins or ends. So a `ReplayPlan` has spare room, and one plan after the other is loaded into it.
With room for four queries, six items and eight partial results, a plan of three queries looks like this::

    lengths      70  90  20   0        the fourth query sees nothing, its output is 0
    first_slot   0   2   4   5   5     ... and has no partial result
    items        . . . . -  -          the last two have no query: their programs read and write nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.staging import Staging
from ibtpo_kernels.gpu.work import HostWork, Work, host_work, set_work
from ibtpo_kernels.plan import DecodePlan

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Heads:
    """The queries of a plan: [*, num_heads, head_dim] in `dtype`, against `num_kv_heads`; `uniform` as in the plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    uniform: bool = False

    @property
    def tiles(self) -> tuple[int, int, int]:
        """(query heads a key/value head, narrow rows, wide rows), as `work_list` takes them."""
        group = self.num_heads // self.num_kv_heads
        rows = configs.decode_rows(group, configs.padded(self.head_dim), self.dtype.itemsize, uniform=self.uniform)
        return group, *rows


@dataclass(frozen=True)
class Room:
    """The capacity of a `ReplayPlan`, and the key of its graph.

    Attributes:
        queries, items, slots: as in `Work`.
        has_wide: whether items may be wide; the launch differs.
    """

    queries: int
    items: int
    slots: int
    has_wide: bool

    @classmethod
    def for_work(cls, work: HostWork, queries: int) -> Self:
        """Room for `queries`, and for `work` rounded up to powers of two, so that later plans are likely to fit."""
        return cls(queries, _power(max(len(work.items), queries)), _power(max(work.num_slots, queries)), work.has_wide)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class ReplayPlan:
    """A plan at fixed addresses, into which others are loaded.

    Args:
        table: int32 [R, P] on a GPU, the page table of all plans to be loaded.
        page_size: slots a page.
        room: its capacity.
        heads: its queries.
        lengths: int32 [room.queries] on the GPU, written by the caller; 0 for queries that a loaded plan does not have.

    Attributes:
        plan: for `tree_decode`, of `room.queries` queries.
    """

    def __init__(self, table: Tensor, page_size: int, room: Room, heads: Heads, lengths: Tensor) -> None:
        device, word = table.device, torch.int32
        self._staging = Staging(
            device,
            rows=(word, (room.queries,)),
            items=(word, (room.items, 4)),
            first_slot=(word, (room.queries + 1,)),
        )
        there = self._staging.there
        self.room = room
        self.plan = DecodePlan(
            table,
            there["rows"],
            lengths,
            torch.zeros(0, 4, dtype=word, device=device),
            page_size=page_size,
            uniform=heads.uniform,
        )
        work = Work(
            items=there["items"],
            first_slot=there["first_slot"],
            num_slots=room.slots,
            split_tokens=max(1, configs.SPLIT // page_size) * page_size,
            has_wide=room.has_wide,
            is_direct=False,
        )
        set_work(self.plan, *heads.tiles, work)

    def load(self, rows: Ints, work: HostWork) -> None:
        """Load the plan of queries in these rows of the table, int32 [B], with its work, in one transfer.

        Raises:
            ValueError: there is no room for it.
        """
        room, count = self.room, len(rows)
        if (
            count > room.queries
            or len(work.items) > room.items
            or work.num_slots > room.slots
            or work.has_wide > room.has_wide
        ):
            raise ValueError(
                f"ReplayPlan: {count} queries, {len(work.items)} items, {work.num_slots} partial results, wide: "
                f"{work.has_wide}; it was made for {room}"
            )
        for name, values, rest in (
            ("rows", rows, 0),
            ("items", work.items, 0),
            ("first_slot", work.first_slot, work.num_slots),
        ):
            host = self._staging.host[name]
            host[: len(values)], host[len(values) :] = values, rest
        self._staging.send()


def work_for(plan: DecodePlan, heads: Heads) -> HostWork:
    """The work of a plan on the host, for `ReplayPlan.load`."""
    return host_work(plan, *heads.tiles)
