"""Which tokens a branch may sample next: the hook for grammars, schemas and fixed choices.

Two forms. The simple one is a function of everything before the token; it is called once a token with the whole path::

    def digits_only(prefix):  # int32 [n], prompt included
        return DIGIT_IDS      # or a boolean array [V]

The other keeps a state per branch, so that the cost of a token depends on the grammar, not on the path's length::

    mask.begin(prompt) -> state          once a branch, unless a state on its path is known
    state.allowed()    -> ids or bool    once a token; must not change the state, as it may be called again
    state.advance(t)                     the branch continued with token t
    state.copy()       -> state          for a fork; changes of either must not show in the other
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from ibtpo_engine.arrays import Ints
from ibtpo_engine.tree import Node

PrefixMask = Callable[[Ints], npt.ArrayLike]


class MaskState(Protocol):
    """The state of one branch in its grammar."""

    def allowed(self) -> npt.ArrayLike:
        """Token ids, or bool [V], that may come next. Must not change the state, as it may be called again."""

    def advance(self, token: int) -> None:
        """The branch continued with this token."""

    def copy(self) -> Self:
        """The same state for another branch; later changes of either must not show in the other."""


@runtime_checkable
class TokenMask(Protocol):
    """A grammar, shared by all the branches that are sampled with it."""

    def begin(self, prompt: Ints) -> MaskState:
        """The state before the first sampled token; `prompt` is int32 [n], the part of it that the branch shares."""


class _Prefix:
    """The state of a `PrefixMask`: the path, in a buffer that grows."""

    def __init__(self, mask: PrefixMask, prefix: Ints) -> None:
        self.mask = mask
        self.length = len(prefix)
        self.buffer = np.resize(prefix, 2 * self.length + 16)

    def allowed(self) -> npt.ArrayLike:
        prefix = self.buffer[: self.length]
        prefix.flags.writeable = False
        return self.mask(prefix)

    def advance(self, token: int) -> None:
        if self.length == len(self.buffer):
            self.buffer = np.resize(self.buffer, 2 * self.length)
        self.buffer[self.length] = token
        self.length += 1

    def copy(self) -> Self:
        return type(self)(self.mask, self.buffer[: self.length])


class MaskCursor:
    """A mask's state on the path of one branch, and the depth to which it was advanced.

    Tokens are passed to the state only when it is asked for the next one, so that an error of the state cannot come
    between sampling a token and recording it::

        0 ........... prompt ........... depth ............. the branch's next token
        [ begin()    )[ advance()d      )[ not yet         )
    """

    def __init__(self, mask: TokenMask | PrefixMask, state: MaskState, depth: int) -> None:
        self.mask = mask
        self.state = state
        self.depth = depth

    @classmethod
    def at(cls, node: Node, mask: TokenMask | PrefixMask) -> MaskCursor:
        """The cursor of a pending node: a copy of the nearest one on its path, or a new one."""
        path = node.path()[:-1]
        prefix = np.concatenate([ancestor.tokens for ancestor in path])
        if not isinstance(mask, TokenMask):
            return cls(mask, _Prefix(mask, prefix), node.start)
        for ancestor in reversed(path):
            known = ancestor.mask
            if known is not None and known.mask is mask:
                cursor = cls(mask, known.state.copy(), known.depth)
                break
        else:
            prompt = prefix[: node.births()[0][0]]
            cursor = cls(mask, mask.begin(prompt), len(prompt))
        cursor.advance(prefix[cursor.depth :])
        return cursor

    def advance(self, tokens: Ints) -> None:
        """Pass on the tokens [n] that follow `depth`."""
        for token in tokens.tolist():
            self.state.advance(token)
            self.depth += 1

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_]:
        """bool [V], the tokens that may come next.

        Raises:
            ValueError: the mask returned another shape, or ids outside the vocabulary.
        """
        answer = np.asarray(self.state.allowed())
        if answer.dtype == np.bool_:
            if answer.shape != (vocabulary,):
                raise ValueError(
                    f"Sampling.allowed: a boolean mask of shape {answer.shape}, expected ({vocabulary},), one entry "
                    "for each token id of the model's (padded) vocabulary; or return token ids"
                )
            return answer
        if answer.size == 0:
            return np.zeros(vocabulary, np.bool_)
        if answer.dtype.kind not in "iu" or answer.min() < 0 or answer.max() >= vocabulary:
            raise ValueError(
                f"Sampling.allowed: {answer.dtype} values in [{answer.min()}, {answer.max()}]; expected token ids in "
                f"[0, {vocabulary}), or a boolean mask"
            )
        mask = np.zeros(vocabulary, np.bool_)
        mask[answer] = True
        return mask
