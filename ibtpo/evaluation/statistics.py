r"""Estimates of pass@k and maj@k from n independent samples a prompt, without drawing subsets.

Both are exact means over all ordered choices of k of the n samples: unbiased for k new samples, and deterministic.
maj@k is the reward of the majority answer. Equal texts are one answer, samples without a readable answer do not vote,
ties go to the answer seen first, and the reward is that of its first completion; 0 if no sample votes.

In a random order each of t tied answers is first with the same probability, and so is each completion of an answer.
With c_a completions of answer a, their mean reward r_a, and u samples that do not vote:

    maj@k = sum_m sum_{votes j_a <= m, t of them equal m, t >= 1}  prod_a C(c_a, j_a) * C(u, k - sum_a j_a) / C(n, k)
                                                                  * mean of r_a over the tied answers

computed for each m in one pass over the answers, with a table over (votes so far, answers tied at m).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ibtpo.metrics import accuracy_interval
from ibtpo.report import Estimate
from ibtpo.sections.eval import MOST_SAMPLES

Doubles = npt.NDArray[np.float64]


def ks_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples` itself."""
    return [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]


def estimate(per_prompt: npt.ArrayLike) -> Estimate:
    """Mean over prompts with its 95 % interval."""
    values = np.asarray(per_prompt, np.float64)
    return Estimate(float(values.mean()), *accuracy_interval(values))


def majority_rates(answers: npt.NDArray[np.object_], rewards: Doubles, ks: Sequence[int]) -> Doubles:
    """[P, n] answers and rewards -> [len(ks), P], each prompt's maj@k."""
    rows = [majority_at(a.tolist(), r.tolist(), ks) for a, r in zip(answers, rewards, strict=True)]
    return np.asarray(rows, np.float64).T


def majority_at(answers: Sequence[str | None], rewards: Sequence[float], ks: Sequence[int]) -> list[float]:
    """maj@k of one prompt for every k of `ks`; see the module's docstring.

    Args:
        answers: [n], None for a sample without a readable answer.
        rewards: [n] of the same samples.

    Raises:
        ValueError: not 1 <= k <= n <= `MOST_SAMPLES`.
    """
    samples = len(answers)
    if not all(1 <= k <= samples <= MOST_SAMPLES for k in ks):
        raise ValueError(f"majority_at: n={samples}, ks={list(ks)} need 1 <= k <= n <= {MOST_SAMPLES}")
    of: dict[str, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            of.setdefault(answer, []).append(reward)
    groups = sorted((len(group), math.fsum(group) / len(group)) for group in of.values())
    votes = sum(count for count, _ in groups)
    won = sum((_won_with(m, groups, votes) for m in _sizes(groups)), start=np.zeros(votes + 1))
    silent = samples - votes
    return [
        float(sum(won[j] * math.comb(silent, k - j) for j in range(min(k, votes) + 1)) / math.comb(samples, k))
        for k in ks
    ]


def _sizes(groups: Iterable[tuple[int, float]]) -> range:
    return range(1, 1 + max((count for count, _ in groups), default=0))


@lru_cache(maxsize=MOST_SAMPLES + 1)
def _binomials(n: int) -> Doubles:
    """[n + 1]: C(n, j)."""
    return np.array([math.comb(n, j) for j in range(n + 1)], np.float64)


def _with_votes(choices: Doubles, table: Doubles) -> Doubles:
    """[v, tied] by votes cast -> [v + len(choices) - 1, tied]: add j votes, which can be cast in choices[j] ways."""
    more = np.zeros((len(table) + len(choices) - 1, table.shape[1]))
    if len(choices) > table.shape[1]:  # loop over columns or over numbers of votes, whichever are fewer
        for tied in range(table.shape[1]):
            more[:, tied] = np.convolve(choices, table[:, tied])
    else:
        for j, ways in enumerate(choices):
            more[j : j + len(table)] += ways * table
    return more


def _won_with(most: int, groups: Sequence[tuple[int, float]], votes: int) -> Doubles:
    """[votes + 1]: by number of votes cast, the winners' reward summed over all choices in which `most` votes win.

    `groups` are sorted by size: the tables below grow with the votes and ties possible so far, and small answers never
    tie.
    """
    ways = np.ones((1, 1))  # [votes cast, answers tied at `most`]: number of choices
    paid = np.zeros((1, 1))  # the same choices, each times the summed rewards of its tied answers
    for count, reward in groups:
        cast, tied = ways.shape
        new_ways = np.zeros((cast + min(count, most), tied + (count >= most)))
        new_paid = np.zeros_like(new_ways)
        fewer = _binomials(count)[:most]
        new_ways[: cast + len(fewer) - 1, :tied] = _with_votes(fewer, ways)
        new_paid[: cast + len(fewer) - 1, :tied] = _with_votes(fewer, paid)
        if count >= most:
            choices = float(math.comb(count, most))  # NumPy 1 makes objects of what int64 does not hold
            new_ways[most:, 1:] += choices * ways
            new_paid[most:, 1:] += choices * (paid + reward * ways)
        ways, paid = new_ways, new_paid
    shares = np.zeros(votes + 1)
    shares[: len(paid)] = (paid[:, 1:] / np.arange(1, ways.shape[1])).sum(axis=1)
    return shares
