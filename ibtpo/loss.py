"""The clipped policy-gradient objective on the edges of a micro-batch, and its metrics.

    r    = exp(logp - old_logp)
    loss = sum over edges of -( P * min(r, 1 + clip_high) + N * max(r, 1 - clip_low) ) + kl_coef * w * k3
           - sum over edges of (entropy_coef * w + entropy_advantage_coef * (P + N)) * H

with P, N and w as in `MicroBatch`: the weighted positive and negative advantages and the weight itself, which includes
the averaging, and k3 = exp(ref - logp) - (ref - logp) - 1, an unbiased and non-negative estimate of the divergence
KL(policy | reference). H is the entropy of the row that predicts the edge, at the sampling temperature. Its two terms
are an entropy bonus and the advantage-weighted one of IBRO (arXiv 2507.18391), which raises entropy where A > 0 and
lowers it where A < 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ibtpo.config import LossConfig
from ibtpo.pack import MicroBatch

LARGEST_EXPONENT = 20.0
"""Log-ratios are clamped to at most this before exp(), without gradient beyond; such ratios are broken in any case."""


def policy_objective(
    logprob: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    config: LossConfig,
    reference_logprob: Tensor | None = None,
    edges: Tensor | slice = slice(None),
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """The loss of a micro-batch, or of some of its edges and rows; `policy_head` adds up the losses of parts.

    Args:
        logprob: [e], log-probs of ``batch.targets[edges]`` under the policy being trained.
        entropy: [t], entropies in nats at ``batch.rows[rows]``.
        batch: the whole micro-batch, with weights and old log-probs.
        config: clip range, weights of the KL penalty and of the entropy terms.
        reference_logprob: [E], log-probs under the frozen reference.
        edges: which edges of the micro-batch; by default all.
        rows: which rows of the micro-batch; by default all.

    Returns:
        scalar, differentiable; over all edges and rows, the micro-batch's share of the optimizer step's loss.

    Raises:
        ValueError: ``config.kl_coef`` > 0 without `reference_logprob`.
    """
    ratio = torch.exp((logprob - batch.old_logprob[edges]).clamp(max=LARGEST_EXPONENT))
    low, high = 1 - config.clip_low, 1 + config.clip_high  # at a bound clamp has a gradient only up to torch 2.13
    gained = batch.positive[edges] * ratio.masked_fill(ratio > high, high)
    gained = gained + batch.negative[edges] * ratio.masked_fill(ratio < low, low)
    loss = -gained.sum()
    if config.kl_coef > 0:
        if reference_logprob is None:
            raise ValueError(f"policy_objective: kl_coef={config.kl_coef} needs reference_logprob")
        loss = loss + config.kl_coef * (batch.weight[edges] * _k3(reference_logprob[edges] - logprob)).sum()
    if config.entropy_coef > 0 or config.entropy_advantage_coef > 0:
        loss = loss - (_entropy_weight(batch, config)[rows] * entropy).sum()
    return loss


def _entropy_weight(batch: MicroBatch, config: LossConfig) -> Tensor:
    """[T]: the coefficient of each row's entropy, summed over the edges the row predicts."""
    by_edge = config.entropy_coef * batch.weight
    by_edge = by_edge + config.entropy_advantage_coef * (batch.positive + batch.negative)
    return by_edge.new_zeros(len(batch.rows)).index_put((batch.edge_row,), by_edge, accumulate=True)


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1 of x = log(other/policy): the k3 estimate of KL(policy | other) (Schulman, 2020)."""
    log_ratio = log_ratio.clamp(max=LARGEST_EXPONENT)
    return torch.expm1(log_ratio) - log_ratio


def policy_metrics(
    logprob: Tensor, entropy: Tensor, batch: MicroBatch, config: LossConfig, reference_logprob: Tensor | None = None
) -> dict[str, Tensor]:
    """Metrics of a micro-batch besides its loss: sums and maxima, combined by `summarize`.

    Args:
        logprob, entropy: [E] and [T], as in `policy_objective`, detached.
        batch, config, reference_logprob: as in `policy_objective`.
    """
    gap, weight = logprob - batch.old_logprob, batch.weight
    ratio = gap.exp()
    clipped = batch.positive_weight * (ratio > 1 + config.clip_high)  # a shared token may be clipped on one side only
    clipped = clipped + batch.negative_weight * (ratio < 1 - config.clip_low)
    metrics = {
        "weight": weight.sum(),
        "clip_fraction": clipped.sum(),
        "entropy": (weight * entropy[batch.edge_row]).sum(),
        "kl_old_k1": -(weight * gap).sum(),
        "kl_old_k3": (weight * _k3(gap)).sum(),
        "logprob_gap": (weight * gap.abs()).sum(),
        "logprob_gap_max": gap.abs().max(),
    }
    if config.entropy_advantage_coef > 0:
        metrics["entropy_advantage"] = ((batch.positive + batch.negative) * entropy[batch.edge_row]).sum()
    if reference_logprob is not None:
        metrics["kl_ref_k1"] = (weight * (logprob - reference_logprob)).sum()
        metrics["kl_ref_k3"] = (weight * _k3(reference_logprob - logprob)).sum()
    return metrics


def summarize(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Combine the metrics of all micro-batches of an optimizer step into one number each.

    `loss` and `weight` are summed, `*_max` is the maximum, and the others are means weighted by `weight`: under the
    token mean, means over all tokens of all trajectories, with a token shared by m trajectories counted m times.
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
