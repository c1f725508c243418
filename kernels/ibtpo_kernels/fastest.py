"""A linear layer by whoever is fast at it on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels import cpu
from ibtpo_kernels.dispatch import active_backend
from ibtpo_kernels.linear import torch_is_slow
from ibtpo_kernels.ops import batch_invariant_linear

MOST_ROWS = 128  # of a float32 product that ours is faster at; a task of it takes as many
LEAST_WEIGHTS = 1 << 18  # ... and numbers its weight has at least


def fastest_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, differentiable: torch's product, and where ours takes less time (`ours_is_faster`), ours.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N].

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError or RuntimeError: shapes, dtypes or devices do not fit; of whoever multiplies.
    """
    if ours_is_faster(x, weight) and active_backend(x.device) == "cpu":
        return batch_invariant_linear(x, weight, bias)
    return F.linear(x, weight, bias)


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
    return 1 if cpu.native is not None and cpu.native.isa() == "v3" else 2
