"""Branches whose tokens are followed as they are sampled, to stream them or to ask whether to pause."""

from __future__ import annotations

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.branches import Branch
from ibtpo_engine.errors import BranchFailed
from ibtpo_engine.pause import Pause
from ibtpo_engine.scheduler import Scheduler
from ibtpo_engine.tree import Node


class Watch:
    """One branch whose tokens are followed.

    Attributes:
        branch: the branch.
        depth: the tokens at depths [branch.node.start, depth) have been seen.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.depth = branch.node.start

    def fresh(self, scheduler: Scheduler) -> int:
        """Depth one past the last token sampled, if the branch is running and has new ones; else `depth`."""
        branch = self.branch
        if not scheduler.is_running(branch):
            return self.depth  # preempted or being filled: its tokens come back unchanged
        return max(int(scheduler.slots.length[branch.slot]), self.depth)


class _Asked(Watch):
    """A branch with a predicate, and a buffer of its path, so that a step copies one token rather than the path."""

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
    """The branches in flight that have a predicate; the engine calls `due` after each step."""

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
