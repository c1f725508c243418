"""A search under way, of which an engine grows any number side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from ibtpo_engine.errors import BudgetSpent
from ibtpo_engine.tree import Node, Tree

Growth = Generator[Sequence[Node], list[Node], None]
Search = Callable[[Tree], Growth]
Reward = Callable[[Tree, Node], "float | Future[float]"]


class Growing:
    """A search under way: its generator, what it waits for, and the rewards on their way."""

    def __init__(self, index: int, tree: Tree, search: Search, reward: Reward | None) -> None:
        self.index = index
        self.tree = tree
        self.search = search
        self.reward = reward
        self.generator: Growth | None = None
        self.nodes: list[Node] = []
        self.unfinished = 0
        self.rewards: dict[Node, Future[float]] = {}
        self.done = False

    def ask(self, finished: list[Node]) -> None:
        """Send the finished nodes into the search (begun at the first call); take what it wants extended next."""
        try:
            if self.generator is None:
                self.generator = self.search(self.tree)
                self.nodes = list(next(self.generator))
            else:
                self.nodes = list(self.generator.send(finished))
        except (StopIteration, BudgetSpent):
            self.nodes, self.done = [], True
        self._begin_round()

    def refuse(self, error: BudgetSpent) -> None:
        """The tree's budget does not hold the round asked for: tell the search, which ends or asks for less."""
        assert self.generator is not None
        for node in self.nodes:
            node.drop()
        try:
            self.nodes = list(self.generator.throw(error))
        except (StopIteration, BudgetSpent):
            self.nodes, self.done = [], True
        self._begin_round()

    def _begin_round(self) -> None:
        if any(node.tree is not self.tree for node in self.nodes):
            raise ValueError("a search may yield nodes of its own tree only; use engine.extend for others")
        self.unfinished = len(self.nodes)

    def finished(self, node: Node) -> None:
        """A branch ended: grade it, unless it only paused."""
        self.unfinished -= 1
        graded = self.reward(self.tree, node) if self.reward is not None and node.finish is not None else None
        if isinstance(graded, Future):
            self.rewards[node] = graded
        else:
            node.reward = graded

    def lost(self, node: Node) -> None:
        """A branch of the round was aborted and is off the tree."""
        if node in self.nodes:
            self.nodes.remove(node)
            self.unfinished -= 1

    def is_ready(self) -> bool:
        """Are all branches of the round finished and graded?"""
        for node in [node for node, future in self.rewards.items() if future.done()]:
            node.reward = float(self.rewards.pop(node).result())
        return self.unfinished == 0 and not self.rewards
