"""Splitting reasoning into steps (paper, section 1), on token ids, never on re-tokenised text.

A step ends with the token whose text *completes* the separator. Tokenizers merge (Qwen has ``.\\n\\n`` as one token) or
split (``\\n`` ``\\n``) separators, so both count, and so does a token with further text after the separator::

    tokens   "2+2" "=4" ".\\n\\n" "Hence" "\\n" "\\nso" " 4"        separator "\\n\\n"
    steps    [0 ............. 3) [3 ............. 6) [6 7)

Separators that touch or overlap (``\\n\\n\\n\\n``) are one boundary, at the end of the first of them; the others belong
to the next step. So no step consists of separators alone, however they are tokenised, unless the trajectory ends with
them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

import numpy as np
import numpy.typing as npt

from ibtpo.config import SearchConfig
from ibtpo_engine.arrays import Ints
from ibtpo_engine.token_texts import Decodes, TokenTexts, boundaries
from ibtpo_engine.tree import Node


class StepSplitter:
    """Finds the step boundaries in a run of token ids.

    Args:
        tokenizer: gives the text of a token; each id is decoded once, when it is first seen.
        separator: text that ends a step. None of its characters may be spread over several tokens (true of ASCII).
        step_tokens: if set, steps are runs of this many tokens and `separator` is ignored.
        noise: share of the boundaries moved to a random token between their neighbours, with random numbers seeded by
            the tokens, so that the same branch is always cut in the same way.

    Raises:
        ValueError: the separator is empty, or `step_tokens` < 1.
    """

    def __init__(
        self, tokenizer: Decodes, separator: str = "\n\n", *, step_tokens: int | None = None, noise: float = 0.0
    ) -> None:
        if step_tokens is not None and step_tokens < 1:
            raise ValueError(f"step_tokens: {step_tokens} must be at least 1")
        if step_tokens is None and not separator:
            raise ValueError('separator: "" has no character; give at least one, or set step_tokens')
        self.separator = separator
        self.step_tokens = step_tokens
        self.noise = noise
        self.context = 2 * len(separator) if step_tokens is None else 0  # tokens before a branch that can matter
        self._texts = TokenTexts(tokenizer)

    def __call__(self, tokens: npt.ArrayLike, context: npt.ArrayLike = ()) -> list[int]:
        """Offsets `at` (0 < at < len(tokens), increasing) before which `tokens` is to be cut.

        Args:
            tokens: int [n], a freshly sampled branch.
            context: int [c], the ids just before it on its path, to find a separator that begins there.
        """
        ids = np.asarray(tokens).tolist()
        offsets = self._offsets(ids, context)
        return _moved(offsets, ids, self.noise) if self.noise else offsets

    def _offsets(self, ids: list[int], context: npt.ArrayLike) -> list[int]:
        if self.step_tokens is not None:
            return list(range(self.step_tokens, len(ids), self.step_tokens))
        head = "".join(map(self.text, np.asarray(context).tolist()))
        pieces = list(map(self._texts.__getitem__, ids))
        ends = list(accumulate(map(len, pieces), initial=len(head)))  # ends[i]: characters before token i
        text = head + "".join(pieces)
        at = [bisect_left(ends, end) for end in boundaries(text, self.separator) if end > len(head)]
        return [offset for offset in dict.fromkeys(at) if offset < len(ids)]

    def text(self, token: int) -> str:
        """The text this token adds."""
        return self._texts[token]


def _moved(offsets: Sequence[int], ids: Sequence[int], share: float) -> list[int]:
    """Move each offset with probability `share` to a random place between the one before and the one after."""
    rng = Random(str(ids))
    moved = [0, *offsets, len(ids)]
    for i in range(1, len(moved) - 1):
        if rng.random() < share:
            moved[i] = rng.randrange(moved[i - 1] + 1, moved[i + 1])
    return moved[1:-1]


def step_splitter(tokenizer: Decodes, config: SearchConfig) -> StepSplitter:
    """The splitter for a search's settings."""
    return StepSplitter(tokenizer, config.separator, step_tokens=config.step_tokens, noise=config.boundary_noise)


Splitter = StepSplitter | Callable[[Ints], Sequence[int]]
"""A `StepSplitter`, or any predicate that maps the token ids of a branch to increasing offsets inside it."""


def split_steps(leaf: Node, splitter: Splitter) -> list[Node]:
    """Cut the branch an engine has just finished into one node a step, top down; `leaf` stays the last of them.

    Raises:
        ValueError: the splitter returned offsets outside (0, len(leaf)) or not increasing.
    """
    if isinstance(splitter, StepSplitter):
        offsets: Sequence[int] = splitter(leaf.tokens, _tokens_before(leaf, splitter.context))
    else:
        offsets = splitter(leaf.tokens)
    try:
        return leaf.cut(offsets)
    except ValueError:
        raise ValueError(f"splitter: offsets {list(offsets)} must increase inside (0, {len(leaf)})") from None


def _tokens_before(node: Node, count: int) -> list[int]:
    """The last `count` token ids above `node` on its path (fewer if the path is shorter)."""
    tokens: list[int] = []
    above = node.parent
    while above is not None and len(tokens) < count:
        tokens[:0] = above.tokens[len(tokens) - count :].tolist()
        above = above.parent
    return tokens
