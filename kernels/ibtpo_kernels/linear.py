"""The gradient that the batch-invariant products of all compiled backends share, and where torch's own are slow."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ibtpo_kernels.gradients import needs_grad
from ibtpo_kernels.logits import without_autocast

MOST_ROWS = 128  # of a float32 product that ours is faster at; a task of it takes as many
LEAST_WEIGHTS = 1 << 18  # ... and numbers its weight has at least

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # dense x, weight, bias -> x weight^T + bias


@cache
def _bf16_is_slow() -> bool:
    """Whether torch multiplies bfloat16 on this CPU in plain loops: where oneDNN asks for instructions it lacks.

    Of Arm nothing was measured.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def torch_is_slow(x: Tensor) -> bool:
    """Whether torch's products of this type take several times as long here as in float32.

    So it is with bfloat16 on x86 with neither AVX-512 nor AVX-NE-CONVERT.
    """
    return x.dtype is torch.bfloat16 and x.is_cpu and _bf16_is_slow()


def ours_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `batch_invariant_linear` on the CPU takes less time than torch for x [..., K] and weight [N, K].

    So it does in bfloat16 where torch is slow at that, and in float32 with several threads for a few rows of a large
    weight, as a decode step has them: more than `MOST_ROWS` are torch's, and so is a single one but on AVX2. Measured
    on two cores.
    """
    if torch_is_slow(x):
        return True
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and weight.numel() >= LEAST_WEIGHTS
        and x.shape[:-1].numel() <= MOST_ROWS
        and torch.get_num_threads() > 1
        and not torch.is_autocast_enabled("cpu")
        and x.shape[:-1].numel() >= _least_rows()
    )


def _least_rows() -> int:
    """The kernels of AVX2 alone do not lay the weight down, which is most of the work for one row."""
    from ibtpo_kernels.cpu import native

    return 1 if native is not None and native.isa() == "v3" else 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 where torch is slow at it in their own type."""
    with without_autocast(a):
        return (a.float() @ b.float()).to(a.dtype) if torch_is_slow(a) else a @ b


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
