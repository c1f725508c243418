"""Settings `lora.*`: adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters, trained instead of the weights; the KL reference is then the model with its adapters off."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves or, if `model` is an adapter folder, its adapters."""
    alpha: float = 32.0
    """An adapter's output is scaled by alpha / rank."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Projections with adapters: q, k, v, o (attention), gate, up, down (mlp), or all of them."""

    def __post_init__(self) -> None:
        check_choices(self, "lora.")
        check_range("lora.rank", self.rank, low=0)
        check_range("lora.alpha", self.alpha, low=0.0, low_open=True)
