"""Held-out accuracy from independent rollouts: avg@k, pass@k and greedy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ibtpo.grow import Grower, chains
from ibtpo.metrics import evaluation_metrics, is_truncated
from ibtpo.tasks import Problem
from ibtpo_engine import Node, Sampling, Tree


def evaluate(
    grower: Grower,
    problems: list[Problem],
    sampling: Sampling,
    samples: int,
    *,
    on_prompt: Callable[[Tree], None] = lambda tree: None,
) -> dict[str, float]:
    """Grade `samples` independent completions of every problem, and its greedy one.

    The same problems get the same random numbers every time, so two evaluations are paired.

    Args:
        grower: engine, task, tokenizer.
        problems: held-out problems.
        sampling: of the independent samples; the greedy pass sets temperature 0.
        samples: k.
        on_prompt: called twice a problem (sampled, then greedy) as they are done.

    Returns:
        the ``eval_*`` metrics of ibtpo/metrics.py.
    """
    begin = time.perf_counter()
    keys = [-1 - index for index in range(len(problems))]  # never a training tree's key
    sampled, _ = grower.grow(problems, keys, chains(samples), sampling, on_prompt)
    greedy, _ = grower.grow(problems, keys, chains(1), replace(sampling, temperature=0.0), on_prompt)
    rewards = [[_reward(leaf) for leaf in tree.leaves()] for tree in sampled]
    values = evaluation_metrics(rewards, [_reward(tree.leaves()[0]) for tree in greedy])
    leaves = [(leaf, tree.prompt_len) for tree in sampled for leaf in tree.leaves()]
    return values | {
        "eval_response_length": sum(leaf.end - start for leaf, start in leaves) / len(leaves),
        "eval_truncated_share": sum(is_truncated(leaf) for leaf, _ in leaves) / len(leaves),
        "evaluation_seconds": time.perf_counter() - begin,
    }


def _reward(leaf: Node) -> float:
    assert leaf.reward is not None
    return leaf.reward
