"""Sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral

from ibtpo_engine.masks import PrefixMask, TokenMask
from ibtpo_engine.pause import Pause


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of a branch.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the smallest set of most likely tokens with at least this probability is kept; 1 keeps all.
        top_k: number of most likely tokens kept (before top_p); 0 keeps all.
        min_p: tokens with less than this fraction of the most likely token's probability are dropped; 0 drops none.
        max_tokens: most tokens on a path below the prompt; a branch that reaches it finishes with "length".
        min_tokens: fewest tokens on a path below the prompt, including the stop token: until then stop tokens are not
            sampled and stop strings are ignored.
        stop_tokens: token ids that end a branch; the stop token is kept as its last token.
        stop: strings that end a branch; the token that completes one is kept. Sought in the text below the prompt,
            across tokens and forks. Needs `Engine(decode=...)`.
        stop_block: ids of the tokens that open and close a block in which `stop` is not sought, such as ``<think>`` and
            ``</think>``; the prompt may have opened it. A string must begin after the block to count.
        logit_bias: {token id: bias} added to the model's logits, before temperature; -inf forbids a token.
        allowed: the tokens that may come next, asked once a token; a function of the path or a `TokenMask` (a grammar).
        seed: replaces the engine's seed and the tree's key in naming the random numbers; branches still differ by
            their place in the tree.
        pause: asked after each token; True stops the branch there without finishing it (`finish` stays None), to be
            resumed or forked. See `Pause` for its arguments, `Boundary` for pausing at separators.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_block: tuple[int, int] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed: TokenMask | PrefixMask | None = None
    seed: int | None = None
    pause: Pause | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "max_tokens", "min_tokens", *(["seed"] if self.seed is not None else [])):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"Sampling.{name}: {getattr(self, name)!r} must be an integer")
        stops = self.stop_tokens if isinstance(self.stop_tokens, Iterable) else (None,)
        if not all(isinstance(token, Integral) and -(1 << 63) <= token < 1 << 63 for token in stops):
            raise ValueError(
                f"Sampling.stop_tokens: {self.stop_tokens!r} must be a tuple of token ids; leave it empty for a "
                "tokenizer without an end token"
            )
        object.__setattr__(self, "stop_tokens", tuple(map(int, stops)))  # accepts a list or a set, too
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"Sampling.temperature: {self.temperature} must be at least 0, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p: {self.top_p} lies outside (0, 1]")
        if not 0 <= self.top_k < 1 << 31:
            raise ValueError(f"Sampling.top_k: {self.top_k} lies outside [0, 2^31) (0 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling.min_p: {self.min_p} lies outside [0, 1]")
        if self.max_tokens < 1:
            raise ValueError(f"Sampling.max_tokens: {self.max_tokens} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"Sampling.min_tokens: {self.min_tokens} lies outside [0, max_tokens={self.max_tokens}]")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"Sampling.stop: {self.stop!r} must be a tuple of strings, none of them empty")
        block = self.stop_block
        if block is not None and not (len(block) == len({*block}) == 2 and all(isinstance(t, Integral) for t in block)):
            raise ValueError(f"Sampling.stop_block: {block!r} must be two different token ids")
        for token, bias in self.logit_bias.items():
            if not bias < math.inf:
                raise ValueError(f"Sampling.logit_bias: {bias} of token {token} must be finite, or -inf to forbid it")
        if self.allowed is not None and not (isinstance(self.allowed, TokenMask) or callable(self.allowed)):
            raise ValueError(f"Sampling.allowed: {self.allowed!r} is neither a TokenMask (has begin) nor a function")
        if block is not None:
            object.__setattr__(self, "stop_block", tuple(map(int, block)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # a copy, since the caller may change its own

    @property
    def shapes_logits(self) -> bool:
        """Whether the logits of some tokens at least are changed before sampling."""
        return bool(self.logit_bias) or self.allowed is not None or bool(self.min_tokens and self.stop_tokens)

    def length_to_stop(self, prompt_len: int) -> int:
        """Length of the path, including the prompt, from which on a stop may end it."""
        return prompt_len + self.min_tokens if self.min_tokens else 0

    def check_serves(self, vocabulary: int, *, has_decode: bool) -> None:
        """Raise ValueError if an engine with this vocabulary, with or without `decode`, cannot sample like this."""
        for token in self.logit_bias:
            if not 0 <= token < vocabulary:
                raise ValueError(f"Sampling.logit_bias: token id {token} lies outside the vocabulary [0, {vocabulary})")
        if self.stop and not has_decode:
            raise ValueError(
                f"Sampling.stop={self.stop!r} is sought in text; give the engine a decoder: "
                "Engine(model, decode=tokenizer.decode)"
            )
