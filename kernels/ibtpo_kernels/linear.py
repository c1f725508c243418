"""The gradient of batch-invariant products, shared by all compiled backends, and a test for slow bfloat16 in torch."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ibtpo_kernels.gradients import needs_grad, once_differentiable
from ibtpo_kernels.logits import without_autocast

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # dense x, weight, bias -> x weight^T + bias


@cache
def _bf16_is_slow() -> bool:
    """Whether torch multiplies bfloat16 on this CPU in plain loops, because it lacks the instructions oneDNN needs.

    Not measured on Arm.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def torch_is_slow(x: Tensor) -> bool:
    """Whether torch's products of this type take several times as long here as in float32.

    This holds for bfloat16 on x86 with neither AVX-512 nor AVX-NE-CONVERT.
    """
    return x.dtype is torch.bfloat16 and x.is_cpu and _bf16_is_slow()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 if torch is slow at it in their own type."""
    with without_autocast(a):
        return (a.float() @ b.float()).to(a.dtype) if torch_is_slow(a) else a @ b


class _BatchInvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = d_out.reshape(x.shape[:-1].numel(), len(weight))
        return (
            _product(d_out, weight) if needs_x else None,
            _product(rows.T, x.reshape(len(rows), x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """`product` made differentiable; its arguments are made dense."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    if needs_grad(x, weight, bias):
        out: Tensor = _BatchInvariantLinear.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
        return out
    return product(x, weight, bias)
