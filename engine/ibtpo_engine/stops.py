"""Stop strings, found in the decoded text of a branch, across token boundaries.

A token completes a stop string if the text with it holds an occurrence that reaches past the text without it. Texts are
compared character by character, because a token may change earlier text: a character split over several tokens decodes
to U+FFFD until its last token is there. Only a window at the end of the path is decoded::

    0 ........................ window ....... prompt_len ....... the branch's next token
    [ too far back to matter  )[ context      )[ text in which stops are sought     )

A block of thinking is skipped: within it nothing is decoded, and its tokens are context to the text after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Decode = Callable[[list[int]], str]

CONTEXT = 4  # tokens of the prompt decoded too: some tokenizers decode a first token differently
MARGIN = 8  # characters at the start of a window that may differ from those of the whole text
SHORT = 32  # tokens of a window not worth shortening


class StopWatch:
    """Looks for the stop strings of one branch, a token at a time.

    Args:
        decode: token ids to text; must not raise on the middle of a character.
        stops: the strings, each not empty.
        prefix: int32 [n], the tokens before the branch's first one; stops may begin in those below the prompt.
        prompt_len: how many of them are the prompt's.
        block: tokens that open and close a block in which stops are not sought.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str],
        prefix: npt.NDArray[np.int32],
        prompt_len: int,
        block: tuple[int, int] | None = None,
    ) -> None:
        self.decode = decode
        self.stops = stops
        self._text = ""
        self._begun = False  # `decode` runs with the first token, so that its error concerns only this branch
        self._longest = max(map(len, stops))
        self._block = block
        self._in_block = False
        if block is not None:
            opened, closed = (np.flatnonzero(prefix == token).max(initial=-1) for token in block)
            self._in_block = bool(opened > closed)
            prompt_len = max(prompt_len, int(max(opened, closed)) + 1)
        begin = max(prompt_len - CONTEXT, 0)
        self._window: list[int] = prefix[begin:].tolist()
        self._num_context = prompt_len - begin

    def push(self, token: int) -> str | None:
        """Append a token; returns the stop string it completes, of several the one that ends first in the text."""
        if self._block is not None and self._skips(token, *self._block):
            return None
        if not self._begun:
            self._shorten()
            self._begun = True
        self._window.append(token)
        before, self._text = self._text, self.decode(self._window)
        same, begin = _common(before, self._text), _common(self._context, self._text)
        found = []
        for order, stop in enumerate(self.stops):
            at = self._text.find(stop, max(same - len(stop) + 1, begin))
            if at >= 0:
                found.append((at + len(stop), order))
        if len(self._window) >= self._shorten_at:
            self._shorten()
        return self.stops[min(found)[1]] if found else None

    def _skips(self, token: int, opens: int, closes: int) -> bool:
        """Does this token belong to a block? The one that closes it begins the text anew, with itself as context."""
        if token != opens and not self._in_block:
            return False
        self._in_block = token != closes
        self._window = [*self._window, token][-CONTEXT:]
        if not self._in_block:
            self._set_context(len(self._window))
            self._begun, self._shorten_at = True, SHORT
        return True

    def _set_context(self, num_tokens: int) -> None:
        self._num_context = num_tokens
        self._context = self.decode(self._window[:num_tokens]) if num_tokens else ""
        self._text = self.decode(self._window) if self._window else ""

    def _shorten(self) -> None:
        """Drop tokens that no stop string can reach; doing so only at doubled lengths makes it cheap on average."""
        keep = SHORT // 2
        while keep < len(self._window) and len(self.decode(self._window[-keep:])) < self._longest + MARGIN:
            keep *= 2
        dropped = max(len(self._window) - keep, 0)
        if dropped or not self._begun:
            self._window = self._window[dropped:]
            self._set_context(max(self._num_context - dropped, 0))
        self._shorten_at = max(2 * len(self._window), SHORT)


def _common(left: str, right: str) -> int:
    """Length of the longest common beginning."""
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
