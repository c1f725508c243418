"""The information-bottleneck estimates of a growing tree: values, IB-Scores, Cov(eta1, eta2) (paper, section 2).

    phat(s)   value: estimate of the mean reward below s
    eta1(s)   = phat(s) / phat(parent) - (1 + 1/beta)            information gained about the right answer
    eta2(s)   = pi(s)                                            the policy's confidence in the step
    J(s)      = (1 + beta)/n * sum over the n children b of eta1(b)*eta2(b)

Because the ratios of the children average to 1 (exactly so with recursive values),
``J = (1 + beta) * (Cov(eta1, eta2) - mean(eta2)/beta)``: high where confidence sits on the branches that lead to the
answer and the policy is still undecided.

A new trajectory changes values and scores only along its own path, so adding one costs O(depth * children). Shrunk
values depend on the values of all ancestors, so all of them are recomputed, O(nodes), when one is next asked for.

Settings beyond the paper: ``value="shrunk"`` shrinks a node's value towards its parent's, as if k more leaves had that
value; ``score_beta="balanced"`` ranks nodes by J at a beta computed from the tree; ``score_bonus`` ranks them by
J + c * (standard error of J).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ibtpo.config import IBConfig
from ibtpo_engine.tree import Node, Tree


def check_known(name: str, logprobs: Iterable[float]) -> None:
    """Raise ValueError if a log-prob under the distribution sampled from is NaN; `name` is what would rest on it."""
    if math.isnan(sum(logprobs)):
        raise ValueError(
            f"{name}: the log-probs under the sampling distribution are NaN. A server's raw log-probs are those only "
            "at temperature 1 without top-p, top-k and min-p; sample so, or let the server return them"
        )


def step_probability(logprob: npt.NDArray[np.floating[Any]], kind: str) -> float:
    """pi(s) of a step from its tokens' log-probs [n >= 1]; `kind` as in `IBConfig.step_probability`.

    Raises:
        ValueError: a log-prob is NaN, or `kind` is unknown.
    """
    values: list[float] = logprob.tolist()
    check_known("step_probability", values)
    if kind == "geometric":
        return math.exp(sum(values) / len(values))
    if kind == "product":
        return math.exp(sum(values))
    if kind == "mean":
        return sum(map(math.exp, values)) / len(values)
    if kind == "min":
        return math.exp(min(values))
    raise ValueError(f"step_probability: {kind!r} is not one of geometric, product, mean, min")


_NO_SPREAD = 1e-9  # standard deviations below this are rounding


class _Cell:
    """Statistics of one step: a node of the tree, or several identical siblings if duplicates are merged."""

    __slots__ = ("draws", "ends", "leaves", "node", "parent", "probability", "ratio_value", "score", "total", "value")

    def __init__(self, node: Node, parent: _Cell | None, probability: float) -> None:
        self.node = node  # the first one seen
        self.parent = parent
        self.probability = probability  # eta2
        self.draws: list[_Cell] = []  # children in the order sampled; a merged one once for each draw
        self.ends: list[float] = []  # rewards of the trajectories that end here
        self.leaves = 0  # number of trajectories through this step
        self.total = 0.0  # sum of their rewards
        self.value = 0.0  # phat
        self.ratio_value = 0.0  # phat as it enters ratios: Laplace-smoothed if configured
        self.score = -math.inf  # J; only cells with draws have one


class IBEstimates:
    """Keeps the estimates of one tree up to date while it grows.

    Every node of the tree must be one step, and branches must begin at step ends: a fork inside a step would change
    steps already counted, so `add_leaf` rejects it.

    Args:
        tree: the tree, with nothing sampled yet (otherwise call `add_leaf` for each of its trajectories).
        config: beta and the choices the paper leaves open.
    """

    def __init__(self, tree: Tree, config: IBConfig) -> None:
        self.config = config
        self._offset = 1.0 + 1.0 / config.beta
        self._ratio_below_zero = 1.0 if config.zero_parent == "one" else 0.0
        self._cells: dict[Node, _Cell] = {tree.root: _Cell(tree.root, None, math.nan)}
        self._branching: list[_Cell] = []  # cells with children, in the order of their first child
        self._merged: dict[tuple[_Cell, bytes], _Cell] = {}
        self._is_stale = False  # have leaves been added since the values were shrunk?

    def add_leaf(self, steps: Sequence[Node]) -> None:
        """Count a graded trajectory.

        Args:
            steps: the nodes it added to the tree, top down; the last is the leaf.

        Raises:
            ValueError: the leaf has no reward in [0, 1], or the branch begins inside a step counted before.
        """
        leaf = steps[-1]
        if leaf.reward is None or not 0.0 <= leaf.reward <= 1.0:
            raise ValueError(f"add_leaf: the reward of {leaf!r} is {leaf.reward}; it must lie in [0, 1]")
        cell = self._known_parent(steps)
        for node in steps:
            child = self._cells[node] = self._cell(node, cell)
            if not cell.draws:
                self._branching.append(cell)
            cell.draws.append(child)
            cell = child
        cell.ends.append(leaf.reward)
        above: _Cell | None = cell
        while above is not None:
            self._update(above, leaf.reward)
            above = above.parent
        self._is_stale = self.config.value == "shrunk"

    def __getstate__(self) -> dict[str, Any]:
        """Cells refer to each other by index in a pickle: otherwise it would recurse along the tree's paths."""
        cells = list(dict.fromkeys(self._cells.values()))
        number = {cell: i for i, cell in enumerate(cells)}
        rows = [
            {name: getattr(cell, name) for name in _Cell.__slots__}
            | {"parent": cell.parent and number[cell.parent], "draws": [number[child] for child in cell.draws]}
            for cell in cells
        ]
        return vars(self) | {
            "rows": rows,
            "_cells": [(node, number[cell]) for node, cell in self._cells.items()],
            "_branching": [number[cell] for cell in self._branching],
            "_merged": [(number[above], tokens, number[cell]) for (above, tokens), cell in self._merged.items()],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("rows")
        cells = [_Cell(row["node"], None, row["probability"]) for row in rows]
        for cell, row in zip(cells, rows, strict=True):
            row["parent"] = None if row["parent"] is None else cells[row["parent"]]
            row["draws"] = [cells[child] for child in row["draws"]]
            for name, value in row.items():
                setattr(cell, name, value)
        vars(self).update(state)
        self._cells = {node: cells[i] for node, i in state["_cells"]}
        self._branching = [cells[i] for i in state["_branching"]]
        self._merged = {(cells[above], tokens): cells[i] for above, tokens, i in state["_merged"]}

    def _known_parent(self, steps: Sequence[Node]) -> _Cell:
        """The cell the trajectory branches from, after checking that no step above it was cut since it was counted."""
        node = steps[0].parent
        while node is not None and node in self._cells:
            node = node.parent
        if node is not None or steps[0].parent is None:
            raise ValueError(
                f"add_leaf: {steps[0]!r} does not branch off the end of a counted step; fork at the ends of nodes only"
            )
        if any(step in self._cells for step in steps):
            raise ValueError(f"add_leaf: {steps[-1]!r} is counted already")
        return self._cells[steps[0].parent]

    def _cell(self, node: Node, parent: _Cell) -> _Cell:
        if self.config.duplicates == "separate":
            return _Cell(node, parent, step_probability(node.logprob, self.config.step_probability))
        key = (parent, node.tokens.tobytes())
        if key not in self._merged:
            self._merged[key] = _Cell(node, parent, step_probability(node.logprob, self.config.step_probability))
        return self._merged[key]

    def _update(self, cell: _Cell, reward: float) -> None:
        """Add one reward below `cell`, whose draws are up to date."""
        cell.leaves += 1
        cell.total += reward
        if self.config.value == "recursive":
            values = [child.value for child in cell.draws] + cell.ends
            self._evaluate(cell, sum(values) / len(values))
        else:
            self._evaluate(cell, cell.total / cell.leaves)
        self._rate(cell)

    def _shrink(self) -> None:
        """Recompute all values from the prompt down, then all scores, unless they are up to date.

        A value is the posterior mean under the prior Beta(k*v, k*(1 - v)), where v is the parent's value; the prompt's
        is its mean reward.
        """
        if not self._is_stale:
            return
        self._is_stale = False
        k = self.config.shrinkage
        cells = list(dict.fromkeys(self._cells.values()))  # parents first
        for cell in cells[1:]:
            assert cell.parent is not None
            self._evaluate(cell, (cell.total + k * cell.parent.value) / (cell.leaves + k))
        for cell in cells:
            self._rate(cell)

    def _evaluate(self, cell: _Cell, value: float) -> None:
        cell.value = value
        smooth = self.config.zero_parent == "smooth"
        cell.ratio_value = (value * cell.leaves + 1) / (cell.leaves + 2) if smooth else value

    def _rate(self, cell: _Cell) -> None:
        if cell.draws:
            cell.score = self._score(cell, self.config.beta)

    def _score(self, cell: _Cell, beta: float) -> float:
        return (1.0 + beta) / len(cell.draws) * sum(self._products(cell, beta))

    def _products(self, cell: _Cell, beta: float) -> list[float]:
        """eta1 * eta2 of each child drawn, at this beta; J is their mean times 1 + beta."""
        shift = 1.0 / self.config.beta - 1.0 / beta - self._offset
        value = cell.ratio_value
        if value > 0.0:
            return [(child.ratio_value / value + shift) * child.probability for child in cell.draws]
        return [(self._ratio_below_zero + shift) * child.probability for child in cell.draws]

    def _eta1(self, cell: _Cell) -> float:
        assert cell.parent is not None
        of_parent = cell.parent.ratio_value
        return (cell.ratio_value / of_parent if of_parent > 0.0 else self._ratio_below_zero) - self._offset

    def value(self, node: Node) -> float:
        """phat(a*|s): the value of `node`, without Laplace smoothing."""
        return self._current(node).value

    def eta1(self, node: Node) -> float:
        """Information gain of a step: phat(s)/phat(parent) - (1 + 1/beta). Raises ValueError for the root."""
        return self._eta1(self._step(node))

    def eta2(self, node: Node) -> float:
        """Confidence of a step: pi(s) under the distribution it was sampled from. Raises ValueError for the root."""
        return self._step(node).probability

    def score(self, node: Node) -> float:
        """J(s), the IB-Score over the children of `node`. Raises ValueError for a leaf."""
        return self._parent(node).score

    def covariance(self, node: Node) -> float:
        """Population Cov(eta1, eta2) over the children of `node`. Raises ValueError for a leaf."""
        draws = self._parent(node).draws
        first = [self._eta1(child) for child in draws]
        second = [child.probability for child in draws]
        mean1, mean2 = sum(first) / len(draws), sum(second) / len(draws)
        return sum((a - mean1) * (b - mean2) for a, b in zip(first, second, strict=True)) / len(draws)

    def branching(self) -> Iterator[tuple[Node, float]]:
        """(node, ranking score) of every node with children, oldest first; of merged nodes only the first.

        The ranking score is the IB-Score at `ranking_beta` plus `score_bonus` times its standard error.
        """
        self._shrink()
        c, beta = self.config.score_bonus, self.ranking_beta()
        if c == 0.0 and beta == self.config.beta:
            return ((cell.node, cell.score) for cell in self._branching)
        pooled = self._pooled_variance(beta)
        return (
            (cell.node, self._score(cell, beta) + c * self._standard_error(cell, beta, pooled))
            for cell in self._branching
        )

    def ranking_beta(self) -> float:
        """beta of the ranking: `config.beta`, or if balanced, the beta at which both parts of J have the same spread.

        J = (1 + beta) * (g - h/beta) with g = mean of (ratio - 1)*pi and h = mean of pi over the children. Balanced is
        beta = std(h)/std(g) over the nodes with children, or `config.beta` while either deviation is 0.
        """
        self._shrink()
        beta = self.config.beta
        if self.config.score_beta == "fixed" or not self._branching:
            return beta
        h = [sum(child.probability for child in cell.draws) / len(cell.draws) for cell in self._branching]
        g = [cell.score / (1.0 + beta) + of_cell / beta for cell, of_cell in zip(self._branching, h, strict=True)]
        spread_g, spread_h = (math.sqrt(_squares(part) / len(part)) for part in (g, h))
        return spread_h / spread_g if min(spread_g, spread_h) > _NO_SPREAD else beta

    def _standard_error(self, cell: _Cell, beta: float, pooled: float) -> float:
        """Estimated standard error of a node's score, a mean over n children drawn: (1 + beta) * sqrt(variance/n).

        The variance of eta1*eta2 in one draw is estimated as ((sum of squared deviations) + pooled)/n: the node has
        n - 1 degrees of freedom, and the tree's pooled within-node variance adds one.
        """
        n = len(cell.draws)
        return (1.0 + beta) * math.sqrt((_squares(self._products(cell, beta)) + pooled) / n / n)

    def _pooled_variance(self, beta: float) -> float:
        """Sum of squared deviations within nodes divided by their degrees of freedom; 0 if no node has two children."""
        freedom = sum(len(cell.draws) - 1 for cell in self._branching)
        return sum(_squares(self._products(cell, beta)) for cell in self._branching) / freedom if freedom else 0.0

    def _current(self, node: Node) -> _Cell:
        self._shrink()
        return self._cells[node]

    def _step(self, node: Node) -> _Cell:
        cell = self._current(node)
        if cell.parent is None:
            raise ValueError("the root is the prompt: it has neither eta1 nor eta2")
        return cell

    def _parent(self, node: Node) -> _Cell:
        cell = self._current(node)
        if not cell.draws:
            raise ValueError(f"{node!r} has no children to score")
        return cell


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
