"""Pausing: a branch stops, unfinished, when a predicate over its tokens is true; it can be resumed or forked there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.token_texts import Decodes, TokenTexts, boundaries

Pause = Callable[[Ints, int], bool]
"""Called after each token of a branch with (tokens, new): int32 [n], read-only, the whole path from the prompt's first
token to the one just sampled, and how many of them this branch has sampled. True pauses the branch there. The result
must depend on nothing else; otherwise the sampled tokens would, too."""


class Boundary:
    """True at the token whose text completes a separator; works on token ids, so nothing is tokenised anew.

    Tokenizers merge separators (``.\\n\\n`` may be one token) and split them (``\\n`` ``\\n``): both count, as does a
    token with text after one. Separators that touch or overlap (``\\n\\n\\n\\n``) are one boundary, at the first.

    Args:
        tokenizer: gives the text of a token; each id is decoded once, when it is first seen.
        separators: texts that end a step. None of their characters may be split over several tokens (true of ASCII).
        block: ids of the tokens that open and close a block without boundaries, such as ``<think>`` and ``</think>``;
            the prompt may have opened it.

    Raises:
        ValueError: there is no separator, or an empty one; `separators` is one string; `block` is not two token ids.
    """

    def __init__(
        self, tokenizer: Decodes, separators: Iterable[str] = ("\n\n",), *, block: tuple[int, int] | None = None
    ) -> None:
        self.separators = tuple(separators)
        if isinstance(separators, str) or not self.separators or not all(self.separators):
            raise ValueError(f"Boundary.separators: {separators!r} must be a tuple of strings, none of them empty")
        if block is not None and not (len(block) == len({*block}) == 2 and all(isinstance(t, Integral) for t in block)):
            raise ValueError(f"Boundary.block: {block!r} must be two different token ids")
        self.block = block
        self._longest = max(map(len, self.separators))
        self._texts = TokenTexts(tokenizer)

    def __call__(self, tokens: Ints, new: int) -> bool:
        """Does the last of `tokens` complete a separator outside a block?"""
        before, size = [], 0
        for token in tokens[-2::-1]:  # not as a list, since only the end of a long path is read
            if size >= 2 * self._longest:  # enough to see a separator that touches an earlier one
                break
            before.append(self._texts[int(token)])
            size += len(before[-1])
        text = "".join(reversed([self._texts[int(tokens[-1])], *before]))
        completes = any(end > size for separator in self.separators for end in boundaries(text, separator))
        return completes and not self._in_block(tokens)

    def _in_block(self, tokens: Ints) -> bool:
        if self.block is None:
            return False
        opened, closed = (np.flatnonzero(tokens == token) for token in self.block)
        return len(opened) > 0 and (len(closed) == 0 or bool(opened[-1] > closed[-1]))
