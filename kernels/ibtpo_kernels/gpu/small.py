# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""The ops between the matrix products: bound by memory, so each reads its inputs once and writes its outputs once.

    rope         (x1 cos - x2 sin, x2 cos + x1 sin); its backward is the rotation by the opposite angle
    silu_mul     round(g sigmoid(g)) * u

and the ops that fill the pages: `append_kv`, and `rope_append`, which norms and rotates first. Rounding follows
transformers: to the input's type at each `round`. Slots and rows are addressed in 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import gradients
from ibtpo_kernels.gpu.launch import FUSED, on_device, rows_dense


@triton.jit
def _halves(x_ptr, token, heads, cols, stride_n, stride_h, mask, HALF: tl.constexpr):
    """The two halves of one token's heads, float32 [H, P]."""
    at = x_ptr + token * stride_n + heads[:, None] * stride_h + cols[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return x1, tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_n, stride_h, direction,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    """One token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, HEADS_PADDED), tl.arange(0, HALF_PADDED)
    mask = (heads < HEADS)[:, None] & (cols < HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)[None, :] * direction
    x1, x2 = _halves(x_ptr, token, heads, cols, stride_n, stride_h, mask, HALF)
    at = out_ptr + (token * HEADS + heads[:, None]) * (2 * HALF) + cols[None, :]
    tl.store(at, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


def _angles(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = rows_dense(x)
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        half = head_dim // 2
        with on_device(x):
            rotate[(num_tokens,)](
                x, cos, sin, out, x.stride(0), x.stride(1), direction, HEADS=num_heads, HALF=half,
                HEADS_PADDED=triton.next_power_of_2(num_heads), HALF_PADDED=triton.next_power_of_2(half), **FUSED,
                num_warps=4,
            )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return gradients.rope(x, _angles(cos), _angles(sin), _rotate)


@triton.jit
def append(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, stride_kn, stride_kh, stride_vn, stride_vh, num_slots,
    HEADS: tl.constexpr, DIM: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One token's keys and values into its slot; nothing is written for a slot outside [0, num_slots)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads, cols = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, DIM_PADDED)[None, :]
    mask = (heads < tl.where((slot >= 0) & (slot < num_slots), HEADS, 0)) & (cols < DIM)
    at = slot * (HEADS * DIM) + heads * DIM + cols
    k = tl.load(k_ptr + token * stride_kn + heads * stride_kh + cols, mask=mask)
    v = tl.load(v_ptr + token * stride_vn + heads * stride_vh + cols, mask=mask)
    tl.store(k_pages_ptr + at, k, mask=mask)
    tl.store(v_pages_ptr + at, v, mask=mask)


def _check_slots(op: str, slots: Tensor, num_slots: int) -> None:
    """Raise for a bad slot on the CPU; a GPU skips it, since raising would wait for the device."""
    if slots.is_cpu:
        bad = ((slots < -1) | (slots >= num_slots)).nonzero()
        if len(bad):
            raise ValueError(f"{op}: slots[{int(bad[0])}] = {int(slots[bad[0]])}; expected values in [-1, {num_slots})")


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k, v, slots = rows_dense(k), rows_dense(v), slots.contiguous()
    num_tokens, num_heads, head_dim = k.shape
    num_slots = k_pages.shape[0] * k_pages.shape[1]
    _check_slots("append_kv", slots, num_slots)
    if k.numel():
        with on_device(k):
            append[(num_tokens,)](
                k, v, k_pages, v_pages, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), num_slots,
                HEADS=num_heads, DIM=head_dim, HEADS_PADDED=triton.next_power_of_2(num_heads),
                DIM_PADDED=triton.next_power_of_2(head_dim), **FUSED, num_warps=4,
            )  # fmt: skip


@triton.jit
def _normed_and_rotated(
    x_ptr, weight_ptr, cos, sin, token, heads, cols, stride_n, stride_h, eps, mask,
    HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The two rotated halves of one token's heads, in the type of x."""
    x1, x2 = _halves(x_ptr, token, heads, cols, stride_n, stride_h, mask, HALF)
    if NORM:
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
        w1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        kind = x_ptr.dtype.element_ty
        x1 = ((x1 * scale).to(kind).to(tl.float32) * w1).to(kind).to(tl.float32)
        x2 = ((x2 * scale).to(kind).to(tl.float32) * w2).to(kind).to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def norm_rotate_append(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, out_ptr, k_pages_ptr, v_pages_ptr, slots_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, num_slots, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, Q_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """One token: q normed and rotated into out, k normed and rotated into its slot, v into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    cols = tl.arange(0, HALF_PADDED)
    q_heads, k_heads = tl.arange(0, Q_PADDED), tl.arange(0, K_PADDED)
    cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    q_mask = (q_heads < Q_HEADS)[:, None] & (cols < HALF)[None, :]
    written = tl.where((slot >= 0) & (slot < num_slots), K_HEADS, 0)
    k_mask = (k_heads < written)[:, None] & (cols < HALF)[None, :]
    q1, q2 = _normed_and_rotated(
        q_ptr, q_weight_ptr, cos, sin, token, q_heads, cols, stride_qn, stride_qh, eps, q_mask, HALF, Q_NORM
    )
    at = out_ptr + (token * Q_HEADS + q_heads[:, None]) * (2 * HALF) + cols[None, :]
    tl.store(at, q1.to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(at + HALF, q2.to(out_ptr.dtype.element_ty), mask=q_mask)
    k1, k2 = _normed_and_rotated(
        k_ptr, k_weight_ptr, cos, sin, token, k_heads, cols, stride_kn, stride_kh, eps, k_mask, HALF, K_NORM
    )
    at = (slot * K_HEADS + k_heads[:, None]) * (2 * HALF) + cols[None, :]
    tl.store(k_pages_ptr + at, k1.to(k_pages_ptr.dtype.element_ty), mask=k_mask)
    tl.store(k_pages_ptr + at + HALF, k2.to(k_pages_ptr.dtype.element_ty), mask=k_mask)
    v_at = v_ptr + token * stride_vn + k_heads[:, None] * stride_vh + cols[None, :]
    tl.store(v_pages_ptr + at, tl.load(v_at, mask=k_mask), mask=k_mask)
    tl.store(v_pages_ptr + at + HALF, tl.load(v_at + HALF, mask=k_mask), mask=k_mask)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    q, k, v, slots = rows_dense(q), rows_dense(k), rows_dense(v), slots.contiguous()
    cos, sin = _angles(cos), _angles(sin)
    num_tokens, num_heads, head_dim = q.shape
    num_slots, half = k_pages.shape[0] * k_pages.shape[1], head_dim // 2
    _check_slots("rope_append", slots, num_slots)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        with on_device(q):
            norm_rotate_append[(num_tokens,)](
                q, k, v, cos, sin, None if q_weight is None else q_weight.contiguous(),
                None if k_weight is None else k_weight.contiguous(), out, k_pages, v_pages, slots, q.stride(0),
                q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), num_slots, eps, Q_HEADS=num_heads,
                K_HEADS=k.shape[1], HALF=half, Q_PADDED=triton.next_power_of_2(num_heads),
                K_PADDED=triton.next_power_of_2(k.shape[1]), HALF_PADDED=triton.next_power_of_2(half),
                Q_NORM=q_weight is not None, K_NORM=k_weight is not None, **FUSED, num_warps=8,
            )  # fmt: skip
    return out


@triton.jit
def gate_forward(gate_ptr, up_ptr, out_ptr, num_cols, stride_gate, stride_up, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * num_cols + cols, out.to(up.dtype), mask=mask)


@triton.jit
def gate_backward(
    gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, num_cols, stride_gate, stride_up, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    kind = d_gate_ptr.dtype.element_ty
    at = row * num_cols + cols
    tl.store(d_gate_ptr + at, (d_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(kind), mask=mask)
    tl.store(d_up_ptr + at, (d_out * (gate * sigmoid).to(kind).to(tl.float32)).to(kind), mask=mask)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows, and their stride; halves of a fused gate-up projection are not copied."""
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    return (x, x.stride(0)) if x.dim() == 2 else (x, x.shape[-1] if x.dim() else 1)


def _gate_shape(x: Tensor) -> tuple[tuple[int, int], int, int]:
    num_cols = x.shape[-1] if x.dim() else 1
    block = min(1024, triton.next_power_of_2(num_cols))
    return (x.numel() // num_cols, triton.cdiv(num_cols, block)), num_cols, block


def _gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        grid, num_cols, block = _gate_shape(gate)
        (gate, stride_gate), (up, stride_up) = _rows(gate), _rows(up)
        with on_device(gate):
            gate_forward[grid](gate, up, out, num_cols, stride_gate, stride_up, BLOCK=block, **FUSED, num_warps=4)
    return out


def _gate_backward(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel():
        grid, num_cols, block = _gate_shape(gate)
        (gate, stride_gate), (up, stride_up) = _rows(gate), _rows(up)
        with on_device(gate):
            gate_backward[grid](
                gate, up, d_out.contiguous(), d_gate, d_up, num_cols, stride_gate, stride_up, BLOCK=block, **FUSED,
                num_warps=4,
            )  # fmt: skip
    return d_gate, d_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gradients.silu_mul(gate, up, _gate_forward, _gate_backward)
