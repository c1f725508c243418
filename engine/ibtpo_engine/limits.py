"""Which nodes may be extended, and how far, on an engine or over a backend."""

from __future__ import annotations

from collections.abc import Mapping

from ibtpo_engine.tree import Node, Tree


def check_open(node: Node, trees: Mapping[int, Tree]) -> None:
    """Raise ValueError unless a node is on one of an engine's open trees, given by ordinal; TypeError if it is none."""
    if not isinstance(node, Node):
        raise TypeError(f"{node!r} is not a Node; give nodes that node.fork() or node.resume() returned")
    if node.tree.closed or trees.get(node.tree.ordinal) is not node.tree:
        raise ValueError(f"{node!r} belongs to a closed tree or to another engine; use an open tree of this engine")
    if node.dropped:
        raise ValueError(f"{node!r} was dropped from its tree; fork again")


def depth_limit(node: Node, trees: Mapping[int, Tree], max_tokens: int, context: int | None) -> int:
    """Depth a pending node may reach.

    Args:
        trees: the engine's open trees, by ordinal.
        max_tokens: most tokens below the prompt.
        context: positions of the model, if known.

    Raises:
        ValueError: it cannot be extended.
    """
    check_open(node, trees)
    if not node.is_pending or node.in_flight:
        raise ValueError(f"{node!r} is not pending; use node.fork() to grow below it")
    limit = node.tree.prompt_len + max_tokens
    limit = limit if context is None else min(limit, context)
    if node.start >= limit:
        remedy = "that is the model's context; fork earlier" if limit == context else "raise max_tokens"
        raise ValueError(f"{node!r} starts at depth {node.start}, but paths end at {limit}; {remedy}")
    return limit
