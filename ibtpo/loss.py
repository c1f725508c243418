"""The clipped policy-gradient objective on the edges of a micro-batch, and the numbers logged beside it.

    r    = exp(logp - old_logp)
    loss = sum over edges of -( P * min(r, 1 + clip_high) + N * max(r, 1 - clip_low) ) + kl_coef * w * k3

with P, N and w as in `MicroBatch`: the weighted positive and negative advantages and the weight itself, averages
included, and k3 = exp(ref - logp) - (ref - logp) - 1, an unbiased and never negative estimate of the divergence
KL(policy | reference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ibtpo.config import LossConfig
from ibtpo.pack import MicroBatch

LARGEST_EXPONENT = 20.0
"""exp() is taken of at most this: a larger ratio is broken whatever its exact value. Beyond it no gradient flows."""


def policy_loss(
    logprob: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    config: LossConfig,
    reference_logprob: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, its share of the optimizer step's mean.

    Args:
        logprob: [E], log-probs of ``batch.targets`` under the policy being trained.
        entropy: [T], entropy in nats at ``batch.rows``; logged only.
        batch: weights and old log-probs.
        config: clip range and KL weight.
        reference_logprob: [E], log-probs under the frozen reference.

    Returns:
        the loss (scalar, differentiable) and detached metrics: scalar sums, to be combined by `summarize`.

    Raises:
        ValueError: ``config.kl_coef`` > 0 without `reference_logprob`.
    """
    if config.kl_coef > 0 and reference_logprob is None:
        raise ValueError(f"policy_loss: kl_coef={config.kl_coef} needs reference_logprob")
    gap = logprob - batch.old_logprob
    ratio = torch.exp(gap.clamp(max=LARGEST_EXPONENT))
    gained = batch.positive * ratio.clamp(max=1 + config.clip_high) + batch.negative * ratio.clamp(
        min=1 - config.clip_low
    )
    loss = -gained.sum()
    metrics = _metrics(gap.detach(), ratio.detach(), entropy.detach(), batch, config)
    if reference_logprob is not None:
        k3 = _k3(reference_logprob - logprob)
        if config.kl_coef > 0:
            loss = loss + config.kl_coef * (batch.weight * k3).sum()
        metrics["kl_ref_k1"] = (batch.weight * (logprob - reference_logprob)).sum().detach()
        metrics["kl_ref_k3"] = (batch.weight * k3).sum().detach()
    metrics["loss"] = loss.detach()
    return loss, metrics


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1 of x = log(other/policy): the k3 estimate of KL(policy | other) (Schulman, 2020)."""
    log_ratio = log_ratio.clamp(max=LARGEST_EXPONENT)
    return torch.expm1(log_ratio) - log_ratio


def _metrics(gap: Tensor, ratio: Tensor, entropy: Tensor, batch: MicroBatch, config: LossConfig) -> dict[str, Tensor]:
    weight = batch.weight
    clipped = ((batch.positive > 0) & (ratio > 1 + config.clip_high)) | (
        (batch.negative < 0) & (ratio < 1 - config.clip_low)
    )
    return {
        "weight": weight.sum(),
        "clip_fraction": (weight * clipped).sum(),
        "entropy": (weight * entropy[batch.edge_row]).sum(),
        "kl_old_k1": -(weight * gap).sum(),
        "kl_old_k3": (weight * _k3(gap)).sum(),
        "logprob_gap": (weight * gap.abs()).sum(),
        "logprob_gap_max": gap.abs().max(),
    }


def summarize(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """One number a metric from those of all micro-batches of an optimizer step.

    `loss` and `weight` are added up, of `*_max` the largest is taken, the rest are means by token weight: with the
    token mean over all tokens of all trajectories, shared ones counted m times.
    """
    names = dict.fromkeys(name for part in metrics for name in part)
    result = {}
    total = sum(float(part["weight"]) for part in metrics)
    for name in names:
        values = [float(part[name]) for part in metrics]
        if name.endswith("_max"):
            result[name] = max(values)
        else:
            result[name] = sum(values) / (1.0 if name in ("loss", "weight") else total)
    return result
