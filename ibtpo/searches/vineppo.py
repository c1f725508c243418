"""VinePPO's search (arXiv 2410.01679): chains, and K rollouts from the end of every step to estimate its value.

V of a step, and of the prompt, is the mean reward of its K rollouts; at the end of a chain it is the chain's reward.
The rollouts are dropped once they are counted: they are not trained on and enter no average. Their sampled tokens are
counted in ``tree.notes["auxiliary_tokens"]``.
"""

from __future__ import annotations

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.searches.base import branch, fork_all, prepare
from ibtpo.steps import Splitter
from ibtpo_engine import Growth
from ibtpo_engine.tree import Node, Tree


def vineppo(tree: Tree, config: SearchConfig, ib: IBConfig, splitter: Splitter, max_tokens: int) -> Growth:
    """`group_size` chains, K = `value_rollouts`; sets ``notes["value"]`` of every node."""
    estimates = prepare(tree, ib)
    tree.notes["auxiliary_tokens"] = 0
    chains = yield from branch([tree.root], config.group_size, 0, estimates, splitter)
    tree.notes["iid_leaves"] = chains
    for leaf in chains:
        assert leaf.reward is not None
        leaf.notes["value"] = leaf.reward
    steps = [leaf.path()[:-1] for leaf in chains]
    for depth in range(max(map(len, steps))):  # one depth at a time: the rollouts of all would fill the engine's pool
        states = list(dict.fromkeys(path[depth] for path in steps if depth < len(path)))
        rollouts = yield fork_all(states, config.value_rollouts)
        for i, node in enumerate(states):
            node.notes["value"] = _spend(tree, rollouts[i * config.value_rollouts : (i + 1) * config.value_rollouts])


def _spend(tree: Tree, rollouts: list[Node]) -> float:
    """Drop rollouts from the tree and count their tokens; returns their mean reward."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    for rollout in rollouts:
        tree.notes["auxiliary_tokens"] += len(rollout)
        rollout.drop()
    return sum(rewards) / len(rewards)
