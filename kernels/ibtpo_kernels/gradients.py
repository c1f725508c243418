"""Gradients of the small ops, shared by all compiled backends, which pass in their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Norm = Callable[[Tensor, Tensor, float], Tensor]  # x, weight, eps -> normed
AddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # x, residual, weight, eps -> normed, sum
NormBackward = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], tuple[Tensor, Tensor]]
"""x, weight, d_out, d_total, eps -> dx, d_weight; `d_total`, if any, is added to dx."""
Rotate = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # x, cos, sin, direction -> rotated; -1.0 turns back
Gate = Callable[[Tensor, Tensor], Tensor]  # gate, up -> silu(gate) * up
GateBackward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # gate, up, d_out -> d_gate, d_up


def forward_mode() -> bool:
    """Whether forward mode is active; kernels do not support it, and `torch.autograd.Function` raises the error."""
    return forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a result computed from these may need a gradient."""
    return forward_mode() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


NO_SECOND = (
    "the gradients of the ops of ibtpo_kernels cannot be differentiated again; "
    'use backend("reference"), or plain torch in place of linear_logprob and policy_head'
)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate a backward so that differentiating its results raises a RuntimeError.

    torch's decorator of this name raises only if that derivative is taken by the incoming gradients: by what was saved,
    as in a gradient penalty, it would silently be 0.
    """

    @functools.wraps(backward)
    def first(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return found
        made = [x for x in found if x is not None]
        handed_on = iter(_NoSecond.apply(len(made), *made, *ctx.saved_tensors, *incoming))  # type: ignore[no-untyped-call]
        return tuple(None if x is None else next(handed_on) for x in found)

    return first


class _NoSecond(torch.autograd.Function):
    """Hands on its first `num` tensors, joined to all others in the graph, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, num: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:num] if x is not None)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> None:
        raise RuntimeError(NO_SECOND)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, norm: Norm, backward: NormBackward) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = eps, backward
        return norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        eps, backward = ctx.rest
        return *backward(x, weight, d_out, None, eps), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, norm: Norm, backward: NormBackward) -> Tensor:
    """`norm` made differentiable."""
    if needs_grad(x, weight):
        out: Tensor = _RMSNorm.apply(x, weight, eps, norm, backward)  # type: ignore[no-untyped-call]
        return out
    return norm(x, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: AddNorm, backward: NormBackward
    ) -> tuple[Tensor, Tensor]:
        out, total = norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.rest = eps, backward
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        eps, backward = ctx.rest
        dx, d_weight = backward(total, weight, d_out, d_total, eps)
        return dx, dx, d_weight, None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: AddNorm, backward: NormBackward
) -> tuple[Tensor, Tensor]:
    """`norm` made differentiable."""
    if needs_grad(x, residual, weight):
        out, total = _AddRMSNorm.apply(x, residual, weight, eps, norm, backward)  # type: ignore[no-untyped-call]
        return out, total
    return norm(x, residual, weight, eps)


class _Rope(torch.autograd.Function):
    """A rotation, so its backward is the inverse rotation of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rotate(d_out, *ctx.saved_tensors, -1.0), None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate) -> Tensor:
    """`rotate` made differentiable in x."""
    if needs_grad(x):
        out: Tensor = _Rope.apply(x, cos, sin, rotate)  # type: ignore[no-untyped-call]
        return out
    return rotate(x, cos, sin, 1.0)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, multiply: Gate, backward: GateBackward) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.rest = backward
        return multiply(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.rest(*ctx.saved_tensors, d_out), None, None


def silu_mul(gate: Tensor, up: Tensor, multiply: Gate, backward: GateBackward) -> Tensor:
    """`multiply` made differentiable."""
    if needs_grad(gate, up):
        out: Tensor = _SiluMul.apply(gate, up, multiply, backward)  # type: ignore[no-untyped-call]
        return out
    return multiply(gate, up)
