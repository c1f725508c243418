"""A tabular policy, for which the value of every prefix is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from random import Random

import numpy as np

from ibtpo_engine import Ahead, Node, Search, Tree


class TablePolicy:
    """A tabular policy in place of an engine: steps of one token, each right with the probability of its fact.

    At depth d a step is fact ``f`` (uniform) and then right or wrong; token = 2*f + right. A trajectory has `depth`
    steps and its reward is 1 if all are right, so the exact value of a prefix is known: see `value`.
    """

    def __init__(self, facts: Sequence[float] = (0.95, 0.7, 0.3), depth: int = 4) -> None:
        self.facts = facts
        self.depth = depth

    @property
    def value(self) -> float:
        """Exact success probability of a prompt."""
        return float(np.mean(self.facts)) ** self.depth

    def run(self, search: Search, tree: Tree, rng: Random) -> Tree:
        """Run a search on one tree, as `Engine.run` does."""
        growth = search(tree)
        asked = next(growth)
        while True:
            if isinstance(asked, Future):
                raise ValueError("TablePolicy grows one tree: there is nobody else it could wait for")
            asked = asked if isinstance(asked, Ahead) else Ahead(asked, asked)
            for node in asked.extend:
                self._extend(node, rng)
            try:
                asked = growth.send(list(asked.until))
            except StopIteration:
                return tree

    def _extend(self, node: Node, rng: Random) -> None:
        assert node.parent is not None
        above = node.parent.prefix()[node.tree.prompt_len :]
        tokens, logprob = [], []
        for _ in range(self.depth - len(above)):
            fact = rng.randrange(len(self.facts))
            right = rng.random() < self.facts[fact]
            tokens.append(2 * fact + right)
            logprob.append(math.log((self.facts[fact] if right else 1 - self.facts[fact]) / len(self.facts)))
        values = np.array(logprob, np.float32)
        node.fill(np.array(tokens), values, values, np.zeros(len(tokens), np.float32), finish="stop")
        node.reward = float(all(token % 2 for token in [*above.tolist(), *tokens]))
