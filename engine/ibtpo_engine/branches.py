"""The scheduler's units of work: branches being sampled and known tokens being filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.features import Features
from ibtpo_engine.pages import KV, PAGE
from ibtpo_engine.runner import Rows
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.slots import Outputs
from ibtpo_engine.tree import Node


@dataclass(eq=False)
class Branch:
    """A pending node being sampled; `kept` holds what it had sampled when it was preempted."""

    node: Node
    sampling: Sampling
    limit: int  # depth it may reach ...
    ticket: int = -1  # order of arrival, given by the scheduler: the youngest is preempted first
    kv: KV | None = None
    slot: int = -1
    kept: Outputs | None = None
    features: Features | None = None
    place: tuple[int, ...] = ()  # depth-first sort key while running
    at_limit: str = "length"  # ... and how it ends there
    version: int | None = None  # of the weights that sampled its first tokens, if they have changed since
    is_given: bool = False  # are its tokens given (`kept` from the start) and only to be scored?

    def sampled_by(self, version: int) -> int:
        """Version of the weights that its node is marked with if it ends under `version`."""
        return version if self.version is None else self.version


@dataclass(eq=False)
class Fill:
    """Known tokens whose keys and values are computed next: a node's, or (`branch` given) a preempted branch's.

    If the node is cut meanwhile, `node` is the lower half; the fill goes on over both halves.
    """

    kv: KV
    tokens: Ints
    start: int  # depth of tokens[0]
    slot: int
    node: Node
    branch: Branch | None = None
    children: list[Branch] = field(default_factory=list)  # they start as soon as the node is filled
    computed: int = field(init=False)  # depth up to which keys and values are there

    def __post_init__(self) -> None:
        self.computed = self.kv.computed

    @property
    def end(self) -> int:
        """Depth to fill up to; a branch's last token stays for its next decode row."""
        return self.start + len(self.tokens) - (self.branch is not None)

    def chunk(self, budget: int) -> Chunk:
        """The rows to run in this step, at most `budget`; of a computed node the last row, for its hidden state."""
        if self.computed < self.end:
            return Chunk(self, self.computed, min(self.end, self.computed + budget))
        rows = 1 if self.branch is None and budget > 0 else 0
        return Chunk(self, self.end - 1, self.end - 1 + rows)

    def reached(self, depth: int) -> None:
        """Keys and values are there up to `depth`."""
        self.computed = max(self.computed, depth)
        if self.branch is not None:
            self.kv.computed = self.computed
            return
        part: Node | None = self.node
        while part is not None and part.end > self.start:
            part.kv.computed = max(part.kv.computed, min(self.computed, part.end))
            part = part.parent


@dataclass(frozen=True, eq=False)
class Chunk:
    """Depths [begin, end) of a fill: rows of one step."""

    fill: Fill
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def depths(self) -> Ints:
        """int32 [len]."""
        return np.arange(self.begin, self.end, dtype=np.int32)


def chunk_rows(chunks: Sequence[Chunk], table: Ints) -> Rows:
    """The rows of chunks, one after another.

    Args:
        chunks: at least one.
        table: int32 [slots, P], the page table.
    """
    fills = [chunk.fill for chunk in chunks]
    begin, count = np.array([chunk.begin for chunk in chunks]), np.array([len(chunk) for chunk in chunks])
    slot, computed = np.array([fill.slot for fill in fills]), np.array([fill.computed for fill in fills])
    slot, computed = np.repeat(slot, count), np.repeat(computed, count)
    depths = np.arange(len(slot)) - np.repeat(np.cumsum(count) - count - begin, count)
    tokens = [chunk.fill.tokens[chunk.begin - chunk.fill.start : chunk.end - chunk.fill.start] for chunk in chunks]
    pages = table[slot, depths // PAGE].astype(np.int64)
    return Rows(
        np.concatenate(tokens).astype(np.int64),
        depths,
        np.where(depths < computed, -1, pages * PAGE + depths % PAGE),
        slot.astype(np.int32),
    )
