"""Settings `sampling.*`: how tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 0.7
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 0.95
    """The most likely tokens are kept, as many as are needed to reach this probability; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens with less than this share of the most likely token's probability are dropped; 0 drops none."""
    max_tokens: int = 2048
    """Largest number of new tokens in a trajectory; a trajectory that is cut off there gets reward 0."""

    def __post_init__(self) -> None:
        check_range("sampling.temperature", self.temperature, low=0.0)
        check_range("sampling.top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        check_range("sampling.top_k", self.top_k, low=0)
        check_range("sampling.min_p", self.min_p, low=0.0, high=1.0)
        check_range("sampling.max_tokens", self.max_tokens, low=1)
