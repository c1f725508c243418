"""The state of every branch, and the moves from one state to the next.

::

    waiting --(parent filled)--> running --(stop or limit)--> finished
       ^                            |
       +------(out of pages)--------+   preempted: tokens kept, pages given back, filled again later

Between waiting and running, a branch may belong to a fill: as one of the children that start once a node is filled, or
as the preempted branch whose own tokens are filled again.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ibtpo_engine.arrays import Longs
from ibtpo_engine.branches import Branch, Fill
from ibtpo_engine.cache import PageCache
from ibtpo_engine.pages import KV
from ibtpo_engine.slots import Outputs, Slots
from ibtpo_engine.tree import Node


@dataclass
class Counters:
    """What the scheduler did so far.

    Attributes:
        sampled: tokens drawn.
        computed: rows run through the model, recomputed ones included.
        preemptions: times that a running branch gave its pages back.
        steps: forward passes.
    """

    sampled: int = 0
    computed: int = 0
    preemptions: int = 0
    steps: int = 0


class Roster:
    """The branches that were submitted and have not finished.

    Args:
        cache: the pool with its index.
        slots: rows of the arrays that a step reads, one a running branch or a fill.

    Attributes:
        branches: all of them, by node.
        waiting: by ticket.
        running: by slot.
        fills: by id of the node, or of the branch that was preempted.
        lacking: running branches that lack the page their next row begins; None if that must be looked up.
    """

    def __init__(self, cache: PageCache, slots: Slots) -> None:
        self.cache = cache
        self.slots = slots
        self.branches: dict[Node, Branch] = {}
        self.waiting: list[Branch] = []
        self.running: dict[int, Branch] = {}
        self.fills: dict[int, Fill] = {}
        self.lacking: list[Branch] | None = None
        self.counters = Counters()
        self._order: list[tuple[tuple[int, ...], int]] = []  # (place, slot) of the running, sorted
        self._running_slots: Longs | None = None  # the slots of _order; None when it changed
        self._tickets = 0

    @property
    def num_branches(self) -> int:
        """Branches submitted and not yet finished."""
        return len(self.branches)

    def running_slots(self) -> Longs:
        """Slots of the running branches, siblings side by side; the same array until a branch joins or leaves."""
        if self._running_slots is None:
            self._running_slots = np.fromiter((slot for _, slot in self._order), np.int64, len(self._order))
        return self._running_slots

    def is_running(self, branch: Branch) -> bool:
        """Is it being decoded, neither waiting nor being filled?"""
        return self.running.get(branch.slot) is branch

    def held(self) -> list[KV]:
        """Every KV that belongs to a branch in progress rather than to a node."""
        return [branch.kv for branch in self.running.values() if branch.kv] + [
            fill.kv for fill in self.fills.values() if fill.branch is not None
        ]

    def submit(self, branch: Branch) -> Branch:
        """Queue a branch whose node is pending; returns it."""
        branch.node.in_flight = True
        branch.ticket = self._tickets
        self.branches[branch.node] = branch
        self.waiting.append(branch)
        self._tickets += 1
        return branch

    def cancel(self, nodes: Iterable[Node]) -> None:
        """Cancel the branches of these nodes: they end unfinished and the nodes leave their trees."""
        for branch in self._doomed(nodes):
            fill = self.fills.get(id(branch.node.parent))
            if self.is_running(branch):
                self._leave(branch)
            elif id(branch) in self.fills:
                self._drop_fill(id(branch))
            elif fill is not None and branch in fill.children:
                fill.children.remove(branch)
            else:
                self._stop_waiting(branch)
            self._abandon(branch)
        self._drop_idle_fills()

    def truncate(self, nodes: Iterable[Node], version: int) -> list[Node]:
        """End branches where they are, with "abort"; a branch that has sampled nothing continues.

        Keys and values are kept if the branch was being decoded, otherwise computed again when needed.

        Returns:
            The nodes that ended.
        """
        ended = []
        for branch in self._doomed(nodes):
            if self.is_running(branch) and self.slots.length[branch.slot] > branch.node.start:
                ended.append(self.end(branch, "abort", version))
                continue
            if id(branch) in self.fills:  # it was preempted, and is being filled again
                self.fills.pop(id(branch))
                self._wait_again(branch)
            if branch.kept is not None and not branch.is_given:
                self._stop_waiting(branch)
                ended.append(branch.node.fill(*branch.kept, finish="abort", version=branch.sampled_by(version)))
                branch.node.in_flight = False
                del self.branches[branch.node]
        self._drop_idle_fills()
        return ended

    def _doomed(self, nodes: Iterable[Node]) -> Iterator[Branch]:
        """The branches of these nodes that are in flight, checked as each is reached."""
        return (self.branches[node] for node in nodes if node.in_flight)

    def _drop_idle_fills(self) -> None:
        """Drop fills that no branch belongs to any more; a branch that still waits for one begins it anew."""
        for key in [key for key, fill in self.fills.items() if fill.branch is None and not fill.children]:
            self._drop_fill(key)

    def preempt_all(self) -> None:
        """Preempt everything in progress: give keys and values back, keep tokens and fill them again later."""
        for branch in list(self.running.values()):
            self._preempt(branch)
        for key in list(self.fills):
            fill = self._drop_fill(key)
            for branch in [*fill.children, *([fill.branch] if fill.branch else [])]:
                self._wait_again(branch)

    # ---- moves -----------------------------------------------------------------------------------------------

    def _take_slot(self, branch: Branch, kv: KV) -> None:
        parent = branch.node.parent
        assert parent is not None
        pages = self.cache.path_pages(parent)
        pages[kv.first :] = kv.pages
        branch.kv = kv
        branch.slot = self.slots.take(pages)
        self.slots.begin(
            branch.slot,
            start=branch.node.start,
            before=int(parent.tokens[-1]),
            limit=branch.limit,
            stream=branch.node.stream,
            sampling=branch.sampling,
            features=branch.features,
        )

    def _join(self, branch: Branch) -> None:
        branch.place = (branch.node.tree.ordinal, *(node.serial for node in branch.node.path()))
        self.running[branch.slot] = branch
        bisect.insort(self._order, (branch.place, branch.slot))
        self._running_slots = None

    def _leave(self, branch: Branch) -> Outputs:
        """Remove a branch from the running ones; returns what it sampled and records how far its KV is computed."""
        assert branch.kv is not None
        outputs = self.slots.outputs(branch.slot)
        branch.kv.computed = int(self.slots.length[branch.slot]) - 1
        del self.running[branch.slot]
        del self._order[bisect.bisect_left(self._order, (branch.place, branch.slot))]
        self.slots.give_back(branch.slot)
        branch.slot = -1
        self._running_slots = None
        return outputs

    def _preempt(self, branch: Branch) -> None:
        outputs = self._leave(branch)
        branch.kept = outputs if len(outputs[0]) else None
        self.counters.preemptions += 1
        self._wait_again(branch)

    def _wait_again(self, branch: Branch) -> None:
        """Put a branch back among the waiting ones, by age, without slot and pages."""
        if branch.slot >= 0:  # it was being filled, or about to start
            outputs = self.slots.outputs(branch.slot)
            branch.kept = outputs if len(outputs[0]) else None
            self.slots.give_back(branch.slot)
            branch.slot = -1
        if branch.kv is not None:
            branch.kv.release()
            branch.kv = None
        bisect.insort(self.waiting, branch, key=lambda waiting: waiting.ticket)

    def _stop_waiting(self, branch: Branch) -> None:
        place = bisect.bisect_left(self.waiting, branch.ticket, key=lambda waiting: waiting.ticket)
        assert self.waiting[place] is branch, "a branch is not where it was left"
        del self.waiting[place]

    def _drop_fill(self, key: int) -> Fill:
        fill = self.fills.pop(key)
        if fill.branch is None:
            self.slots.give_back(fill.slot)
        return fill

    def _abandon(self, branch: Branch) -> None:
        if branch.slot >= 0:
            self.slots.give_back(branch.slot)
        if branch.kv is not None:
            branch.kv.release()
        branch.node.abandon()
        del self.branches[branch.node]

    def end(self, branch: Branch, finish: str | None, version: int) -> Node:
        """End a running branch where it is; the node gets its tokens and its pages."""
        branch.node.fill(*self._leave(branch), finish=finish, version=branch.sampled_by(version))
        if branch.features is not None:
            branch.features.leave(branch.node)
        branch.node.kv, branch.node.in_flight = branch.kv, False
        del self.branches[branch.node]
        return branch.node
