"""Shared by the searches: preparing estimates, sampling branches, cutting them into steps and counting them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from random import Random

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.ib import IBEstimates
from ibtpo.steps import Splitter, split_steps
from ibtpo_engine import Growth, Node, Tree
from ibtpo_engine.randomness import mix

Sampled = Generator[list[Node], list[Node], list[Node]]
"""Part of a search: yields pending nodes, receives them finished and graded, returns the leaves."""

Method = Callable[[Tree, SearchConfig, IBConfig, Splitter, int], Growth]
"""(tree, search settings, IB settings, splitter, maximum new tokens of a trajectory) -> the tree's growth."""


def prepare(tree: Tree, ib: IBConfig) -> IBEstimates:
    """Attach estimates, and the notes that every search fills, to a tree with nothing sampled yet."""
    estimates = IBEstimates(tree, ib)
    tree.notes.update(ib=estimates, branched=[], iid_leaves=[])
    return estimates


def random_numbers(tree: Tree) -> Random:
    """The search's random number generator, seeded with the engine's seed and the tree's key."""
    return Random(mix(tree.root.stream, tree.key))


def branch(nodes: Iterable[Node], count: int, turn: int, estimates: IBEstimates, splitter: Splitter) -> Sampled:
    """Sample `count` new trajectories from each node, cut them into steps and count them."""
    leaves = yield fork_all(nodes, count)
    count_leaves(leaves, turn, estimates, splitter)
    return leaves


def fork_all(nodes: Iterable[Node], count: int) -> list[Node]:
    """Fork `count` pending branches off each node."""
    return [branch for node in nodes for branch in node.fork(count)]


def count_leaves(leaves: Iterable[Node], turn: int, estimates: IBEstimates, splitter: Splitter) -> None:
    """Cut trajectories sampled in round `turn` into steps and count them."""
    for leaf in leaves:
        count_steps(split_steps(leaf, splitter), turn, estimates)


def count_steps(steps: list[Node], turn: int, estimates: IBEstimates) -> None:
    """Count a trajectory sampled in round `turn`, given as the nodes it added, top down."""
    for step in steps:
        step.notes["round"] = turn
    estimates.add_leaf(steps)
