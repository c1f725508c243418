"""The packed layout of a tree: depth-first tokens with the end of each token's subtree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ibtpo_engine.arrays import Floats, Ints

if TYPE_CHECKING:
    from ibtpo_engine.tree import Node, Tree


@dataclass(frozen=True, kw_only=True)
class PackedTree:
    """One tree, its N tokens in depth-first pre-order; query i sees key j <=> j <= i < end[j].

    Predictions live on edges: edge e says that row ``edge_row[e]`` predicted token ``edge_token[e]``. The last token
    of a node predicts the first token of each child, so a row may have several edges, or none.

    Attributes:
        tokens, pos, end, node: int32 [N]: token id; depth on its path; exclusive end of its subtree in this order;
            index into `nodes`.
        logprob, logprob_raw, entropy: float32 [N], as on `Node`; zero on prompt tokens.
        version: int32 [N], version of the weights that sampled the token.
        edge_row, edge_token: int32 [E], indices into the N tokens; one edge a sampled token, in packed order.
        nodes: the tree's nodes, depth first.
        first: int32 [len(nodes)], index of each node's first token; a node is a contiguous run.
    """

    tokens: Ints
    pos: Ints
    end: Ints
    node: Ints
    logprob: Floats
    logprob_raw: Floats
    entropy: Floats
    version: Ints
    edge_row: Ints
    edge_token: Ints
    nodes: list[Node]
    first: Ints

    def __len__(self) -> int:
        return len(self.tokens)


def pack_tree(tree: Tree) -> PackedTree:
    """Lay out `tree` depth first (pending nodes left out)."""
    nodes = tree.nodes()
    lengths = np.array([len(node) for node in nodes], np.int32)
    first = (np.cumsum(lengths) - lengths).astype(np.int32)
    index = {id(node): i for i, node in enumerate(nodes)}
    parent = np.array([-1 if node.parent is None else index[id(node.parent)] for node in nodes], np.int32)
    subtree_end = first + lengths
    for i in range(len(nodes) - 1, 0, -1):  # children follow their parent, so one sweep from the back suffices
        subtree_end[parent[i]] = max(subtree_end[parent[i]], subtree_end[i])
    num_tokens = int(lengths.sum())
    start = np.array([node.start for node in nodes], np.int32)
    row = np.arange(-1, num_tokens - 1, dtype=np.int32)  # the token before, ...
    row[first[1:]] = (first + lengths - 1)[parent[1:]]  # ... which for a node's first token is its parent's last
    edge_token = np.arange(tree.prompt_len, num_tokens, dtype=np.int32)
    return PackedTree(
        tokens=np.concatenate([node.tokens for node in nodes]),
        pos=np.arange(num_tokens, dtype=np.int32) - np.repeat(first - start, lengths),
        end=np.repeat(subtree_end.astype(np.int32), lengths),
        node=np.repeat(np.arange(len(nodes), dtype=np.int32), lengths),
        logprob=np.concatenate([node.logprob for node in nodes]),
        logprob_raw=np.concatenate([node.logprob_raw for node in nodes]),
        entropy=np.concatenate([node.entropy for node in nodes]),
        version=np.repeat(np.array([node.version for node in nodes], np.int32), lengths),
        edge_row=row[edge_token],
        edge_token=edge_token,
        nodes=nodes,
        first=first,
    )
