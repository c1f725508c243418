"""Settings `engine.*`: the generation engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The generation engine."""

    kv_tokens: int = 200_000
    """Size of the KV pool in tokens (pages of 16)."""
    max_branches: int = 256
    """Largest number of branches decoded in one step."""
    prefill_tokens: int = 2048
    """Largest number of prompt tokens computed in one step; longer prompts are computed in chunks."""
    cuda_graphs: bool = False
    """Capture decode steps as CUDA graphs; on a GPU only."""
    release: Literal["auto", "always", "never"] = "auto"
    """Free the pool's memory in updates; auto: if the run would not fit otherwise, and on GPUs without cuda_graphs."""

    def __post_init__(self) -> None:
        check_choices(self, "engine.")
        check_range("engine.kv_tokens", self.kv_tokens, low=16)
        check_range("engine.max_branches", self.max_branches, low=1)
        check_range("engine.prefill_tokens", self.prefill_tokens, low=16)
