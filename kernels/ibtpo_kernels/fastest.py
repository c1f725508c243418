"""A linear layer by whoever is fast at it on this machine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels.dispatch import active_backend
from ibtpo_kernels.linear import ours_is_faster
from ibtpo_kernels.ops import batch_invariant_linear


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
