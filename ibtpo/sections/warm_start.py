"""Settings `warm_start.*`: the built-in policy's first training."""

from __future__ import annotations

from dataclasses import dataclass

from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised training of the built-in policy on the task's worked solutions, from random weights."""

    excess: float = 0.06
    """The learning rate may fall when the loss is at most this far above the teacher's entropy, in nats per token."""
    pass_share: float = 0.4
    """Sampled pass rate, as a share of the teacher's own, that must be reached as well; 0: the loss alone decides."""
    decay_updates: int = 100
    """Updates over which the learning rate falls to a tenth, along a cosine; the warm start ends there."""
    max_updates: int = 1200
    """Largest number of updates, the decay included, whatever was measured."""
    batch_size: int = 64
    """Worked solutions per update."""
    lr: float = 3e-3
    """Learning rate before it falls."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        check_range("warm_start.excess", self.excess, low=0.0, low_open=True)
        check_range("warm_start.pass_share", self.pass_share, low=0.0)
        check_range("warm_start.decay_updates", self.decay_updates, low=1)
        check_range("warm_start.max_updates", self.max_updates, low=1)
        check_range("warm_start.batch_size", self.batch_size, low=1)
        check_range("warm_start.lr", self.lr, low=0.0, low_open=True)
        check_range("warm_start.warmup_steps", self.warmup_steps, low=0)
