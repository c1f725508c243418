"""Settings `loss.*`: the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The clipped policy-gradient objective, and how it is averaged."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low get no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high get no gradient where the advantage is positive."""
    kl_coef: float = 0.001
    """Weight of the KL penalty (k3 estimator) to the frozen starting policy; 0 needs no reference model."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus: this weight times the policy's mean entropy, in nats, is subtracted from the loss."""
    entropy_advantage_coef: float = 0.0
    """Weight of the mean of entropy times advantage (IBRO): more entropy where the advantage is positive."""
    aggregation: Literal["token", "sequence", "dr_grpo"] = "token"
    """token: mean over all tokens of the optimizer step; sequence: mean of trajectory means; dr_grpo: sum/(G*max)."""
    prefix_weight: Literal["trajectory", "sqrt", "node"] = "trajectory"
    """Weight of a token shared by m trajectories: m, sqrt(m) or 1."""
    old_logprob: Literal["sampler", "recompute"] = "sampler"
    """Source of the old policy's log-probs; with top-p, top-k or min-p they are always recomputed."""

    def __post_init__(self) -> None:
        check_choices(self, "loss.")
        check_range("loss.clip_low", self.clip_low, low=0.0, high=1.0)
        check_range("loss.clip_high", self.clip_high, low=0.0)
        for name in ("kl_coef", "entropy_coef", "entropy_advantage_coef"):
            check_range(f"loss.{name}", getattr(self, name), low=0.0)
