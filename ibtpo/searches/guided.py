"""IBTree, its random control, and independent sampling (paper, section 3); the first two differ only in the pick."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from random import Random

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.searches.base import branch, count_leaves, fork_all, prepare, random_numbers
from ibtpo.steps import Splitter
from ibtpo_engine import Ahead, Growth, Node, Tree

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


def ibtree(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """IBTree(B0, L, K, B): branch where the IB-Score is highest."""
    return guided(tree, config, ib, splitter, max_tokens, highest_scores)


def random_tree(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """The paper's control: as `ibtree`, but branching at random nodes."""
    return guided(tree, config, ib, splitter, max_tokens, anywhere)


def independent(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """`group_size` independent trajectories from the prompt, cut into steps."""
    estimates = prepare(tree, ib)
    tree.notes["iid_leaves"] = yield from branch([tree.root], config.group_size, 0, estimates, splitter)


def guided(
    tree: Tree,
    config: SearchConfig,
    ib: IBConfig,
    splitter: Splitter,
    max_tokens: int,
    pick: Pick,
) -> Growth:
    """B0 trajectories, then rounds 1 to L-1 that branch at the nodes picked.

    With `lookahead` > 1 a round is picked before the previous ones have ended. Nodes with a branch in progress are then
    passed over, since otherwise all these rounds would branch at the same nodes.
    """
    estimates = prepare(tree, ib)
    rng = random_numbers(tree)
    tree.notes["iid_leaves"] = yield from branch([tree.root], config.initial_branches, 0, estimates, splitter)
    deepest = tree.prompt_len + max_tokens

    def choose(busy: set[Node | None]) -> list[Node]:
        candidates = [
            (node, score)
            for node, score in estimates.branching()
            if node.end < deepest and (config.branch_at_root or node is not tree.root)
        ]
        if busy:
            candidates = [(node, score) for node, score in candidates if node not in busy] or candidates
        picked = pick(candidates, config.nodes_per_round, rng) or [tree.root]
        return list(islice(cycle(picked), config.nodes_per_round))  # too few candidates take turns, so G stays the same

    under_way: deque[tuple[int, list[Node]]] = deque()
    for turn in range(1, config.rounds):
        picked = choose({leaf.parent for _, leaves in under_way for leaf in leaves})
        tree.notes["branched"] += [(turn, node, estimates.score(node)) for node in picked]
        branches = fork_all(picked, config.branches_per_node)
        under_way.append((turn, branches))
        if len(under_way) < config.lookahead:
            yield Ahead(branches, [])
        else:
            ended, until = under_way.popleft()
            leaves = yield branches if until is branches else Ahead(branches, until)
            count_leaves(leaves, ended, estimates, splitter)
    for turn, branches in under_way:
        count_leaves((yield Ahead([], branches)), turn, estimates, splitter)
