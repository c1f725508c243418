"""TreeRL's advantage of a step (arXiv 2506.11902): its value relative to the prompt's and to its parent's.

    A(s) = ((V(s) - V(prompt)) + (V(s) - V(parent))) / sqrt(leaves below s)

V is the mean reward of the leaves below. TreeRL's steps run from fork to fork, so for all nodes of an unbranched run
the parent is the fork above the run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ibtpo_engine.export import PackedTree

Doubles = npt.NDArray[np.float64]


def treerl(packed: PackedTree, values: Doubles, leaves: npt.NDArray[np.int64]) -> Doubles:
    """float64 [S], 0 for the prompt.

    Args:
        packed: the tree; S nodes.
        values: [S], V of each node.
        leaves: [S], trajectories through each node.
    """
    index = {node: i for i, node in enumerate(packed.nodes)}
    fork = np.zeros(len(packed.nodes), np.int64)  # the fork above each node's run
    for i, node in enumerate(packed.nodes[1:], start=1):
        assert node.parent is not None
        above = index[node.parent]
        fork[i] = fork[above] if leaves[above] == leaves[i] else above
    a: Doubles = ((values - values[0]) + (values - values[fork])) / np.sqrt(leaves)
    return a
