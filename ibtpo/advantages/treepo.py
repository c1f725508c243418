"""TreePO's advantage of a trajectory (arXiv 2508.17445): relative to the trajectories that share each of its prefixes.

    A(i) = mean over depths d of ( R_i - mean of R over the leaves below i's ancestor of depth d )

Depth 0 is the prompt, which always counts; a deeper ancestor counts only if another leaf shares it, since otherwise its
term is R_i - R_i = 0. The result is whitened over all tokens of the batch: see `whiten`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def treepo(rewards: Doubles, begin: Longs, end: Longs) -> Doubles:
    """float64 [G], before whitening.

    Args:
        rewards: [G].
        begin, end: [S]; the trajectories through each node are [begin, end); the prompt comes first.
    """
    total, groups = np.zeros(len(rewards)), np.zeros(len(rewards))
    for node, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        if node == 0 or last - first > 1:
            total[first:last] += rewards[first:last] - rewards[first:last].mean()
            groups[first:last] += 1
    return total / groups


def whiten(advantages: Sequence[Doubles], lengths: Sequence[Longs], eps: float) -> list[Doubles]:
    """Scale advantages to mean 0 and deviation 1 over the tokens of all given trajectories.

    Args:
        advantages: [G] of each tree.
        lengths: sampled tokens of the same trajectories.
        eps: added to the deviation.
    """
    if not advantages:
        return []
    values, weights = np.concatenate(advantages), np.concatenate(lengths)
    mean = np.average(values, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    return [(one - mean) / (deviation + eps) for one in advantages]
