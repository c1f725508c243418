"""The flat work list of one decode step: which program reads which keys for which queries.

A path is cut into splits of a fixed size (`configs.SPLIT` tokens, a whole number of pages). Within a split,
neighbouring queries whose pages are all the same form one item, and the keys are read once for all of them. With splits
of 4 pages, three queries and a table 12 columns wide:

    column    0  1  2  3 | 4  5  6  7 | 8  9 10 11         items (query_begin, num_queries, split, open)
    query 0   a  b  c  d | e  f  g    |                       (0, 3, 0, 0)   a..d once for three queries
    query 1   a  b  c  d | e  f  h  i | j                     (0, 1, 1, 1)   e, f: read by each, the second time from L2
    query 2   a  b  c  d | k                                  (1, 1, 1, 0), (1, 1, 2, 1), (2, 1, 1, 1)

Every query is in one item of each split before its tail, and its tail item is open: it runs to the end of the path,
however far that has grown. So the list, the launch grid and the scratch memory stay valid while lengths are increased
on the device, and a CUDA graph can be replayed.

The reduction is the same for every batch: each split's keys in order, from an empty state, then the splits from the
last to the first, acc <- merge(split, acc). It runs backwards so that an open item can fold a whole tail into one
partial result.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_kernels.cpu import native
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.plan import DecodePlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """The work list of the decode kernels.

    Attributes:
        items: int32 [W, 4] = (query_begin, num_queries, split, open), on the device.
        first_slot: int32 [B + 1], where each query's partial results begin: one for each split up to its tail.
        num_slots: partial results of all queries.
        split_tokens: keys a split.
        has_wide: whether an item has more rows (queries x heads of a group) than the narrow tile.
        is_direct: whether each query has only one partial result, so that this is its output.
    """

    items: Tensor
    first_slot: Tensor
    num_slots: int
    split_tokens: int
    has_wide: bool
    is_direct: bool


def cut(items: npt.NDArray[np.int32], lengths: Ints, width: int, page_size: int, split_pages: int) -> tuple[Ints, Ints]:
    """A plan's items in whole splits: (items [W, 4] of whole groups, not yet cut into tiles; splits of each query [B]).

    O(plan items + W), without a loop: queries that share pages [first, last), and all before, share the splits that end
    at or before `last`; those that end at or before `first` belong to a larger group. An item up to the table's width
    is the tail of one path, and tails are in the order of the queries.
    """
    begin, end, first, last = items.astype(np.int64).T
    if not width:  # no query has a page, and the plan no item
        begin, end, first, last = (np.full(min(len(lengths), 1), x) for x in (0, len(lengths), 0, 0))
    is_tail = last == width
    low, high = first // split_pages, last // split_pages
    begins, sizes = begin[is_tail], (end - begin)[is_tail]
    longest = np.maximum.reduceat(lengths, begins) if len(begins) else lengths
    tail = np.maximum(-(-longest // (split_pages * page_size)) - 1, low[is_tail])
    high[is_tail] = tail
    count = np.maximum(high - low, 0)
    split = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - low, count)
    closed = np.stack((np.repeat(begin, count), np.repeat(end - begin, count), split, np.zeros_like(split)), -1)
    return np.concatenate((closed, np.stack((begins, sizes, tail, np.ones_like(tail)), -1))), np.repeat(tail + 1, sizes)


def tiled(items: Ints, lengths: Ints, group: int, narrow: int, wide: int, split_tokens: int) -> Ints:
    """Items of at most one tile of rows each, longest first, by rows of the tile times keys."""
    rows = items[:, 1] * group
    height = np.where(rows > narrow, wide, narrow)
    size = np.maximum(height // group, 1)  # queries a tile
    count = -(-items[:, 1] // size)
    index = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    out, size = np.repeat(items, count, axis=0), np.repeat(size, count)
    out[:, 0] += index * size
    out[:, 1] = np.minimum(out[:, 1] - index * size, size)
    keys = np.clip(lengths[out[:, 0]] - out[:, 2] * split_tokens, 0, split_tokens)
    height = np.where(out[:, 1] * group > narrow, wide, narrow)
    return out[np.argsort(-height * keys, kind="stable")]


@dataclass(frozen=True)
class HostWork:
    """`Work` while it is on the host: items int32 [W, 4], first_slot int32 [B + 1]."""

    items: npt.NDArray[np.int32]
    first_slot: npt.NDArray[np.int32]
    split_tokens: int
    has_wide: bool

    @property
    def num_slots(self) -> int:
        """Partial results of all queries."""
        return int(self.first_slot[-1])


def host_work(plan: DecodePlan, group: int, narrow: int, wide: int) -> HostWork:
    """The plan's work for `group` query heads a key/value head, in tiles of `narrow` or `wide` rows.

    The compiled module makes it, if it is there and the plan has pages; else numpy does, which is its specification.
    """
    planned, seen = plan.on_host or (plan.items.cpu(), plan.lengths.cpu())
    width, split_pages = plan.page_table.shape[1], max(1, configs.SPLIT // plan.page_size)
    split_tokens = split_pages * plan.page_size
    if native is not None and width:
        planned, seen = planned.contiguous(), seen.contiguous()
        sizes = (len(planned), len(seen), width, plan.page_size, split_pages, group, narrow, wide)
        found, slots, has_wide = native.decode_work(planned.data_ptr(), seen.data_ptr(), *sizes)
        items, first_slot = np.frombuffer(found, np.int32).reshape(-1, 4), np.frombuffer(slots, np.int32)
        return HostWork(items, first_slot, split_tokens, has_wide)
    lengths = seen.numpy().astype(np.int64)
    whole, num_splits = cut(planned.numpy(), lengths, width, plan.page_size, split_pages)
    tiles = tiled(whole, lengths, group, narrow, wide, split_tokens)
    return HostWork(
        tiles.astype(np.int32),
        np.r_[0, np.cumsum(num_splits)].astype(np.int32),
        split_tokens,
        has_wide=bool((tiles[:, 1] * group > narrow).any()),
    )


_CACHE: WeakKeyDictionary[DecodePlan, dict[tuple[int, int, int], Work]] = WeakKeyDictionary()


def work_list(plan: DecodePlan, group: int, narrow: int, wide: int) -> Work:
    """`host_work` on the device, made once a plan, for the first layer.

    For a plan of `DecodePlanner` this does not wait for the device.
    """
    known = _CACHE.setdefault(plan, {})
    shape = (group, narrow, wide)
    if shape not in known:
        made, device = host_work(plan, *shape), plan.lengths.device
        known[shape] = Work(
            items=torch.tensor(made.items, device="cpu").to(device),  # a copy, as the array may be read-only
            first_slot=torch.tensor(made.first_slot, device="cpu").to(device),
            num_slots=made.num_slots,
            split_tokens=made.split_tokens,
            has_wide=made.has_wide,
            is_direct=made.num_slots == len(plan.rows),
        )
    return known[shape]


def set_work(plan: DecodePlan, group: int, narrow: int, wide: int, work: Work) -> None:
    """Set what `work_list` returns for a plan."""
    _CACHE.setdefault(plan, {})[group, narrow, wide] = work
