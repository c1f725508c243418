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

import torch

from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.work import HostWork, Work, host_work, set_work
from ibtpo_kernels.plan import DecodePlan


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
        like: a plan over the same page table as all plans to be loaded.
        room: its capacity.
        heads: its queries.

    Attributes:
        plan: for `tree_decode`, of `room.queries` queries. The caller writes its lengths; those of queries that the
            loaded plan does not have must be 0.
    """

    def __init__(self, like: DecodePlan, room: Room, heads: Heads) -> None:
        device = like.page_table.device

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.room = room
        self.plan = DecodePlan(
            like.page_table,
            zeros(room.queries),
            zeros(room.queries),
            zeros(0, 4),
            page_size=like.page_size,
            uniform=heads.uniform,
        )
        self._work = Work(
            items=zeros(room.items, 4),
            first_slot=zeros(room.queries + 1),
            num_slots=room.slots,
            split_tokens=max(1, configs.SPLIT // like.page_size) * like.page_size,
            has_wide=room.has_wide,
            is_direct=False,
        )
        set_work(self.plan, *heads.tiles, self._work)

    def load(self, plan: DecodePlan, work: HostWork) -> None:
        """Load `plan` with its work `work`.

        Raises:
            ValueError: there is no room for it.
        """
        room, count = self.room, len(plan.rows)
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
        items, first_slot = self._work.items, self._work.first_slot
        self.plan.rows[:count].copy_(plan.rows)
        self.plan.rows[count:].zero_()
        items[: len(work.items)].copy_(torch.from_numpy(work.items))
        items[len(work.items) :].zero_()
        first_slot[: count + 1].copy_(torch.from_numpy(work.first_slot))
        first_slot[count + 1 :].fill_(work.num_slots)


def work_for(plan: DecodePlan, heads: Heads) -> HostWork:
    """The work of a plan, for `ReplayPlan.load`."""
    return host_work(plan, *heads.tiles)
