"""How a group of trajectories is sampled: searches as generators over an engine tree (paper, section 3).

A search yields the pending nodes it wants extended and receives them finished and graded. All three here are one
loop: B0 trajectories from the prompt, then rounds that branch at nodes somebody picks; they differ in the pick. ::

    ibtree        the K nodes with the highest IB-Score, ties broken at random
    random-tree   any K nodes
    independent   no rounds

What they leave behind: ``tree.notes["ib"]`` the `IBEstimates`, ``tree.notes["iid_leaves"]`` the leaves of round 0 (the
only ones whose mean reward is an unbiased accuracy), ``tree.notes["branched"]`` a list of (round, node, IB-Score when
picked), and ``node.notes["round"]`` the round a step was sampled in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import cycle, islice
from random import Random

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.ib import IBEstimates
from ibtpo.steps import Splitter, split_steps
from ibtpo_engine.randomness import mix
from ibtpo_engine.tree import Node, Tree

Growth = Generator[list[Node], list[Node], None]
"""Yields pending nodes, receives them finished (`finish` and `reward` set)."""

Scored = list[tuple[Node, float]]
Pick = Callable[[Scored, int, Random], list[Node]]
"""(candidates with their IB-Scores, K, random numbers) -> up to K of them."""


def highest_scores(candidates: Scored, count: int, rng: Random) -> list[Node]:
    """The `count` candidates with the highest IB-Score, best first; ties in random order."""
    ranked = sorted((-score, rng.random(), i) for i, (_, score) in enumerate(candidates))
    return [candidates[i][0] for _, _, i in ranked[:count]]


def anywhere(candidates: Scored, count: int, rng: Random) -> list[Node]:
    """`count` different candidates, all equally likely."""
    return [node for node, _ in rng.sample(candidates, min(count, len(candidates)))]


def make_search(config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Callable[[Tree], Growth]:
    """The search `config` describes, ready for `Engine.run`.

    Args:
        config: method and its budget.
        ib: how values and scores are estimated.
        splitter: where steps end.
        max_tokens: most new tokens of a trajectory; a node that deep is not branched.
    """
    methods: dict[str, Callable[[Tree, SearchConfig, IBConfig, Splitter, int], Growth]]
    methods = {"ibtree": ibtree, "random-tree": random_tree, "independent": independent}
    method = methods[config.method]
    return lambda tree: method(tree, config, ib, splitter, max_tokens)


def ibtree(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """IBTree(B0, L, K, B): branch where the IB-Score is highest."""
    return _grow_tree(tree, config, ib, splitter, max_tokens, highest_scores)


def random_tree(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """The same tree sizes, branching at random nodes: the paper's control."""
    return _grow_tree(tree, config, ib, splitter, max_tokens, anywhere)


def independent(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """`group_size` trajectories from the prompt, cut into steps like the others."""
    estimates = _prepare(tree, ib)
    tree.notes["iid_leaves"] = yield from _branch([tree.root], config.group_size, 0, estimates, splitter)


def _grow_tree(
    tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int, pick: Pick
) -> Growth:
    estimates = _prepare(tree, ib)
    rng = Random(mix(tree.root.stream, tree.key))
    tree.notes["iid_leaves"] = yield from _branch([tree.root], config.initial_branches, 0, estimates, splitter)
    deepest = tree.prompt_len + max_tokens
    for turn in range(1, config.rounds):
        candidates = [
            (node, score)
            for node, score in estimates.branching()
            if node.end < deepest and (config.branch_at_root or node is not tree.root)
        ]
        picked = pick(candidates, config.nodes_per_round, rng) or [tree.root]
        picked = list(islice(cycle(picked), config.nodes_per_round))  # fewer than K candidates: the same G all the same
        tree.notes["branched"] += [(turn, node, estimates.score(node)) for node in picked]
        yield from _branch(picked, config.branches_per_node, turn, estimates, splitter)


def _prepare(tree: Tree, ib: IBConfig) -> IBEstimates:
    estimates = IBEstimates(tree, ib)
    tree.notes.update(ib=estimates, branched=[], iid_leaves=[])
    return estimates


def _branch(
    nodes: Iterable[Node], count: int, turn: int, estimates: IBEstimates, splitter: Splitter
) -> Generator[list[Node], list[Node], list[Node]]:
    """Sample `count` new trajectories from each node, cut them into steps and count them."""
    leaves = yield [branch for node in nodes for branch in node.fork(count)]
    for leaf in leaves:
        steps = split_steps(leaf, splitter)
        for step in steps:
            step.notes["round"] = turn
        estimates.add_leaf(steps)
    return leaves
