"""Settings `digits.*`: the built-in task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class DigitChainConfig:
    """The built-in task: left-to-right arithmetic mod 10, one operation per step."""

    min_ops: int = 8
    """Smallest number of operations in a prompt."""
    max_ops: int = 12
    """Largest number of operations in a prompt."""
    grade: Literal["strict", "last"] = "strict"
    """strict: every line of the derivation must be right; last: only the final digit must be."""
    teacher_exponent: float = 4.0
    """k of the warm-start teacher: each fact has its own error rate, 0.9*u^k with u uniform in [0, 1)."""

    def __post_init__(self) -> None:
        check_choices(self, "digits.")
        check_range("digits.min_ops", self.min_ops, low=1)
        check_range("digits.max_ops", self.max_ops, low=self.min_ops)
        check_range("digits.teacher_exponent", self.teacher_exponent, low=0.0, low_open=True)
