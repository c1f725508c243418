"""Sampling a group of trajectories: searches as generators over an engine tree (paper, section 3, and other methods).

A search yields the pending nodes it wants extended and receives them finished and graded. ::

    ibtree        B0 trajectories, then rounds that branch at the K nodes with the highest IB-Score (guided.py)
    random-tree   the same, at any K nodes: the paper's control
    independent   independent trajectories only
    eptree        rounds that branch just before each chain's most surprising tokens (eptree.py)
    treepo        two children at every segment boundary until the group is full (treepo.py)
    tree-grpo     M trees, each branched at random nodes of its own (tree_grpo.py)
    vineppo       chains, and rollouts from every step only to estimate its value (vineppo.py)

Notes they set::

    tree.notes["ib"]                 the `IBEstimates`
    tree.notes["iid_leaves"]         the leaves whose mean reward is an unbiased estimate of accuracy
    tree.notes["branched"]           (round, node, score when picked: IB-Score, surprisal, or NaN if none was used)
    node.notes["round"]              the round a step was sampled in
    leaf.notes["group"]              eptree, tree-grpo: which of the group's trees a trajectory belongs to
    node.notes["value"]              vineppo: mean reward of the step's rollouts
    tree.notes["auxiliary_tokens"]   vineppo: number of tokens of these rollouts, which are no longer in the tree
"""

from __future__ import annotations

from collections.abc import Callable

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.searches.base import Method
from ibtpo.searches.eptree import eptree
from ibtpo.searches.guided import ibtree, independent, random_tree
from ibtpo.searches.tree_grpo import tree_grpo
from ibtpo.searches.treepo import treepo
from ibtpo.searches.vineppo import vineppo
from ibtpo.steps import Splitter
from ibtpo_engine import Growth
from ibtpo_engine.tree import Tree

METHODS: dict[str, Method] = {
    "ibtree": ibtree,
    "random-tree": random_tree,
    "independent": independent,
    "eptree": eptree,
    "treepo": treepo,
    "tree-grpo": tree_grpo,
    "vineppo": vineppo,
}
"""Every search by its name in `SearchConfig.method`."""


def make_search(config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Callable[[Tree], Growth]:
    """The search described by `config`, for `Engine.run`.

    Args:
        config: method and its budget.
        ib: how values and scores are estimated.
        splitter: where steps end.
        max_tokens: maximum new tokens of a trajectory; a node at that depth is not branched.
    """
    method = METHODS[config.method]
    return lambda tree: method(tree, config, ib, splitter, max_tokens)
