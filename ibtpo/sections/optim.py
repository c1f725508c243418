"""Settings `optim.*`: AdamW and its rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up; a bf16 model has fp32 master weights."""

    lr: float = 1e-6
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Decay rate of the gradient's running mean."""
    beta2: float = 0.99
    """Decay rate of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    warmup_steps: int = 5
    """Optimizer steps over which the learning rate rises linearly from 0."""
    final_share: float = 1.0
    """Share of the learning rate left at the end of the token budget; it falls linearly with the tokens sampled."""
    grad_clip: float = 1.0
    """Largest L2 norm of the gradient; longer gradients are scaled down."""
    state: Literal["float32", "8bit"] = "float32"
    """Format of the running means; 8bit (bitsandbytes) takes 2 bytes per weight instead of 8."""

    def __post_init__(self) -> None:
        check_choices(self, "optim.")
        check_range("optim.lr", self.lr, low=0.0, low_open=True)
        check_range("optim.beta1", self.beta1, low=0.0, high=1.0, high_open=True)
        check_range("optim.beta2", self.beta2, low=0.0, high=1.0, high_open=True)
        check_range("optim.eps", self.eps, low=0.0, low_open=True)
        check_range("optim.weight_decay", self.weight_decay, low=0.0)
        check_range("optim.warmup_steps", self.warmup_steps, low=0)
        check_range("optim.final_share", self.final_share, low=0.0, high=1.0)
        check_range("optim.grad_clip", self.grad_clip, low=0.0, low_open=True)
