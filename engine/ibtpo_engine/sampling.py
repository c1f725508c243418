"""How a branch is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from ibtpo_engine.pause import Pause


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of a branch.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the smallest set of most likely tokens with at least this probability is kept; 1 keeps all.
        top_k: number of most likely tokens kept (before top_p); 0 keeps all.
        min_p: of those, tokens less than this many times as likely as the most likely one are dropped; 0 drops none.
        max_tokens: most tokens on a path below the prompt; a branch that reaches it finishes with "length".
        stop_tokens: token ids that end a branch; the stop token is kept as its last token.
        pause: asked after each token; True stops the branch there without finishing it (`finish` stays None), to be
            resumed or forked. See `Pause` for its arguments, `Boundary` for one that knows separators.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop_tokens: tuple[int, ...] = ()
    pause: Pause | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"Sampling.temperature: {self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p: {self.top_p} lies outside (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k: {self.top_k} must be at least 0 (0 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling.min_p: {self.min_p} lies outside [0, 1]")
        if self.max_tokens < 1:
            raise ValueError(f"Sampling.max_tokens: {self.max_tokens} must be at least 1")
