# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Backward of tree attention: two deterministic kernels, no atomics; the formulas are in `tree_attention`.

The queries that see a key block are the contiguous range [j0, high). dK/dV of a block walk it for each query head of
the group, in one loop, and sum in registers.

    queries    j0          j0 + BLOCK_N            low                    high
               [ partial ... ) [ full ............. ) [ partial ........... )

dQ walks the key blocks as the forward does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.blocks import (
    CHUNK,
    NEVER,
    ends_of,
    next_run,
    of_kind,
    products_of_rows,
    rows_of,
    stream,
    streamed,
    strides,
)
from ibtpo_kernels.gpu.launch import FUSED, LOG2_E, dot_precision, on_device

Stats = tuple[Tensor, Tensor]  # (lse, delta), each [Hq, N]


@triton.jit(do_not_specialize=["num_tokens"])
def row_products(
    out_ptr, d_out_ptr, delta_ptr, num_tokens, stride_on, stride_oh, stride_dn, stride_dh,
    HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = sum_d out * d_out."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    dims = tl.arange(0, DIM)
    out = rows_of(out_ptr + head * stride_oh, first, num_tokens, stride_on, dims, HEAD, DIM, BLOCK, True)
    d_out = rows_of(d_out_ptr + head * stride_dh, first, num_tokens, stride_dn, dims, HEAD, DIM, BLOCK, True)
    rows = first + tl.arange(0, BLOCK)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * num_tokens + rows, delta, mask=rows < num_tokens)


@triton.jit
def _numbers_of(ptr, rows, count, CUT: tl.constexpr):
    """One number a row; zeros past `count` (if CUT)."""
    return tl.load(ptr + rows, mask=rows < count, other=0.0) if CUT else tl.load(ptr + rows)


