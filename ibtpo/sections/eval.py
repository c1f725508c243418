"""Settings `eval.*`: held-out accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from ibtpo.validation import check_range

MOST_SAMPLES = 1000
"""2**n, the largest number on the way to maj@k, must fit a double."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out accuracy, always from independent rollouts."""

    prompts: int = 256
    """Number of held-out prompts."""
    samples: int = 8
    """k of avg@k, pass@k and maj@k: independent samples per prompt; a greedy completion is always added."""
    every: int = 0
    """Training steps between evaluations; 0: evaluate only before and after training."""

    def __post_init__(self) -> None:
        check_range("eval.prompts", self.prompts, low=1)
        check_range("eval.samples", self.samples, low=1, high=MOST_SAMPLES)
        check_range("eval.every", self.every, low=0)
