"""Loss and metrics of a whole micro-batch in one call."""

from __future__ import annotations

from torch import Tensor

from ibtpo.config import LossConfig
from ibtpo.loss import policy_metrics, policy_objective
from ibtpo.pack import MicroBatch


def policy_loss(
    logprob: Tensor, entropy: Tensor, batch: MicroBatch, config: LossConfig, reference_logprob: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the detached metrics that `summarize` combines."""
    loss = policy_objective(logprob, entropy, batch, config, reference_logprob)
    metrics = policy_metrics(logprob.detach(), entropy.detach(), batch, config, reference_logprob)
    return loss, metrics | {"loss": loss.detach()}
