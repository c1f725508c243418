# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""RMS norm, forward and backward: bound by memory, so each reads its inputs once and writes its outputs once.

    y = w * round(x r),  r = 1 / sqrt(mean(x^2) + eps)
    with xh = x r and d = dy * w:    dx = r (d - xh mean(d xh)),    dw = sum over rows of dy * round(xh)

`add_rms_norm` norms t = round(x + residual), writes t too, and adds dt to dx.

`round` is to the type of x, as in transformers. The rows of dw are summed by a fixed number of programs, each in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import gradients
from ibtpo_kernels.gpu.launch import FUSED, on_device

_TILE = 4096  # elements of a program of the norms
_PARTIALS = 256  # programs of the norm's backward, each with its own partial sum of the weight's gradient


@triton.jit
def _normed(x, weight, eps, SIZE: tl.constexpr):
    """rms_norm of rows x [R, P] in float32, zero past SIZE; rounded to the weight's type before the product."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    y = (x * scale[:, None]).to(weight.dtype)
    return (y.to(tl.float32) * weight.to(tl.float32)[None, :]).to(weight.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, num_rows, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, PADDED)
    mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
    at = rows[:, None] * SIZE + cols[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(weight.dtype)
        tl.store(total_ptr + at, total, mask=mask)
        x = total.to(tl.float32)
    tl.store(out_ptr + at, _normed(x, weight, eps, SIZE), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward(
    x_ptr, weight_ptr, d_out_ptr, d_total_ptr, dx_ptr, partial_ptr, num_rows, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dx of every num_programs-th tile of rows, and the sum of their dy * xh in order."""
    cols = tl.arange(0, PADDED)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    partial = tl.zeros([ROWS, PADDED], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
        at = rows[:, None] * SIZE + cols[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
        xh, d = x * scale, d_out * weight[None, :]
        dx = scale * (d - xh * (tl.sum(d * xh, 1) / SIZE)[:, None])
        if ADD:
            dx += tl.load(d_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        partial += d_out * xh.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * SIZE + cols, tl.sum(partial, 0), mask=cols < SIZE)


def _tile(size: int) -> dict[str, int]:
    padded = triton.next_power_of_2(size)
    rows = max(1, _TILE // padded)
    return {"SIZE": size, "PADDED": padded, "ROWS": rows, "num_warps": min(16, max(4, padded * rows // 1024)), **FUSED}


def _norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, x + residual); without a residual the second is x."""
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    size = x.shape[-1]
    if x.numel():
        shape = _tile(size)
        num_rows = x.numel() // size
        with on_device(x):
            norm_forward[(triton.cdiv(num_rows, shape["ROWS"]),)](
                x, residual, weight, out, total, num_rows, eps, **shape, ADD=residual is not None
            )  # fmt: skip
    return out, total


def _norm_backward(
    x: Tensor, weight: Tensor, d_out: Tensor, d_total: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx, d_weight); `d_total`, if any, is added to dx."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    size = x.shape[-1]
    num_rows, shape = x.numel() // size, _tile(size)
    programs = min(_PARTIALS, triton.cdiv(num_rows, shape["ROWS"]))
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    d_total = None if d_total is None else d_total.contiguous()
    with on_device(x):
        norm_backward[(programs,)](
            x, weight, d_out.contiguous(), d_total, dx, partial, num_rows, eps, **shape, ADD=d_total is not None
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_forward(x, None, weight, eps)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gradients.rms_norm(x.contiguous(), weight.contiguous(), eps, _rms_norm, _norm_backward)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    return gradients.add_rms_norm(x, residual, weight, eps, _norm_forward, _norm_backward)
