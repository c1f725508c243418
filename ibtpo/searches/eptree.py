"""EPTree, the entropy-guided search of TreeRL (arXiv 2506.11902): branch at the most surprising tokens.

M chains from the prompt each start a tree. Then L rounds follow: in every tree the N tokens with the largest surprisal,
-log p of the sampled token, are picked, and T new continuations begin just before each. ::

    chain     [7 ....... 12 | 12 ....... 19)     -log p is largest at token 12
                        `- [12 .......... 21)    a continuation; neither token 12 is ever picked again

Never picked are the first token of a branch (it has siblings already) and tokens from depth `deepest` on, where a
continuation would have no room. With enough tokens to pick, a group has M*(1 + L*N*T) trajectories.

Branches begin inside steps, so steps are cut and estimates computed when the tree is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.ib import check_known
from ibtpo.searches.base import Sampled, count_steps, prepare
from ibtpo.steps import Splitter, split_steps
from ibtpo_engine import Growth
from ibtpo_engine.tree import Node, Tree


def eptree(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """EPTree(M, N, L, T) as `initial_branches`, `nodes_per_round`, `rounds` - 1, `branches_per_node`."""
    estimates = prepare(tree, ib)
    deepest = int(config.deepest_share * max_tokens)
    leaves = yield from eptree_leaves(
        tree,
        m=config.initial_branches,
        n=config.nodes_per_round,
        rounds=config.rounds - 1,
        t=config.branches_per_node,
        deepest=deepest,
    )
    for node in tree.nodes():
        if node.start >= tree.prompt_len:
            split_steps(node, splitter)
    seen = {tree.root}
    for leaf in leaves:
        steps = [node for node in leaf.path() if node not in seen]
        count_steps(steps, leaf.notes["round"], estimates)
        seen.update(steps)
    tree.notes["iid_leaves"] = [leaf for leaf in leaves if leaf.notes["round"] == 0]


def eptree_leaves(tree: Tree, *, m: int, n: int, rounds: int, t: int, deepest: int) -> Sampled:
    """The growth alone, which needs no rewards; a node is the run of tokens between two forks.

    Args:
        m: M, chains from the prompt.
        n: N, tokens picked a round in each chain's tree.
        rounds: L.
        t: T, continuations begun before a picked token.
        deepest: tokens this far below the prompt, or farther, are not picked.

    Returns:
        the leaves in the order sampled, with the tree each belongs to in ``notes["group"]``; the picks are in
        ``tree.notes["branched"]`` as (round, node, surprisal).
    """
    leaves = yield tree.root.fork(m)
    _number(leaves, range(m), 0)
    branched = tree.notes.setdefault("branched", [])
    for turn in range(1, rounds + 1):
        pending: list[Node] = []
        groups: list[int] = []
        for group, top in enumerate(list(tree.root.children)):
            for node, tokens in most_surprising(top, n, tree.prompt_len + deepest).items():
                for at, surprisal in tokens:  # last first: a cut moves the tokens before it to a new node
                    node = node.split(at)
                    branched.append((turn, node, surprisal))
                    pending += node.fork(t)
            groups += [group] * (len(pending) - len(groups))
        if not pending:
            break
        new = yield pending
        _number(new, groups, turn)
        leaves = leaves + new
    return leaves


def most_surprising(top: Node, count: int, deepest: int) -> dict[Node, list[tuple[int, float]]]:
    """The `count` tokens with the largest surprisal in the subtree of `top`, excluding the first tokens of nodes.

    Args:
        deepest: depth, including the prompt, from which on no token is picked.

    Returns:
        (offset > 0, surprisal in nats) of the picks in each node, last offset first.

    Raises:
        ValueError: a log-prob is NaN.
    """
    tokens = [
        (-logprob, node, at)
        for node in top.walk()
        for at, logprob in enumerate(node.logprob[1 : max(deepest - node.start, 1)].tolist(), start=1)
    ]
    check_known("surprisal", (surprisal for surprisal, _, _ in tokens))
    picked: dict[Node, list[tuple[int, float]]] = {}
    for surprisal, node, at in sorted(tokens, key=lambda token: -token[0])[:count]:
        picked.setdefault(node, []).append((at, surprisal))
    return {node: sorted(offsets, reverse=True) for node, offsets in picked.items()}


def _number(leaves: Sequence[Node], groups: Iterable[int], turn: int) -> None:
    for leaf, group in zip(leaves, groups, strict=True):
        leaf.notes.update(group=group, round=turn)
