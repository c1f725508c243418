"""Accuracies of graded completions, and the evaluation during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ibtpo.evaluation.sampling import Completion, sample_completions
from ibtpo.evaluation.statistics import Doubles, estimate, ks_up_to, majority_rates
from ibtpo.grow import Grower
from ibtpo.metrics import avg_at_k, evaluation_metrics, pass_rates
from ibtpo.report import Estimate
from ibtpo.tasks import Problem
from ibtpo_engine import Sampling, Tree


def evaluate(
    grower: Grower,
    problems: Sequence[Problem],
    sampling: Sampling,
    samples: int,
    *,
    on_prompt: Callable[[Tree], object] = lambda tree: None,
) -> dict[str, float]:
    """Grade `samples` independent completions of every problem, and the greedy one; see `sample_completions`.

    Returns:
        the ``eval_*`` metrics of ibtpo/metrics.py.
    """
    begin = time.perf_counter()
    found = Evaluation(len(problems), samples)
    sample_completions(grower, problems, sampling, samples, found.add, on_prompt=on_prompt)
    return found.metrics() | {"evaluation_seconds": time.perf_counter() - begin}


class Evaluation:
    """The completions of an evaluation without their texts, so that any number of them fits into memory.

    Args:
        prompts: P.
        samples: n, number of independent samples a prompt.
    """

    def __init__(self, prompts: int, samples: int) -> None:
        self.prompts, self.samples = prompts, samples
        fields = [("there", "?"), ("reward", "f8"), ("answer", "O"), ("tokens", "i8"), ("truncated", "?")]
        self._rows = np.zeros((prompts, 1 + samples), fields)  # the greedy completion comes first
        self._greedy, self._sampled = self._rows[:, 0], self._rows[:, 1:]

    def add(self, completion: Completion) -> None:
        """Count a completion; they may come in any order.

        Raises:
            IndexError: it belongs to no prompt or sample of this evaluation.
        """
        row = (True, completion.reward, completion.answer, completion.tokens, completion.finish != "stop")
        self._rows[_index(completion.prompt, completion.sample)] = row

    def has(self, prompt: int, sample: int | None) -> bool:
        """Has this completion been added?"""
        return bool(self._rows[_index(prompt, sample)]["there"])

    def __len__(self) -> int:
        """Number of completions so far."""
        return int(self._rows["there"].sum())

    def metrics(self) -> dict[str, float]:
        """The ``eval_*`` metrics of ibtpo/metrics.py, with k = n; every completion must be there."""
        sampled, count = self._sampled, self._sampled.size
        return evaluation_metrics(sampled["reward"], self._greedy["reward"], majority=self._majority[-1]) | {
            "eval_response_length": int(sampled["tokens"].sum()) / count,
            "eval_truncated_share": int(sampled["truncated"].sum()) / count,
        }

    @cached_property
    def accuracies(self) -> dict[str, Estimate]:
        """Every accuracy by name: avg@n, pass@k and maj@k for k = 1, 2, 4, ..., n, and greedy."""
        rewards, ks = self._sampled["reward"], ks_up_to(self.samples)
        return {
            f"avg@{self.samples}": estimate(avg_at_k(rewards)),
            **{f"pass@{k}": estimate(pass_rates(rewards, k)) for k in ks},
            **{f"maj@{k}": estimate(rates) for k, rates in zip(ks, self._majority, strict=True)},
            "greedy": estimate(self._greedy["reward"]),
        }

    def summary(self) -> dict[str, Any]:
        """All results in JSON types: accuracies by name, and the metrics of the log."""
        accuracies = {
            name: {"mean": found.value, "low": found.low, "high": found.high} for name, found in self.accuracies.items()
        }
        return {"accuracies": accuracies, **self.metrics()}

    @cached_property
    def _majority(self) -> Doubles:
        """[len(ks), P]: maj@k of each prompt for k = 1, 2, 4, ..., n."""
        assert self._rows["there"].all()
        return majority_rates(self._sampled["answer"], self._sampled["reward"], ks_up_to(self.samples))


def _index(prompt: int, sample: int | None) -> tuple[int, int]:
    return prompt, 0 if sample is None else 1 + sample
