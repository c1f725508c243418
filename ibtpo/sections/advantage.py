"""Settings `advantage.*`: what a step is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Step-level advantages (paper, section 4)."""

    kind: Literal["ib-tpo", "grpo", "treerl", "treepo", "tree-grpo", "vineppo"] = "ib-tpo"
    """ib-tpo: A_GL + lambda*A_IB for every node; grpo: (R - mean)/std for every trajectory; others: docs/method.md."""
    ib_weight: float = 0.1
    """lambda, the weight of the local term A_IB; in the paper training collapsed at 0.5."""
    pi_ref: Literal["sampling", "reference"] = "sampling"
    """Policy whose step probability scales A_IB: the one that sampled the tree, or the frozen reference."""
    uniform_groups: Literal["skip", "ib_only"] = "skip"
    """Groups whose rewards are all equal: left out, or trained on A_IB alone (other kinds: on advantage 0)."""
    std: Literal["population", "sample", "none"] = "population"
    """Standard deviation of a group's rewards, over G or G - 1; none: rewards are not divided by it (Dr. GRPO)."""
    std_eps: float = 1e-6
    """Added to that standard deviation."""

    def __post_init__(self) -> None:
        check_choices(self, "advantage.")
        check_range("advantage.ib_weight", self.ib_weight, low=0.0)
        check_range("advantage.std_eps", self.std_eps, low=0.0)
