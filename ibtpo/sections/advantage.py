"""Settings `advantage.*`: what a step is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Step-level advantages (paper, section 4)."""

    kind: Literal["ib-tpo", "grpo", "treerl", "treepo", "tree-grpo", "vineppo"] = "ib-tpo"
    """ib-tpo: A_GL + lambda*A_IB on every node; grpo: (R - mean)/std on every trajectory; the rest: rivals."""
    ib_weight: float = 0.1
    """lambda, weight of the local term A_IB; the paper saw 0.5 collapse."""
    pi_ref: Literal["sampling", "reference"] = "sampling"
    """Policy whose step probability scales A_IB: the one that sampled, or the frozen reference."""
    uniform_groups: Literal["skip", "ib_only"] = "skip"
    """Groups whose rewards are all equal: left out, or trained on A_IB alone (other kinds: on 0)."""
    std: Literal["population", "sample", "none"] = "population"
    """Denominator of the group's reward deviation: G or G - 1; none: rewards are not divided by it (Dr. GRPO)."""
    std_eps: float = 1e-6
    """Added to that deviation."""

    def __post_init__(self) -> None:
        check_choices(self, "advantage.")
        check_range("advantage.ib_weight", self.ib_weight, low=0.0)
        check_range("advantage.std_eps", self.std_eps, low=0.0)
