"""Tree-GRPO's search (arXiv 2509.21240): M trees a prompt, each branched L times at N of its nodes, drawn at random.

A tree begins as one chain and ends with K = 1 + L*N*B leaves. The trees share only the prompt, which is a node of each:
a branch there counts for the tree that picked it.
"""

from __future__ import annotations

from itertools import cycle, islice
from math import nan

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.searches.base import branch, prepare, random_numbers
from ibtpo.steps import Splitter
from ibtpo_engine import Growth
from ibtpo_engine.tree import Tree


def tree_grpo(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """(M, N, L) as `initial_branches`, `nodes_per_round`, `rounds` - 1; B, `branches_per_node`, is 1 in the paper."""
    estimates = prepare(tree, ib)
    rng = random_numbers(tree)
    chains = yield from branch([tree.root], config.initial_branches, 0, estimates, splitter)
    tree.notes["iid_leaves"] = chains
    groups = [[chain] for chain in chains]
    for turn in range(1, config.rounds):
        picked = []
        for leaves in groups:
            inner = dict.fromkeys(node for leaf in leaves for node in leaf.path()[:-1])
            candidates = [node for node in inner if config.branch_at_root or node is not tree.root] or [tree.root]
            chosen = rng.sample(candidates, min(config.nodes_per_round, len(candidates)))
            picked += list(islice(cycle(chosen), config.nodes_per_round))  # too few candidates take turns
        tree.notes["branched"] += [(turn, node, nan) for node in picked]
        new = yield from branch(picked, config.branches_per_node, turn, estimates, splitter)
        share = config.nodes_per_round * config.branches_per_node
        for group, leaves in enumerate(groups):
            leaves += new[group * share : (group + 1) * share]
    for group, leaves in enumerate(groups):
        for leaf in leaves:
            leaf.notes["group"] = group
