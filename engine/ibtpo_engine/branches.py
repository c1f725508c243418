"""What the scheduler moves about: branches being sampled and known tokens being filled in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ibtpo_engine.features import Features
from ibtpo_engine.pages import KV
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.slots import Ints, Outputs
from ibtpo_engine.tree import Node


@dataclass(eq=False)
class Branch:
    """A pending node being sampled; `kept` holds what a preempted one has sampled."""

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
    is_given: bool = False  # are its tokens given (`kept` from the start) and only to be scored?


@dataclass(eq=False)
class Fill:
    """Known tokens whose keys and values are computed next: a node's, or (`branch` given) a preempted branch's."""

    kv: KV
    tokens: Ints
    start: int  # depth of tokens[0]
    slot: int
    node: Node
    branch: Branch | None = None
    children: list[Branch] = field(default_factory=list)  # they start as soon as the node is filled

    @property
    def end(self) -> int:
        """Depth to fill up to; a branch's last token stays for its next decode row."""
        return self.start + len(self.tokens) - (self.branch is not None)

    def chunk(self, budget: int) -> Ints:
        """Depths of the rows to run in this step, at most `budget`."""
        if self.kv.computed < self.end:
            return np.arange(self.kv.computed, min(self.end, self.kv.computed + budget), dtype=np.int32)
        return np.arange(self.end - 1, self.end, dtype=np.int32)[: budget if self.branch is None else 0]
