"""Which queries of a decode step share which pages.

Queries come in depth-first order, so those that share a prefix are neighbours and the sharing is a tree of
intervals. For example, with the page tables of three queries ::

    query 0:  7 3 5          items (query_begin, query_end, page_begin, page_end), P = 4 columns:
    query 1:  7 3 9 2          (0, 3, 0, 1)   page 7, read once for three queries
    query 2:  7 4              (0, 2, 1, 2)   page 3, read once for two
                               (0, 1, 2, 4)   the tail of query 0, and so on

A tail runs to the table's width, so a query may grow in place without a new plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]
Item = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The work of `tree_decode`; made by `plan_decode`.

    Attributes:
        page_table: int32 [R, P], page ids of each row's path in depth order.
        rows: int32 [B], the table row of each query.
        lengths: int32 [B], query b sees slots [0, lengths[b]) of its path, its own included.
        items: int32 [I, 4] = (query_begin, query_end, page_begin, page_end): queries [query_begin, query_end) all have
            the same pages in columns [page_begin, page_end). Each (query, page) is covered once, in depth order.
        page_size: slots a page.
        on_host: (items, lengths) as planned, on the CPU; None: they must be fetched from the device if needed there.
        uniform: whether a query must be computed in one way however many share its pages, so that it has the same bits
            in any batch. On a GPU this is slower if many share; on the CPU every plan is uniform.
    """

    page_table: Tensor
    rows: Tensor
    lengths: Tensor
    items: Tensor
    page_size: int
    on_host: tuple[Tensor, Tensor] | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        """Kernels read these unchecked; checked once a plan, not once a layer."""
        device = self.page_table.device
        for name, shape in (
            ("page_table", (-1, -1)),
            ("rows", (-1,)),
            ("lengths", self.rows.shape),
            ("items", (-1, 4)),
        ):
            x: Tensor = getattr(self, name)
            fits = x.dim() == len(shape) and all(n in (-1, size) for n, size in zip(shape, x.shape, strict=True))
            if not (fits and x.dtype is torch.int32 and x.device == device and x.is_contiguous()):
                raise ValueError(
                    f"DecodePlan: {name} is {x.dtype} {list(x.shape)}, strides {x.stride()}, on {x.device}; expected "
                    f"contiguous torch.int32 {list(shape)} on {device}"
                )


def shared_columns(page_table: Ints, rows: Ints, lengths: Ints, page_size: int, state: Ints | None = None) -> list[int]:
    """For each pair of neighbouring queries, how many leading columns of the page table they share.

    `state`, int32 [3, R] = (next, previous, shared), is kept by `DecodePlanner`: row next[r] last followed row r, and
    row previous[r] last preceded it. Where both agree, shared[r] counts the equal leading columns of r and next[r]: n
    if they differ in column n, -1 - n if column n was not there to be compared.
    """
    width = page_table.shape[1]
    num_pages = -(-lengths.astype(np.int64) // page_size)
    result = []
    for b in range(len(rows) - 1):
        row, after = rows[b], rows[b + 1]
        if row == after:
            result.append(width)  # two queries of one path, as in a chunked prefill
            continue
        limit, start = int(min(num_pages[b], num_pages[b + 1], width)), 0
        if state is not None and state[0, row] == after and state[1, after] == row:
            known = int(state[2, row])
            start = known if known >= 0 else -1 - known
            if known >= 0 or start >= limit:
                result.append(min(start, limit))
                continue
        ours, theirs = page_table[row, start:limit], page_table[after, start:limit]
        differ = np.flatnonzero((ours != theirs) | (ours < 0))
        found = start + int(differ[0]) if len(differ) else limit
        if state is not None:
            state[0, row], state[1, after] = after, row
            is_final = found < limit and page_table[row, found] >= 0 and page_table[after, found] >= 0
            state[2, row] = found if is_final else -1 - found
        result.append(found)
    return result


def plan_items(page_table: Ints, rows: Ints, lengths: Ints, page_size: int, state: Ints | None = None) -> Ints:
    """int32 [I, 4], the items in depth-first order: the specification of the compiled planner."""
    width = page_table.shape[1]
    shared = shared_columns(page_table, rows, lengths, page_size, state)
    items: list[Item] = []
    groups = [(0, len(rows), 0)] if len(rows) else []  # (query_begin, query_end, first column not yet covered)
    while groups:
        begin, end, column = groups.pop()
        depth = min(shared[begin : end - 1], default=width)
        if depth > column:
            items.append((begin, end, column, depth))
        if end - begin > 1 and depth < width:
            cuts = [begin, *(b + 1 for b in range(begin, end - 1) if shared[b] == depth), end]
            groups.extend((a, b, depth) for a, b in zip(cuts[-2::-1], cuts[:0:-1], strict=True))
    return np.array(items, np.int32).reshape(-1, 4)
