"""A decode plan as input of FlashInfer's multi-level cascade: index arithmetic on the host, no GPU needed.

A level is a batch of requests that together have every query once. Request i is the queries [qo_indptr[i],
qo_indptr[i + 1]) over pages kv_indices[kv_indptr[i] : kv_indptr[i + 1]], of which the last holds last_page_len[i] keys.
The results of the levels are merged by log-sum-exp. The plan's items with several queries go to level 0, 1, ... by
nesting depth, and the rest of each path goes to the last level::

    query 0:  7 3 5       level 0   queries 0..2: page 7
    query 1:  7 3 9 2     level 1   queries 0..1: page 3,   query 2: nothing
    query 2:  7 4         level 2   query 0: page 5,  query 1: pages 9 2,  query 2: page 4

A page is shared only if every query of the item is past it, since a level has no mask. So the last token of a path is
always on the last level, where every query with keys has a finite log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]

MAX_LEVELS = 4
"""Each level costs a launch and a merge; deeper nested sharing is ignored, so that each query reads those pages."""


@dataclass(frozen=True)
class Level:
    """One level as FlashInfer's `plan` takes it; int32 on the CPU."""

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor


Request = tuple[int, int, int, int]  # queries [begin, end) read pages [first, last) of the path of query `begin`


def levels(
    items: Ints, page_table: Ints, rows: Ints, lengths: Ints, page_size: int, max_levels: int = MAX_LEVELS
) -> list[Level]:
    """The levels of a plan: one if nothing is shared, else up to `max_levels`, the last without sharing.

    Args:
        items, page_table, rows, lengths, page_size: of a `DecodePlan`, on the host; `lengths` as they are now.
        max_levels: at least 1.
    """
    num_queries = len(rows)
    whole = np.maximum(lengths - 1, 0) // page_size  # pages that a query is past
    covered = np.zeros(num_queries, np.int64)  # leading pages of each path that earlier levels have
    depth = np.zeros(num_queries, np.int64)
    shared: list[list[Request]] = [[] for _ in range(max_levels - 1)]
    for begin, end, _, last in items[items[:, 1] - items[:, 0] > 1].tolist():  # depth first, so outer ones come first
        first, stop, level = int(covered[begin]), min(last, int(whole[begin:end].min())), int(depth[begin])
        if stop > first and level < max_levels - 1:
            shared[level].append((begin, end, first, stop))
            covered[begin:end] = stop
            depth[begin:end] += 1
    pages = -(-lengths.astype(np.int64) // page_size)
    if num_queries and pages.max() > page_table.shape[1]:
        b = int(pages.argmax())
        raise ValueError(f"tree_decode: query {b} of length {lengths[b]} needs a page that table row {rows[b]} lacks")
    own = [(b, b + 1, int(covered[b]), int(pages[b])) for b in range(num_queries)]
    last_page_len = lengths - np.maximum(pages - 1, 0) * page_size
    found = [_level(_filled(requests, num_queries), page_table, rows, page_size) for requests in shared if requests]
    return [*found, _level(own, page_table, rows, last_page_len)]


def _filled(requests: list[Request], num_queries: int) -> list[Request]:
    """The requests, with empty ones for the queries between them, since a level must have every query."""
    result, at = [], 0
    for begin, end, first, last in requests:
        if begin > at:
            result.append((at, begin, 0, 0))
        result.append((begin, end, first, last))
        at = end
    if num_queries > at:
        result.append((at, num_queries, 0, 0))
    return result


def _level(requests: list[Request], page_table: Ints, rows: Ints, last_page_len: Ints | int) -> Level:
    counts = np.array([last - first for _, _, first, last in requests], np.int32)
    pages = [page_table[rows[begin], first:last] for begin, _, first, last in requests]
    filled = np.where(counts > 0, last_page_len, 0)
    return Level(
        qo_indptr=_ints([0, *(end for _, end, _, _ in requests)]),
        kv_indptr=_ints(np.r_[0, np.cumsum(counts)]),
        kv_indices=_ints(np.concatenate(pages) if pages else []),
        last_page_len=_ints(filled),
    )


def _ints(values: npt.ArrayLike) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int32).copy())
