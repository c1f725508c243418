# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""A matrix product in which a row's result does not depend on the other rows.

    out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]

A program computes one tile of `out` from all of K, block by block in ascending order: there is no split of K, and the
tile is the same for every number of rows, so a row has the same bits alone and in any batch. The price: with few rows
and columns there are few programs, each of which reads its weights alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import linear
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.launch import dot_precision, on_device

_BLOCK_K = 64


@triton.jit(do_not_specialize=["num_rows"])
def product(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, num_cols, depth, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * depth + ks[None, :]
    weight_at = weight_ptr + cols[None, :] * depth + ks[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        inside = ks < depth - k
        x = tl.load(x_at + k, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at + k, mask=(cols < num_cols)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(out_ptr + rows[:, None] * num_cols + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_cols, depth = weight.shape
    num_rows = x.shape[:-1].numel()
    out = torch.empty(*x.shape[:-1], num_cols, dtype=x.dtype, device=x.device)
    if out.numel():
        tiles = configs.linear(x.element_size())
        grid = (triton.cdiv(num_rows, tiles.block_m), triton.cdiv(num_cols, tiles.block_n))
        with on_device(x):
            product[grid](
                x, weight, bias, out, num_rows, num_cols, depth, HAS_BIAS=bias is not None,
                PRECISION=dot_precision(x.dtype), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=_BLOCK_K,
                **tiles.options,
            )  # fmt: skip
    return out


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear.batch_invariant_linear(x, weight, bias, _product)
