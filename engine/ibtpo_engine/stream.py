"""Events of `Engine.stream`: tokens as they are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ibtpo_engine.arrays import Floats, Ints
from ibtpo_engine.branches import Branch
from ibtpo_engine.scheduler import Scheduler
from ibtpo_engine.slots import Slots
from ibtpo_engine.tree import Node
from ibtpo_engine.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Event:
    """New tokens of one branch, or its end.

    Attributes:
        node: the branch's node; its own arrays are filled when the branch ends.
        start: depth of the first new token; the tokens of a branch's events follow each other without gap or overlap.
        tokens: int32 [n], the new tokens; empty if the branch ended without any.
        logprob, logprob_raw, entropy: float32 [n], as on `Node`.
        done: is this the branch's last event?
        finish: as `Node.finish` (None: paused) once the branch has ended, "abort" if it was taken off its tree; None
            before that.
    """

    node: Node
    start: int
    tokens: Ints
    logprob: Floats
    logprob_raw: Floats
    entropy: Floats
    done: bool
    finish: str | None


class Follower:
    """Follows branches and turns what is new into events."""

    def __init__(self, branches: list[Branch], scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.watches = [Watch(branch) for branch in branches]

    def events(self) -> Iterator[Event]:
        """Events since the last call; between two of them the caller may change anything."""
        for watch in list(self.watches):
            if not watch.branch.node.in_flight:
                self.watches.remove(watch)
                yield _last(watch)
                continue
            now, begin, start = watch.fresh(self.scheduler), watch.depth, watch.branch.node.start
            if now > begin:
                watch.depth = now
                slots, slot = self.scheduler.slots, watch.branch.slot
                arrays = {
                    name: getattr(slots, name)[slot, begin - start : now - start].copy() for name in Slots.OUTPUTS
                }
                yield Event(node=watch.branch.node, start=begin, **arrays, done=False, finish=None)


def _last(watch: Watch) -> Event:
    """The end of a branch, with the tokens of its last step."""
    node, depth = watch.branch.node, watch.depth
    if node.is_pending:  # it was taken off its tree
        node_arrays = {name: getattr(node, name) for name in Slots.OUTPUTS}
        return Event(node=node, start=depth, **node_arrays, done=True, finish="abort")
    above = [part for part in node.path() if part.end > depth]  # it may have been cut since
    arrays = {
        name: np.concatenate(
            [getattr(part, name)[max(depth - part.start, 0) :] for part in above] or [getattr(node, name)[:0]]
        )
        for name in Slots.OUTPUTS
    }
    return Event(node=node, start=depth, **arrays, done=True, finish=node.finish)