@triton.jit
def _keys_step(
    dk, dv, k, v, k_at, v_at, q_at, d_out_at, end_ptr, lse_ptr, delta_ptr, head, j0, first, num_tokens, stride_qn,
    stride_qh, stride_dn, stride_dh, scale_log2, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of queries [first, first + BLOCK_M) of one head to dK and dV."""
    if not TMA:
        q_at += head * stride_qh
        d_out_at += head * stride_dh
    lse_ptr += head.to(tl.int64) * num_tokens
    delta_ptr += head.to(tl.int64) * num_tokens
    dims = tl.arange(0, DIM)
    queries = first + tl.arange(0, BLOCK_M)
    if STEP == DIM:
        q = stream(q_at, head, first, num_tokens, stride_qn, dims, HEAD, DIM, BLOCK_M, PARTIAL, TMA)
        d_out = stream(d_out_at, head, first, num_tokens, stride_dn, dims, HEAD, DIM, BLOCK_M, PARTIAL, TMA)
    lse = _numbers_of(lse_ptr, queries, num_tokens, PARTIAL)
    if STEP == DIM:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        keys = j0 + tl.arange(0, BLOCK_N)
        s = products_of_rows(
            k_at, keys < num_tokens, q_at + queries.to(tl.int64) * stride_qn, queries < num_tokens, HEAD, DIM, STEP,
            BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip
    s = s * scale_log2 - lse[None, :]
    if PARTIAL:
        keys = j0 + tl.arange(0, BLOCK_N)
        ends = tl.load(end_ptr + keys, mask=keys < num_tokens, other=0)
        seen = (keys[:, None] <= queries[None, :]) & (queries[None, :] < ends[:, None])
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s)
    if STEP != DIM:
        d_out = rows_of(d_out_at, first, num_tokens, stride_dn, dims, HEAD, DIM, BLOCK_M, PARTIAL)
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    if STEP == DIM:
        dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    else:
        dp = products_of_rows(
            v_at, keys < num_tokens, d_out_at + queries.to(tl.int64) * stride_dn, queries < num_tokens, HEAD, DIM, STEP,
            BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip
        q = rows_of(q_at, first, num_tokens, stride_qn, dims, HEAD, DIM, BLOCK_M, PARTIAL)
    delta = _numbers_of(delta_ptr, queries, num_tokens, PARTIAL)  # late: leaves 16 registers to the products above
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_tokens"])
def backward_keys(
    q_ptr, k_ptr, v_ptr, end_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, num_tokens, scale, scale_log2,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_dn, stride_dh, stride_gn, stride_gh,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key/value head: sum over the group's heads, then over queries in order."""
    j0, kv_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    dims = tl.arange(0, DIM)
    keys = j0 + tl.arange(0, BLOCK_N)
    inside = keys < num_tokens
    k = rows_of(k_ptr + kv_head * stride_kh, j0, num_tokens, stride_kn, dims, HEAD, DIM, BLOCK_N, True)
    v = rows_of(v_ptr + kv_head * stride_vh, j0, num_tokens, stride_vn, dims, HEAD, DIM, BLOCK_N, True)
    k_at = k_ptr + kv_head * stride_kh + keys.to(tl.int64) * stride_kn
    v_at = v_ptr + kv_head * stride_vh + keys.to(tl.int64) * stride_vn
    ends = tl.load(end_ptr + keys, mask=inside, other=0)
    # query blocks [begin, full_begin) and [full_end, stop) need the mask, [full_begin, full_end) does not
    # (clamped: an end past the last token, which a GPU does not report, must not reach queries that do not exist)
    begin, stop = j0 // BLOCK_M, tl.cdiv(min(tl.max(ends, 0), num_tokens), BLOCK_M)
    full_begin = min(tl.cdiv(j0 + BLOCK_N - 1, BLOCK_M), stop)
    low = min(tl.min(tl.where(inside, ends, NEVER), 0), num_tokens)
    full_end = min(max(low // BLOCK_M, full_begin), stop)
    num_full, num_head, num_partial = full_end - full_begin, full_begin - begin, full_begin - begin + stop - full_end
    dk = tl.zeros([BLOCK_N, DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, DIM], tl.float32)
    for t in range(GROUP * num_full):  # one loop over (head of the group, query block), so one pipeline
        dk, dv = _keys_step(
            dk, dv, k, v, k_at, v_at, q_ptr, d_out_ptr, end_ptr, lse_ptr, delta_ptr, kv_head * GROUP + t // num_full,
            j0, (full_begin + t % num_full) * BLOCK_M, num_tokens, stride_qn, stride_qh, stride_dn, stride_dh,
            scale_log2, HEAD, DIM, STEP, BLOCK_M, BLOCK_N, False, TMA, PRECISION,
        )  # fmt: skip
    for t in range(GROUP * num_partial):
        nth = t % num_partial
        block = tl.where(nth < num_head, begin + nth, full_end + nth - num_head)
        dk, dv = _keys_step(
            dk, dv, k, v, k_at, v_at, q_ptr, d_out_ptr, end_ptr, lse_ptr, delta_ptr, kv_head * GROUP + t // num_partial,
            j0, block * BLOCK_M, num_tokens, stride_qn, stride_qh, stride_dn, stride_dh, scale_log2, HEAD, DIM, STEP,
            BLOCK_M, BLOCK_N, True, TMA, PRECISION,
        )  # fmt: skip
    at = kv_head * stride_gh + keys.to(tl.int64)[:, None] * stride_gn + dims[None, :]
    kept = inside[:, None] & (dims < HEAD)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=kept)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _queries_pass(
    dq, q, q_at, d_out, d_out_at, lse, delta, k_at, v_at, end_ptr, low_ptr, high_ptr, kv_head, first, num_tokens,
    stride_k, stride_v, scale_log2, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contributions of all full, or all partial, key blocks to dQ, in depth order."""
    last = min(first + BLOCK_M, num_tokens) - 1
    queries = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM)
    num_blocks = last // BLOCK_N + 1
    for chunk in range(0, num_blocks, CHUNK):
        blocks = chunk + tl.arange(0, CHUNK)
        wanted = of_kind(blocks, low_ptr, high_ptr, first, last, BLOCK_N, PARTIAL)
        before = of_kind(blocks - 1, low_ptr, high_ptr, first, last, BLOCK_N, PARTIAL) & (blocks > chunk)
        starts = wanted & ~before
        at = chunk
        for _ in range(tl.sum(starts.to(tl.int32), 0)):
            begin, at = next_run(blocks, wanted, starts, at, chunk + CHUNK)
            for block in range(begin, at):
                j0 = block * BLOCK_N
                keys = j0 + tl.arange(0, BLOCK_N)
                if STEP == DIM:
                    k = stream(k_at, kv_head, j0, num_tokens, stride_k, dims, HEAD, DIM, BLOCK_N, PARTIAL, TMA)
                    v = stream(v_at, kv_head, j0, num_tokens, stride_v, dims, HEAD, DIM, BLOCK_N, PARTIAL, TMA)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                else:
                    s = products_of_rows(
                        q_at, queries < num_tokens, k_at + keys.to(tl.int64) * stride_k, keys < num_tokens, HEAD, DIM,
                        STEP, BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
                s = s * scale_log2 - lse[:, None]
                if PARTIAL:
                    ends = tl.load(end_ptr + keys, mask=keys < num_tokens, other=0)
                    seen = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[None, :])
                    s = tl.where(seen, s, float("-inf"))
                p = tl.exp2(s)
                if STEP == DIM:
                    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
                else:
                    dp = products_of_rows(
                        d_out_at, queries < num_tokens, v_at + keys.to(tl.int64) * stride_v, keys < num_tokens, HEAD,
                        DIM, STEP, BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
                    k = rows_of(k_at, j0, num_tokens, stride_k, dims, HEAD, DIM, BLOCK_N, PARTIAL)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_tokens"])
def backward_queries(
    q_ptr, k_ptr, v_ptr, end_ptr, low_ptr, high_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, num_tokens, scale,
    scale_log2, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_dn, stride_dh,
    stride_gn, stride_gh,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < num_tokens
    q_ptr += head * stride_qh
    d_out_ptr += head * stride_dh
    q = rows_of(q_ptr, first, num_tokens, stride_qn, dims, HEAD, DIM, BLOCK_M, True)
    d_out = rows_of(d_out_ptr, first, num_tokens, stride_dn, dims, HEAD, DIM, BLOCK_M, True)
    q_at, d_out_at = q_ptr + queries.to(tl.int64) * stride_qn, d_out_ptr + queries.to(tl.int64) * stride_dn
    # rows past the end: P = 2^(0 - inf) = 0
    lse = tl.load(lse_ptr + head.to(tl.int64) * num_tokens + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + head.to(tl.int64) * num_tokens + queries, mask=inside, other=0.0)
    kv_head = head // GROUP
    if not TMA:
        k_ptr += kv_head * stride_kh
        v_ptr += kv_head * stride_vh
    dq = tl.zeros([BLOCK_M, DIM], tl.float32)
    for partial in tl.static_range(2):
        dq = _queries_pass(
            dq, q, q_at, d_out, d_out_at, lse, delta, k_ptr, v_ptr, end_ptr, low_ptr, high_ptr, kv_head, first,
            num_tokens, stride_kn, stride_vn, scale_log2, HEAD, DIM, STEP, BLOCK_M, BLOCK_N, partial == 1, TMA,
            PRECISION,
        )  # fmt: skip
    at = dq_ptr + head * stride_gh + queries.to(tl.int64)[:, None] * stride_gn + dims[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (dims < HEAD)[None, :])


def _backward_keys(q: Tensor, k: Tensor, v: Tensor, end: Tensor, d_out: Tensor, stats: Stats, scale: float) -> Tensor:
    """(dK, dV) stacked, [2, N, Hkv, D]."""
    num_tokens, num_heads, head_dim = q.shape
    grads = torch.empty(2, *k.shape, dtype=k.dtype, device=k.device)
    dim, group = configs.padded(head_dim), num_heads // k.shape[1]
    tiles = configs.tree_backward_keys(dim, q.element_size(), configs.capability(q.device))
    q_at, d_out_at, tma = streamed(q, d_out, tiles.block_m, tiles)
    backward_keys[(triton.cdiv(num_tokens, tiles.block_n), k.shape[1])](
        q_at, k, v, end, d_out_at, stats[0], stats[1], grads[0], grads[1], num_tokens, scale, scale * LOG2_E,
        *strides(q, k, v, d_out, grads[0]), GROUP=group, HEAD=head_dim, DIM=dim, STEP=tiles.steps(dim),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TMA=tma, PRECISION=dot_precision(q.dtype), **tiles.options,
    )  # fmt: skip
    return grads


def _backward_queries(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, d_out: Tensor, stats: Stats, scale: float
) -> Tensor:
    """dQ, [N, Hq, D]."""
    num_tokens, num_heads, head_dim = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dim, group = configs.padded(head_dim), num_heads // k.shape[1]
    tiles = configs.tree_backward_queries(dim, q.element_size(), configs.capability(q.device))
    low, high = ends_of(end, tiles.block_n)
    k_at, v_at, tma = streamed(k, v, tiles.block_n, tiles)
    backward_queries[(triton.cdiv(num_tokens, tiles.block_m), num_heads)](
        q, k_at, v_at, end, low, high, d_out, stats[0], stats[1], dq, num_tokens, scale, scale * LOG2_E,
        *strides(q, k, v, d_out, dq), GROUP=group, HEAD=head_dim, DIM=dim, STEP=tiles.steps(dim),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TMA=tma, PRECISION=dot_precision(q.dtype), **tiles.options,
    )  # fmt: skip
    return dq


def _row_products(out: Tensor, d_out: Tensor, delta: Tensor) -> None:
    num_tokens, num_heads, head_dim = out.shape
    row_products[(triton.cdiv(num_tokens, 64), num_heads)](
        out, d_out, delta, num_tokens, *strides(out, d_out), HEAD=head_dim, DIM=configs.padded(head_dim), BLOCK=64,
        **FUSED, num_warps=4, maxnreg=255,
    )  # fmt: skip


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    wants_q: bool,
    wants_kv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv); lse [Hq, N] in base 2, from the forward."""
    stats = lse, torch.empty_like(lse)
    dq, dk, dv = None, None, None
    with on_device(q):
        _row_products(out, d_out, stats[1])
        if wants_q:
            dq = _backward_queries(q, k, v, end, d_out, stats, scale)
        if wants_kv:
            dk, dv = _backward_keys(q, k, v, end, d_out, stats, scale)
    return dq, dk, dv
