"""The gradient that the batch-invariant products of all compiled backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # dense x, weight, bias -> x weight^T + bias


class _BatchInvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = d_out.reshape(x.shape[:-1].numel(), len(weight))
        return (
            d_out @ weight if needs_x else None,
            rows.T @ x.reshape(len(rows), x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """`product` made differentiable; its arguments are made dense."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        out: Tensor = _BatchInvariantLinear.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
        return out
    return product(x, weight, bias)
