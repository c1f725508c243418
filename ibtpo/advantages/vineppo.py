"""VinePPO's advantage of a step (arXiv 2410.01679): V where it ends minus V where it begins.

The values are estimated from separate rollouts by the search `vineppo`, which sets ``node.notes["value"]``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ibtpo_engine.export import PackedTree

Doubles = npt.NDArray[np.float64]


def vineppo(packed: PackedTree) -> Doubles:
    """float64 [S], 0 for the prompt.

    Raises:
        ValueError: a node has no value.
    """
    if any("value" not in node.notes for node in packed.nodes):
        raise ValueError("advantage.kind: vineppo needs the node values of search.method=vineppo; set that too")
    value = {node: float(node.notes["value"]) for node in packed.nodes}
    return np.array([0.0 if node.parent is None else value[node] - value[node.parent] for node in packed.nodes])
