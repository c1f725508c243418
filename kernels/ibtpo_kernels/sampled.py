"""Log-probs of given tokens by the arithmetic of `sample`, so that a trainer's numbers have the sampler's bits.

`linear_logprob` never holds a whole row of logits and sums in float32; `sample` has the row and sums in double. They
differ by rounding. If ratios of new and old log-probs must be exactly 1, the trainer takes the value from here and the
gradient from `linear_logprob`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibtpo_kernels import checks
from ibtpo_kernels.dispatch import implementation
from ibtpo_kernels.ops import batch_invariant_linear

_CHUNK_ELEMENTS = 1 << 24  # logits alive at a time: 64 MiB in float32


def sampled_logprob(
    logits: Tensor, rows: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logprob, logprob_raw) that `sample`, without filters, would report had it drawn these tokens; no autograd.

    Args:
        logits: [T, V].
        rows, targets: int64 [E]; edge e asks for token targets[e] in row rows[e].
        temperature: above 0; the engine keeps it as float32, so round it to float32 to match.

    Returns:
        float32 [E] at this temperature, and at 1. The backends "cpu" and "triton" use the arithmetic of their `sample`;
        tests show that "cpu" gives its bits for float32 and bfloat16.

    Raises:
        ValueError: a shape, dtype, device or index is wrong, the temperature is not positive, or a row has no
            distribution (NaN or inf logits).
    """
    checks.sampled_logprob(logits, rows, targets, temperature)
    found: tuple[Tensor, Tensor] = implementation(logits).sampled_logprob(logits, rows, targets, temperature)
    return found


def linear_sampled_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`sampled_logprob` of the logits `batch_invariant_linear(hidden, weight)`, made a few rows at a time; no autograd.

    Args:
        hidden: [T, H]; weight: [V, H].
        rows, targets, temperature: as in `sampled_logprob`.

    Returns:
        float32 [E] at this temperature, and at 1.

    Raises:
        ValueError: as `sampled_logprob`.
    """
    checks.linear_logprob(hidden, weight, rows, targets, temperature, None, op="linear_sampled_logprob")
    hidden, weight = hidden.detach(), weight.detach()
    logprob, raw = torch.empty(2, len(rows), dtype=torch.float32, device=hidden.device).unbind()
    by_row, order = rows.sort(stable=True)
    size = max(1, _CHUNK_ELEMENTS // max(len(weight), 1))
    starts = range(0, len(hidden), size)
    bounds = torch.searchsorted(by_row, torch.tensor([*starts, len(hidden)], device=rows.device)).tolist()
    for start, begin, end in zip(starts, bounds[:-1], bounds[1:], strict=True):
        edges = order[begin:end]
        logits = batch_invariant_linear(hidden[start : start + size], weight)
        logprob[edges], raw[edges] = sampled_logprob(
            logits, rows[edges] - start, targets[edges], temperature=temperature
        )
    return logprob, raw
