"""The flat work list of one decode step: which program reads which keys for which queries.

A path is cut at multiples of a fixed split (`configs.SPLIT` tokens, so a whole number of pages). For each split the
neighbouring queries whose pages in it are all the same form one item, and the keys are read once for all of them. With
splits of 4 pages, three queries and a table 12 columns wide:

    column    0  1  2  3 | 4  5  6  7 | 8  9 10 11         items (query_begin, num_queries, split, open)
    query 0   a  b  c  d | e  f  g    |                       (0, 3, 0, 0)   a..d once for three queries
    query 1   a  b  c  d | e  f  h  i | j                     (0, 1, 1, 1)   e, f: read by each, the second time from L2
    query 2   a  b  c  d | k                                  (1, 1, 1, 0), (1, 1, 2, 1), (2, 1, 1, 1)

Every query is in one item of each split below its tail, and its tail item is open: it walks on, however far the length
has grown by the time it runs. So the list, the launch grid and the scratch memory stay valid while lengths are bumped
on the device, and a CUDA graph can replay.

The reduction is the same for every batch: a split's keys in order from scratch, then splits from the last to the first,
acc <- merge(split, acc). It runs backwards so that an open item can fold all of a tail into one partial result.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_kernels.gpu import configs
from ibtpo_kernels.plan import DecodePlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """What the decode kernels walk.

    Attributes:
        items: int32 [W, 4] = (query_begin, num_queries, split, open), on the device.
        first_slot: int32 [B + 1], where each query's partial results begin; query b has one a split up to its tail.
        num_slots: of all queries.
        split_tokens: keys a split.
        has_wide: whether an item has more rows (queries x heads of a group) than the narrow tile.
    """

    items: Tensor
    first_slot: Tensor
    num_slots: int
    split_tokens: int
    has_wide: bool


def neighbours(items: npt.NDArray[np.int32], num_queries: int) -> Ints:
    """[B - 1], for each pair of neighbouring queries how many leading page-table columns a plan says they share."""
    shared = np.zeros(max(num_queries - 1, 0), np.int64)
    for begin, end, _, page_end in items[items[:, 1] - items[:, 0] > 1].tolist():
        np.maximum(shared[begin : end - 1], page_end, out=shared[begin : end - 1])
    return shared


def cut(shared: Ints, lengths: Ints, width: int, page_size: int, split_pages: int) -> tuple[Ints, Ints]:
    """(items [W, 4], number of splits of each query [B]); items of whole groups, not yet cut into tiles."""
    num_queries = len(lengths)
    if not num_queries:
        return np.zeros((0, 4), np.int64), np.zeros(0, np.int64)
    edges = np.flatnonzero(shared < width) + 1
    begins, ends = np.r_[0, edges], np.r_[edges, num_queries]  # classes: neighbours on one and the same path
    link = shared[edges - 1]
    longest = np.maximum.reduceat(lengths, begins)
    tail = np.maximum(-(-longest // (split_pages * page_size)) - 1, 0)
    if len(link):  # a tail is never shared with another class, or it could not grow
        tail[:-1] = np.maximum(tail[:-1], link // split_pages)
        tail[1:] = np.maximum(tail[1:], link // split_pages)
    found = []
    for split in range(int(tail.max())):
        active = tail > split
        joined = active[:-1] & active[1:] & (link >= (split + 1) * split_pages)
        first, last = active.copy(), active.copy()
        first[1:] &= ~joined
        last[:-1] &= ~joined
        begin, end = begins[first], ends[last]
        found.append(np.stack((begin, end - begin, np.full_like(begin, split), np.zeros_like(begin)), -1))
    found.append(np.stack((begins, ends - begins, tail, np.ones_like(tail)), -1))
    return np.concatenate(found), np.repeat(tail + 1, ends - begins)


def tiled(items: Ints, group: int, narrow: int, wide: int) -> Ints:
    """Items of at most one tile of rows each, those with most rows first."""
    rows = items[:, 1] * group
    size = np.maximum(np.where(rows > narrow, wide, narrow) // group, 1)  # queries a tile
    count = -(-items[:, 1] // size)
    index = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    out, size = np.repeat(items, count, axis=0), np.repeat(size, count)
    out[:, 0] += index * size
    out[:, 1] = np.minimum(out[:, 1] - index * size, size)
    return out[np.argsort(-out[:, 1], kind="stable")]


_CACHE: WeakKeyDictionary[DecodePlan, dict[tuple[int, int, int], Work]] = WeakKeyDictionary()


def work_list(plan: DecodePlan, group: int, narrow: int, wide: int) -> Work:
    """The plan's work for `group` query heads a key/value head, in tiles of `narrow` or `wide` rows.

    Made once a plan, when the first layer asks, with one copy from the device.
    """
    known = _CACHE.setdefault(plan, {})
    shape = (group, narrow, wide)
    if shape not in known:
        known[shape] = _build(plan, *shape)
    return known[shape]


def _build(plan: DecodePlan, group: int, narrow: int, wide: int) -> Work:
    lengths = plan.lengths.cpu().numpy().astype(np.int64)
    split_pages = max(1, configs.SPLIT // plan.page_size)
    shared = neighbours(plan.items.cpu().numpy(), len(lengths))
    items, num_splits = cut(shared, lengths, plan.page_table.shape[1], plan.page_size, split_pages)
    items = tiled(items, group, narrow, wide)
    first_slot = np.r_[0, np.cumsum(num_splits)]
    device = plan.lengths.device
    return Work(
        items=torch.from_numpy(items.astype(np.int32)).to(device),
        first_slot=torch.from_numpy(first_slot.astype(np.int32)).to(device),
        num_slots=int(first_slot[-1]),
        split_tokens=split_pages * plan.page_size,
        has_wide=bool((items[:, 1] * group > narrow).any()),
    )
