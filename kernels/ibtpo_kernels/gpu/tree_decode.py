# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Decode over paged keys and values: B queries, each against its own path, shared pages read once for all sharers.

    out_b = sum_j 2^(s_bj - top_b) v_j / total_b,    s_bj = scale log2(e) q_b k_j,    j in [0, lengths[b])

`partials` runs the flat list of `work`: an item holds the rows (queries x heads of the group) that share a split's
pages, and writes (top, total, acc) a row; `merge` folds each row's partial results from the last split to the first.
If no path is longer than a split there is nothing to merge and `partials` writes the output.

Two tile heights share one launch: 16 rows for private pages, 64 (32 for heads of 256) for shared ones. A launch with
high tiles has more warps, which sum a row in another order. So a result has the same bits in every batch, except that
it changes by rounding when its query moves to the other height, or the launch gains its first or loses its last high
tile. A `uniform` plan has only low tiles.

A needed page that the table or the cache lacks is not read: it makes the query's output NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import reference
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.blocks import products_of_rows
from ibtpo_kernels.gpu.launch import FUSED, LOG2_E, dot_precision, on_device, rows_dense
from ibtpo_kernels.gpu.work import work_list
from ibtpo_kernels.plan import DecodePlan


@triton.jit
def _fold(top, total, acc, other_top, other_total, other_acc):
    """Merge two partial results of the same rows; an empty one (top = -inf) changes nothing, not even a bit."""
    new_top = tl.maximum(top, other_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep, take = tl.exp2(top - base), tl.exp2(other_top - base)
    return new_top, total * keep + other_total * take, keep, take


@triton.jit
def _split(
    q, q_at, inside, lengths, table_ptr, k_ptr, v_ptr, num_pages, begin, stop, in_table, stride_slot, scale_log2,
    HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(top, total, acc) of keys [begin, stop) of one path; its row of the table has room for the first `in_table`.

    If STEP < DIM, q is read again, STEP numbers at a time.
    """
    dims = tl.arange(0, DIM)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for j0 in range(begin, stop, BLOCK_N):
        keys = j0 + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + keys // PAGE, mask=keys < min(stop, in_table), other=-1)
        there = (page >= 0) & (page < num_pages)
        at = (page.to(tl.int64) * PAGE + keys % PAGE) * stride_slot
        mask = there[:, None] & (dims < HEAD)[None, :]
        if STEP == DIM:
            k = tl.load(k_ptr + at[:, None] + dims[None, :], mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        else:
            s = scale_log2 * products_of_rows(
                q_at, inside, k_ptr + at, there, HEAD, DIM, STEP, BLOCK_M, BLOCK_N, PRECISION
            )
        s += tl.where(there, 0.0, float("nan"))[None, :]
        s = tl.where((keys < stop)[None, :] & (keys[None, :] < lengths[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + at[:, None] + dims[None, :], mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit
def _item(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, first_slot_ptr, acc_ptr, sums_ptr, out_ptr,
    query_begin, num_queries, split, is_open, num_heads, num_pages, table_width, stride_qb, stride_qh, stride_slot,
    scale_log2, SPLIT: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One item: rows r = (query r // GROUP, head r % GROUP of this key/value head's group)."""
    kv_head = tl.program_id(1)
    lane, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    inside = lane < num_queries * GROUP
    query, head = query_begin + lane // GROUP, kv_head * GROUP + lane % GROUP
    lengths = tl.load(lengths_ptr + query, mask=inside, other=0)
    longest = tl.max(lengths, 0)
    q_at = q_ptr + query.to(tl.int64) * stride_qb + head * stride_qh
    q = tl.load(q_at[:, None] + dims[None, :], mask=inside[:, None] & (dims < HEAD)[None, :], other=0.0)
    table_ptr += tl.load(rows_ptr + query_begin).to(tl.int64) * table_width
    k_ptr += kv_head * HEAD
    v_ptr += kv_head * HEAD
    count = 1
    if is_open != 0:
        count = max(tl.cdiv(longest, SPLIT) - split, 1)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for back in range(count):
        begin = (split + count - 1 - back) * SPLIT
        part_top, part_total, part_acc = _split(
            q, q_at, inside, lengths, table_ptr, k_ptr, v_ptr, num_pages, begin, min(begin + SPLIT, longest),
            table_width * PAGE, stride_slot, scale_log2, HEAD, DIM, STEP, PAGE, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        top, total, keep, take = _fold(part_top, part_total, part_acc, top, total, acc)
        acc = part_acc * keep[:, None] + acc * take[:, None]
    kept = inside[:, None] & (dims < HEAD)[None, :]
    if DIRECT:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = (query.to(tl.int64) * num_heads + head)[:, None] * HEAD + dims[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=kept)
    else:
        slot = tl.load(first_slot_ptr + query, mask=inside, other=0) + split
        row = slot.to(tl.int64) * num_heads + head
        tl.store(acc_ptr + row[:, None] * HEAD + dims[None, :], acc, mask=kept)
        tl.store(sums_ptr + row * 2, top, mask=inside)
        tl.store(sums_ptr + row * 2 + 1, total, mask=inside)


@triton.jit(do_not_specialize=["num_pages", "table_width"])
def partials(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, items_ptr, first_slot_ptr, acc_ptr, sums_ptr, out_ptr,
    num_heads, num_pages, table_width, stride_qb, stride_qh, stride_slot, scale_log2,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    PAGE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WIDE: tl.constexpr,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial results of one item and one key/value head, in the tile that fits the item's rows."""
    item = items_ptr + tl.program_id(0) * 4
    query_begin, num_queries = tl.load(item), tl.load(item + 1)
    split, is_open = tl.load(item + 2), tl.load(item + 3)
    if HAS_WIDE and num_queries * GROUP > NARROW:
        _item(
            q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, first_slot_ptr, acc_ptr, sums_ptr, out_ptr,
            query_begin, num_queries, split, is_open, num_heads, num_pages, table_width, stride_qb, stride_qh,
            stride_slot, scale_log2, SPLIT, GROUP, HEAD, DIM, STEP, PAGE, WIDE, BLOCK_N, DIRECT, PRECISION,
        )  # fmt: skip
    else:
        _item(
            q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, first_slot_ptr, acc_ptr, sums_ptr, out_ptr,
            query_begin, num_queries, split, is_open, num_heads, num_pages, table_width, stride_qb, stride_qh,
            stride_slot, scale_log2, SPLIT, GROUP, HEAD, DIM, STEP, PAGE, NARROW, BLOCK_N, DIRECT, PRECISION,
        )  # fmt: skip


@triton.jit
def merge(acc_ptr, sums_ptr, first_slot_ptr, out_ptr, num_heads, HEAD: tl.constexpr, DIM: tl.constexpr):
    """One query and head: fold its splits from the last to the first, then normalise."""
    query, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, DIM)
    begin, end = tl.load(first_slot_ptr + query), tl.load(first_slot_ptr + query + 1)
    acc = tl.zeros([DIM], tl.float32)
    top, total = float("-inf"), 0.0
    for back in range(end - begin):
        row = (end - 1 - back).to(tl.int64) * num_heads + head
        part_top, part_total = tl.load(sums_ptr + row * 2), tl.load(sums_ptr + row * 2 + 1)
        part_acc = tl.load(acc_ptr + row * HEAD + dims, mask=dims < HEAD, other=0.0)
        top, total, keep, take = _fold(part_top, part_total, part_acc, top, total, acc)
        acc = part_acc * keep + acc * take
    out = acc / tl.where(total == 0.0, 1.0, total)
    at = (query.to(tl.int64) * num_heads + head) * HEAD + dims
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD)


def _check_pages(plan: DecodePlan, num_pages: int) -> None:
    """Raise for a missing page on the CPU; on a GPU, where raising would wait for the device, the output is NaN."""
    needed = -(-plan.lengths // plan.page_size)
    table = plan.page_table[plan.rows.long()]
    columns = torch.arange(table.shape[1], dtype=needed.dtype, device=table.device)
    bad = ((columns < needed[:, None]) & ((table < 0) | (table >= num_pages))).any(-1) | (needed > table.shape[1])
    if bad.any():
        b = int(bad.nonzero()[0])
        row, length = int(plan.rows[b]), int(plan.lengths[b])
        raise ValueError(f"tree_decode: query {b} of length {length} needs a page that table row {row} lacks")


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """As `ibtpo_kernels.tree_decode`; the first call with a plan makes its work list, later ones only launch."""
    if q.shape[2] > configs.MAX_HEAD:
        return reference.tree_decode(q, k_pages, v_pages, plan, scale)
    q = rows_dense(q)
    num_queries, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    group, dim = num_heads // num_kv_heads, configs.padded(head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if q.is_cpu:
        _check_pages(plan, num_pages)
    narrow, wide = configs.decode_rows(group, dim, q.element_size(), uniform=plan.uniform)
    work = work_list(plan, group, narrow, wide)
    tiles = configs.decode(head_dim, q.element_size(), work.has_wide, configs.capability(q.device))
    num_slots = 0 if work.is_direct else work.num_slots
    acc = torch.empty(num_slots, num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(num_slots, num_heads, 2, dtype=torch.float32, device=q.device)
    with on_device(q):
        partials[(len(work.items), num_kv_heads)](
            q, k_pages, v_pages, plan.page_table, plan.rows, plan.lengths, work.items, work.first_slot, acc, sums, out,
            num_heads, num_pages, plan.page_table.shape[1], q.stride(0), q.stride(1), num_kv_heads * head_dim,
            scale * LOG2_E, SPLIT=work.split_tokens, GROUP=group, HEAD=head_dim, DIM=dim, STEP=tiles.steps(dim),
            PAGE=page_size, NARROW=narrow, WIDE=wide, BLOCK_N=tiles.block_n, HAS_WIDE=work.has_wide,
            DIRECT=work.is_direct, PRECISION=dot_precision(q.dtype), **tiles.options,
        )  # fmt: skip
        if not work.is_direct:
            merge[(num_queries, num_heads)](
                acc, sums, work.first_slot, out, num_heads, HEAD=head_dim, DIM=dim, **FUSED, num_warps=1
            )
    return out
