"""Settings `safeguards.*`: protection against failures."""

from __future__ import annotations

from dataclasses import dataclass

from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class SafeguardConfig:
    """Protection against failures: the checkpoints that a run keeps, and when it gives up."""

    keep_checkpoints: int = 3
    """Number of checkpoints kept, the newest ones."""
    nonfinite_steps: int = 5
    """Optimizer steps in a row that may be skipped for a NaN or Inf in loss or gradient; one more ends the run."""

    def __post_init__(self) -> None:
        check_range("safeguards.keep_checkpoints", self.keep_checkpoints, low=1)
        check_range("safeguards.nonfinite_steps", self.nonfinite_steps, low=0)
