"""Settings `ib.*`: the information-bottleneck estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class IBConfig:
    """The information-bottleneck estimates: node values, step probabilities, IB-Score (paper, section 2)."""

    beta: float = 5.0
    """Weight of information about the right answer against diversity; with a large beta only the covariance counts."""
    step_probability: Literal["geometric", "product", "mean", "min"] = "geometric"
    """pi(s) of a step of several tokens: exp(mean log-prob), exp(sum), mean or minimum of the token probabilities."""
    zero_parent: Literal["one", "zero", "smooth"] = "one"
    """phat(s)/phat(parent) where the parent's value is 0: 1 (no evidence) or 0; smooth: Laplace in every ratio."""
    value: Literal["leaf_mean", "recursive", "shrunk"] = "leaf_mean"
    """phat of a node: mean reward of the leaves below, mean of its children's values, or shrunk as `shrinkage` says."""
    shrinkage: float = 1.0
    """k of `shrunk`: phat = (reward below + k*phat(parent))/(leaves below + k), a prior worth k leaves; ours."""
    score_beta: Literal["fixed", "balanced"] = "fixed"
    """beta in the ranking: `beta`, or that at which gain and confidence have equal spread over a tree's nodes; ours."""
    score_bonus: float = 0.0
    """c: searches rank nodes by IB-Score + c times its estimated standard error; 0: by the score alone (paper)."""
    duplicates: Literal["separate", "merge"] = "separate"
    """The same step sampled twice under one parent: kept as two nodes, or merged into one with pooled leaves."""

    def __post_init__(self) -> None:
        check_choices(self, "ib.")
        check_range("ib.beta", self.beta, low=0.0, low_open=True)
        check_range("ib.shrinkage", self.shrinkage, low=0.0)
        check_range("ib.score_bonus", self.score_bonus, low=0.0)
