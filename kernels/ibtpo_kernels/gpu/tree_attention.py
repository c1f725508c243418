# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Tree attention, forward and backward: query i sees key j <=> j <= i < end[j].

With c = scale * log2(e), S = c q k^T + mask, L_i = log2 sum_j 2^S_ij, P = 2^(S - L):

    out = P v           dv_j = sum_i P_ij d_out_i           dS = P * (d_out v^T - delta),  delta_i = out_i . d_out_i
                        dq_i = scale sum_j dS_ij k_j        dk_j = scale sum_i dS_ij q_i

`blocks` says which key blocks are skipped, full or partial. The forward walks the runs of full blocks, then the runs of
partial ones: two loops without branches, which the compiler can pipeline. No atomics; each sum has one order.

Source: FlashAttention-2 (Dao, 2023); the mask from subtree ends is ours.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import reference
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.blocks import (
    CHUNK,
    ends_of,
    next_run,
    of_kind,
    products_of_rows,
    rows_of,
    stream,
    streamed,
    strides,
)
from ibtpo_kernels.gpu.launch import LOG2_E, dot_precision, on_device, rows_dense
from ibtpo_kernels.gpu.tree_attention_backward import gradients
from ibtpo_kernels.gradients import needs_grad, once_differentiable


@triton.jit
def _forward_pass(
    acc, total, top, q, q_at, k_at, v_at, end_ptr, low_ptr, high_ptr, kv_head, first, num_tokens, stride_k, stride_v,
    scale_log2, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold all full, or all partial, key blocks into (acc, total, top), in depth order."""
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
                if STEP == DIM:
                    k = stream(k_at, kv_head, j0, num_tokens, stride_k, dims, HEAD, DIM, BLOCK_N, PARTIAL, TMA)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                else:
                    rows = j0 + tl.arange(0, BLOCK_N)
                    s = products_of_rows(
                        q_at, queries < num_tokens, k_at + rows.to(tl.int64) * stride_k, rows < num_tokens, HEAD, DIM,
                        STEP, BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
                if PARTIAL:
                    keys = j0 + tl.arange(0, BLOCK_N)
                    ends = tl.load(end_ptr + keys, mask=keys < num_tokens, other=0)
                    seen = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[None, :])
                    s = tl.where(seen, s, float("-inf"))
                new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
                base = new_top
                if PARTIAL:
                    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # the row has seen no key yet
                p = tl.exp2(s * scale_log2 - base[:, None])
                shrink = tl.exp2(top - base)
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None]
                v = stream(v_at, kv_head, j0, num_tokens, stride_v, dims, HEAD, DIM, BLOCK_N, PARTIAL, TMA)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_tokens"])
def forward(
    q_ptr, k_ptr, v_ptr, end_ptr, low_ptr, high_ptr, out_ptr, lse_ptr, num_tokens, scale_log2,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse = L (base 2) of BLOCK_M queries of one head; the last queries, which see most, go first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    queries = first + tl.arange(0, BLOCK_M)
    q_ptr += head * stride_qh
    q = rows_of(q_ptr, first, num_tokens, stride_qn, dims, HEAD, DIM, BLOCK_M, True)
    q_at = q_ptr + queries.to(tl.int64) * stride_qn
    kv_head = head // GROUP
    if not TMA:
        k_ptr += kv_head * stride_kh
        v_ptr += kv_head * stride_vh
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for partial in tl.static_range(2):
        acc, total, top = _forward_pass(
            acc, total, top, q, q_at, k_ptr, v_ptr, end_ptr, low_ptr, high_ptr, kv_head, first, num_tokens, stride_kn,
            stride_vn, scale_log2, HEAD, DIM, STEP, BLOCK_M, BLOCK_N, partial == 1, TMA, PRECISION,
        )  # fmt: skip
    inside = queries < num_tokens
    total = tl.where(inside, total, 1.0)
    at = out_ptr + head * stride_oh + queries.to(tl.int64)[:, None] * stride_on + dims[None, :]
    tl.store(at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (dims < HEAD)[None, :])
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + queries, top + tl.log2(total), mask=inside)


def _forward(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, Hq, D], lse [Hq, N] in base 2)."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    dim = configs.padded(head_dim)
    tiles = configs.tree_forward(dim, q.element_size(), configs.capability(q.device))
    with on_device(q):
        low, high = ends_of(end, tiles.block_n)
        k_at, v_at, tma = streamed(k, v, tiles.block_n, tiles)
        forward[(triton.cdiv(num_tokens, tiles.block_m), num_heads)](
            q, k_at, v_at, end, low, high, out, lse, num_tokens, scale * LOG2_E, *strides(q, k, v, out),
            GROUP=num_heads // k.shape[1], HEAD=head_dim, DIM=dim, STEP=tiles.steps(dim), BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n, TMA=tma, PRECISION=dot_precision(q.dtype), **tiles.options,
        )  # fmt: skip
    return out, lse


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
        out, lse = _forward(q, k, v, end, scale)
        ctx.save_for_backward(q, k, v, out, lse, end)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        q, k, v, out, lse, end = ctx.saved_tensors
        d_out = rows_dense(d_out)
        wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
        dq, dk, dv = gradients(q, k, v, end, out, lse, d_out, ctx.scale, wants_q, wants_k or wants_v)
        return dq, dk if wants_k else None, dv if wants_v else None, None, None


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
    """As `ibtpo_kernels.tree_attention`; head sizes above 256 go to the reference."""
    if q.shape[2] > configs.MAX_HEAD:
        return reference.tree_attention(q, k, v, end, scale)
    if scale <= 0:  # the kernels scale a row's maximum, which needs a positive scale
        return tree_attention(-q, k, v, end, -scale) if scale < 0 else tree_attention(q * 0, k, v, end, 1.0)
    q, k, v, end = rows_dense(q), rows_dense(k), rows_dense(v), end.contiguous()
    if not q.numel():
        return q + (k.sum() + v.sum())  # empty, differentiable in all three
    if needs_grad(q, k, v):
        out: Tensor = _TreeAttention.apply(q, k, v, end, scale)
        return out
    return _forward(q, k, v, end, scale)[0]
