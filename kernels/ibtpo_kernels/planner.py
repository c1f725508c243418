"""Incremental decode planning: each plan reuses comparisons of earlier ones.

Comparing the pages of neighbouring queries is nearly all the work of a plan: O(B x pages of a path), 12 MB for 512
branches behind 100,000 tokens. But a structural event changes few neighbours. With the number of leading pages that
neighbours share written between them ::

    rows       4 --6250-- 7 --6250-- 2 --0-- 9          a branch in row 5 is born after row 7
    rows       4 --6250-- 7 --?-- 5 --?-- 2 --0-- 9     two comparisons
    rows       4 --6250-- 7 --?-- 2 --0-- 9             it ends again: one

The planner keeps these numbers by pair of rows. When a path gets pages, its comparison is continued only if the path's
length had ended it. The items are made anew from the numbers, in O(B), some nanoseconds a branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibtpo_kernels import checks
from ibtpo_kernels.dispatch import host_planner
from ibtpo_kernels.plan import DecodePlan


class DecodePlanner:
    """Plans the decode steps of branches whose pages are in one page table, comparing only what changed.

    The table is on the host and written by its owner, who reports each write: `rewrote` for a row with a new path,
    `extended` for a row that was given a page. The plans equal those of `plan_decode`.

    For a GPU the planner keeps a copy of the table there and sends only what was written. Plans refer to the copy.
    Between structural events, increment lengths on the device, `plan.lengths.add_(1)`, for example in a CUDA graph with
    the decode step; `upload` sends pages added meanwhile, outside of the graph.

    Args:
        page_table: contiguous int32 [R, P] on the CPU, page ids of each row's path in depth order; -1 past its pages.
        page_size: slots a page.
        device: where the kernels run; None: on the CPU, where they read the table itself.

    Raises:
        ValueError: the table is not such a tensor, or page_size is less than 1.
    """

    def __init__(self, page_table: Tensor, *, page_size: int = 16, device: torch.device | str | None = None) -> None:
        checks.planner(page_table, page_size)
        self.page_table = page_table
        self.page_size = page_size
        self._state = torch.full((3, page_table.shape[0]), -1, dtype=torch.int32, device="cpu")  # plan.shared_columns
        self._partners = self._state[:2].numpy()
        self._copy = None if device is None else page_table.to(device, copy=True)
        self._rows: set[int] = set()  # written since the last upload
        self._cells: set[int] = set()  # row * P + column of pages added since

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_partners"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._partners = self._state[:2].numpy()  # of a copy, its own

    @property
    def keeps_copy(self) -> bool:
        """Whether the kernels read a copy of the table, so that added pages must be reported."""
        return self._copy is not None

    @property
    def table(self) -> Tensor:
        """The table that the kernels read."""
        return self.page_table if self._copy is None else self._copy

    def rewrote(self, row: int) -> None:
        """Pages of a row were replaced: it belongs to another branch now, or its path was moved."""
        self._check("row", row, self.page_table.shape[0])
        self._partners[:, row] = -1
        if self._copy is not None:
            self._rows.add(row)

    def extended(self, row: int, column: int) -> None:
        """A row was given a page in a column where it had none."""
        self._check("row", row, self.page_table.shape[0])
        self._check("column", column, self.page_table.shape[1])
        if self._copy is not None:
            self._cells.add(row * self.page_table.shape[1] + column)

    def upload(self) -> None:
        """Send what was written to the device's copy of the table, in one transfer; on the CPU does nothing."""
        if self._copy is None or not (self._rows or self._cells):
            return
        there, table, num_rows = self._copy, self.page_table, len(self._rows)
        index = torch.tensor([*sorted(self._rows), *sorted(self._cells)], device="cpu")
        parts = [index.view(torch.int32), table[index[:num_rows]].view(-1), table.view(-1)[index[num_rows:]]]
        host = torch.empty(sum(map(len, parts)), dtype=torch.int32, device="cpu", pin_memory=there.is_cuda)
        torch.cat(parts, out=host)
        sent = host.to(there.device, non_blocking=True)  # torch keeps the pinned memory until this has ended
        places, pages = sent[: len(parts[0])].view(torch.int64), sent[len(parts[0]) :]
        if self._rows:
            there.index_copy_(0, places[:num_rows], pages[: len(parts[1])].view(num_rows, -1))
        if self._cells:
            there.view(-1).index_copy_(0, places[num_rows:], pages[len(parts[1]) :])
        self._rows.clear()
        self._cells.clear()

    def plan(self, rows: Tensor, lengths: Tensor, *, uniform: bool = False) -> DecodePlan:
        """The plan of a structural event: what `plan_decode` returns for this table.

        Args:
            rows: int32 [B] on the CPU, the table row of each query, siblings side by side.
            lengths: int32 [B] on the CPU, query b sees slots [0, lengths[b]) of its path.
            uniform: see `DecodePlan`.

        Returns:
            A `DecodePlan`; on the CPU it refers to these tensors, on another device to copies there.

        Raises:
            ValueError: a shape, dtype or device is wrong, or a row or length is out of range.
        """
        plan = self.host_plan(rows, lengths, uniform=uniform)
        if self._copy is None:
            return plan
        self.upload()
        there = self._copy.device
        return DecodePlan(
            self._copy,
            rows.to(there, copy=True),
            lengths.to(there, copy=True),
            plan.items.to(there),
            self.page_size,
            on_host=(plan.items, lengths.clone()),
            uniform=uniform,
        )

    def host_plan(self, rows: Tensor, lengths: Tensor, *, uniform: bool = False) -> DecodePlan:
        """As `plan`, but over the host's table, whatever the device; nothing is sent there."""
        table, page_size = self.page_table, self.page_size
        checks.plan_decode(table, rows, lengths, page_size)
        items: Tensor = host_planner().plan_decode(table, rows, lengths, page_size, self._state)
        return DecodePlan(table, rows, lengths, items, page_size, uniform=uniform)

    def _check(self, name: str, value: int, size: int) -> None:
        if not 0 <= value < size:
            raise ValueError(f"DecodePlanner: {name} {value} is outside of the page table; expected one in [0, {size})")
