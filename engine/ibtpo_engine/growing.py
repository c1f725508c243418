"""A search under way, of which an engine grows any number side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ibtpo_engine.errors import BudgetSpent
from ibtpo_engine.tree import Node, Tree


@dataclass(frozen=True)
class Ahead:
    """What a search may yield that goes on before all its branches have ended: these, until those.

    What it is told, and when, follows from the tree alone: not from which branch ended first, so not from the batch.

    Attributes:
        extend: pending nodes to be extended.
        until: branches asked for now or before; the search receives them, finished, as soon as all of them are.
    """

    extend: Sequence[Node]
    until: Sequence[Node]


Growth = Generator["Sequence[Node] | Ahead | Future[Any]", list[Node], None]
"""Yields branches to be extended and receives them finished; a future is waited for, and nothing is received for it."""
Search = Callable[[Tree], Growth]
Reward = Callable[[Tree, Node], "float | Future[float]"]


class Growing:
    """A search under way: its generator, what it waits for, and the rewards on their way.

    Attributes:
        nodes: what it asked for last, to be extended.
        rewards: of branches that ended; futures are here until they have been read.
    """

    def __init__(self, index: int, tree: Tree, search: Search, reward: Reward | None) -> None:
        self.index = index
        self.tree = tree
        self.search = search
        self.reward = reward
        self.generator: Growth | None = None
        self.nodes: list[Node] = []
        self.rewards: dict[Node, Future[float]] = {}
        self.done = False
        self._under_way: set[Node] = set()
        self._until: list[Node] = []
        self._waits_for = 0  # how many of `_until` are under way
        self._gate: Future[Any] | None = None

    def ask(self) -> None:
        """Send into the search what it waited for (it begins at the first call); take what it wants extended next."""
        try:
            if self.generator is None:
                self.generator = self.search(self.tree)
                self._take(next(self.generator))
            else:
                self._take(self.generator.send(self._until))
        except (StopIteration, BudgetSpent):
            self._end()

    def refuse(self, error: BudgetSpent) -> None:
        """The tree's budget does not hold the round asked for: tell the search, which ends or asks for less."""
        assert self.generator is not None
        self._under_way.difference_update(self.nodes)
        for node in self.nodes:
            node.drop()
        try:
            self._take(self.generator.throw(error))
        except (StopIteration, BudgetSpent):
            self._end()

    def _take(self, asked: Sequence[Node] | Ahead | Future[Any]) -> None:
        self._gate = asked if isinstance(asked, Future) else None
        if isinstance(asked, Future):
            asked = Ahead([], [])
        asked = asked if isinstance(asked, Ahead) else Ahead(asked, asked)
        self.nodes, self._until = list(asked.extend), list(asked.until)
        if any(node.tree is not self.tree for node in [*self.nodes, *self._until]):
            raise ValueError("a search may yield nodes of its own tree only; use engine.extend for others")
        self._under_way.update(self.nodes)
        if never := [node for node in self._until if node.is_pending and node not in self._under_way]:
            raise ValueError(f"a search waits for {never[0]!r}, which it never asked to extend")
        self._waits_for = sum(node in self._under_way for node in self._until)

    def _end(self) -> None:
        self.nodes, self._until, self._waits_for, self._gate, self.done = [], [], 0, None, True

    def finished(self, node: Node) -> None:
        """A branch ended: grade it, unless it only paused."""
        self._leaves(node)
        graded = self.reward(self.tree, node) if self.reward is not None and node.finish is not None else None
        if isinstance(graded, Future):
            self.rewards[node] = graded
        else:
            node.reward = graded

    def lost(self, node: Node) -> None:
        """A branch was aborted and is off the tree; the search does not hear of it."""
        if node in self._under_way:
            self._leaves(node)
            if node in self._until:
                self._until.remove(node)

    def _leaves(self, node: Node) -> None:
        self._under_way.discard(node)
        self._waits_for -= node in self._until

    def awaited(self) -> list[Future[Any]]:
        """What it waits for besides branches: rewards, and the future it asked for."""
        return [*self.rewards.values(), *([] if self._gate is None else [self._gate])]

    def is_ready(self) -> bool:
        """Is all that the search waits for finished and graded?"""
        if self._waits_for or not (self._gate is None or self._gate.done()):
            return False
        for node in [node for node, future in self.rewards.items() if future.done()]:
            node.reward = float(self.rewards.pop(node).result())
        return not (self.rewards and any(node in self.rewards for node in self._until))
