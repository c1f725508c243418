"""Pausing: a branch stops where a predicate over its tokens says so, unfinished, and can be resumed or forked there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.errors import BranchFailed
from ibtpo_engine.token_texts import Decodes, TokenTexts, boundaries

if TYPE_CHECKING:
    from ibtpo_engine.branches import Branch
    from ibtpo_engine.scheduler import Scheduler
    from ibtpo_engine.tree import Node


Pause = Callable[[Ints, int], bool]
"""Called after each token of a branch with (tokens, new): int32 [n], read-only, the whole path from the prompt's first
token to the one just sampled, and how many of them this branch has sampled. True pauses the branch there. Must depend
on nothing else, or tokens depend on it."""


class Boundary:
    """True at the token whose text completes a separator; on token ids, so nothing is tokenised anew.

    Tokenizers merge separators (``.\\n\\n`` may be one token) and split them (``\\n`` ``\\n``): both count, as does a
    token that holds text past one. Separators that touch or overlap (``\\n\\n\\n\\n``) are one boundary, at the first.

    Args:
        tokenizer: gives the text of a token; each id is decoded once, when it is first seen.
        separators: texts that end a step. Their characters must not be spread over tokens of single bytes (true of
            ASCII).
        block: ids of the tokens that open and close a block without boundaries, such as ``<think>`` and ``</think>``;
            the prompt may have opened it.

    Raises:
        ValueError: there is no separator, or an empty one.
    """

    def __init__(
        self, tokenizer: Decodes, separators: Iterable[str] = ("\n\n",), *, block: tuple[int, int] | None = None
    ) -> None:
        self.separators = tuple(separators)
        if not self.separators or not all(self.separators):
            raise ValueError(f"Boundary.separators: {self.separators} must be texts of at least one character")
        self.block = block
        self._longest = max(map(len, self.separators))
        self._texts = TokenTexts(tokenizer)

    def __call__(self, tokens: Ints, new: int) -> bool:
        """Does the last of `tokens` complete a separator outside a block?"""
        before, size = [], 0
        for token in tokens[-2::-1]:  # not as a list: of a long path only the end is looked at
            if size >= 2 * self._longest:  # one that touches a separator before it needs as much again
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


class Watch:
    """One branch whose tokens are looked at as they come.

    Attributes:
        branch: the one that is followed.
        depth: the tokens at depths [branch.node.start, depth) have been seen.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.depth = branch.node.start

    def fresh(self, scheduler: Scheduler) -> int:
        """Depth one past the last token sampled, if the branch is running and has new ones; else `depth`."""
        branch = self.branch
        if not scheduler.is_running(branch):
            return self.depth  # preempted or being filled: what it had sampled comes back unchanged
        return max(int(scheduler.slots.length[branch.slot]), self.depth)


class _Asked(Watch):
    """A branch with a predicate, and its path in a buffer so that a step copies one token and not the path."""

    def __init__(self, branch: Branch, pause: Pause) -> None:
        super().__init__(branch)
        self.pause = pause
        self.path: Ints = np.empty(branch.limit, np.int32)
        assert branch.node.parent is not None
        self.path[: self.depth] = branch.node.parent.prefix()

    def wants_to_pause(self, scheduler: Scheduler) -> bool:
        now, start = self.fresh(scheduler), self.branch.node.start
        if now == self.depth:
            return False
        sampled = scheduler.slots.tokens[self.branch.slot]
        self.path[self.depth : now] = sampled[self.depth - start : now - start]
        self.depth = now
        tokens = self.path[:now]
        tokens.flags.writeable = False
        return bool(self.pause(tokens, now - start))


class Pauses:
    """The branches under way that have a predicate; an engine asks it after each step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._asked: list[_Asked] = []

    def __len__(self) -> int:
        return len(self._asked)

    def add(self, branch: Branch, pause: Pause) -> None:
        """Ask `pause` after each token of a branch just submitted."""
        self._asked.append(_Asked(branch, pause))

    def due(self, version: int) -> list[Node]:
        """Pause the branches that want to; those whose predicate raises are added to the scheduler's `failures`."""
        self._asked = [asked for asked in self._asked if asked.branch.node.in_flight]
        paused = []
        for asked in self._asked:
            try:
                if asked.branch.node.in_flight and asked.wants_to_pause(self.scheduler):
                    paused.append(self.scheduler.end(asked.branch, None, version))
            except Exception as error:
                self.scheduler.failures.append(BranchFailed(asked.branch.node, error))
        return paused
