"""A linear layer by the fastest product on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels import cpu
from ibtpo_kernels.dispatch import active_backend
from ibtpo_kernels.linear import torch_is_slow
from ibtpo_kernels.ops import batch_invariant_linear

MOST_ROWS = 128  # most rows of a product at which ours is faster: those of one task
LEAST_WEIGHTS = {torch.float32: 1 << 16, torch.bfloat16: 1 << 12}  # ... and the fewest numbers of its weight
FAST_ON = {torch.float32: ("v3", "v4", "v4bf16", "v4amx"), torch.bfloat16: ("v4", "v4bf16")}  # instruction sets


def fastest_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, differentiable: by our product if that takes less time (`ours_is_faster`), else torch's.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N].

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError or RuntimeError: shapes, dtypes or devices do not fit; raised by the product used.
    """
    if ours_is_faster(x, weight) and active_backend(x.device) == "cpu":
        return batch_invariant_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def ours_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `batch_invariant_linear` on the CPU takes less time than torch for x [..., K] and weight [N, K].

    This holds in bfloat16 where torch is slow at it, and with a large weight for few rows, as in a decode step: in
    float32 from AVX2 on, in bfloat16 on AVX-512 without AMX. Measured on two AVX-512 cores, whose lesser instruction
    sets, ours and torch's, stood for other processors, and in float32 on two AVX2 cores; see docs/kernels.md.
    """
    if torch_is_slow(x):
        return True
    return (
        x.is_cpu
        and cpu.native is not None
        and cpu.native.isa() in FAST_ON.get(x.dtype, ())
        and weight.numel() >= LEAST_WEIGHTS[x.dtype]
        and 0 < x.shape[:-1].numel() <= MOST_ROWS
        and not torch.is_autocast_enabled("cpu")
    )
