"""A linear layer by the fastest product on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels import cpu
from ibtpo_kernels.dispatch import active_backend
from ibtpo_kernels.linear import torch_is_slow
from ibtpo_kernels.ops import batch_invariant_linear

MOST_ROWS = 128  # most rows of a float32 product at which ours is faster: those of one task
LEAST_WEIGHTS = 1 << 18  # ... and the fewest numbers of its weight


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

    This holds in bfloat16 where torch is slow at it, and in float32 with several threads for a few rows and a large
    weight, as in a decode step: torch is faster at more than `MOST_ROWS` rows and, except on AVX2, at a single one.
    Measured on two cores.
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
    """1 on AVX2, where few rows need no transposed copy of the weight, else most of the work for one row; else 2."""
    return 1 if cpu.native is not None and cpu.native.isa() == "v3" else 2
