"""TreePO's search (arXiv 2508.17445): segments of fixed length, two children a node, and a budget of paths.

At every segment boundary each unfinished path gets a second child while the group has fewer than `group_size` paths; if
only some can have one, they are drawn at random. If all paths have ended before the group is full, the remaining paths
begin, two each, at random boundaries of random finished paths.

Which paths are unfinished at a boundary does not depend on tokens sampled after it, so the first child is sampled to
its end at once and the second is forked off the boundary later: the same trees in about log2(group_size) rounds.
"""

from __future__ import annotations

from math import nan

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.searches.base import branch, prepare, random_numbers
from ibtpo.steps import Splitter
from ibtpo_engine import Growth
from ibtpo_engine.arrays import Ints
from ibtpo_engine.tree import Tree


def treepo(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """A tree of `group_size` paths whose steps are segments of `segment_tokens`; `splitter` is not used."""
    estimates = prepare(tree, ib)
    rng = random_numbers(tree)

    def segments(tokens: Ints) -> range:
        return range(config.segment_tokens, len(tokens), config.segment_tokens)

    leaves = yield from branch([tree.root], min(2, config.group_size), 0, estimates, segments)
    tree.notes["iid_leaves"] = list(leaves)
    level, turn = list(tree.root.children), 0
    while (room := config.group_size - len(leaves)) > 0:
        turn += 1
        under_way = [node for node in level if node.children]
        if under_way:
            picked = under_way if len(under_way) <= room else rng.sample(under_way, room)
        else:
            earlier = [rng.choice(rng.choice(leaves).path()[:-1]) for _ in range((room + 1) // 2)]
            picked = [node for node in earlier for _ in range(2)][:room]
        tree.notes["branched"] += [(turn, node, nan) for node in picked]
        leaves = leaves + (yield from branch(picked, 1, turn, estimates, segments))
        level = [child for node in under_way for child in node.children]
