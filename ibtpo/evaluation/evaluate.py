"""Accuracies of graded completions, and the evaluation during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ibtpo.evaluation.sampling import Completion, sample_completions
from ibtpo.evaluation.statistics import estimate, ks_up_to, majority_rates
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
    completions: list[Completion] = []
    sample_completions(grower, problems, sampling, samples, completions.append, on_prompt=on_prompt)
    return summarize(completions).metrics() | {"evaluation_seconds": time.perf_counter() - begin}


@dataclass(frozen=True)
class Evaluation:
    """All completions of an evaluation, in order.

    Attributes:
        sampled: [P][n], the independent samples.
        greedy: [P].
    """

    sampled: list[list[Completion]]
    greedy: list[Completion]

    @property
    def samples(self) -> int:
        """n, number of independent samples a prompt."""
        return len(self.sampled[0])

    def metrics(self) -> dict[str, float]:
        """The ``eval_*`` metrics of ibtpo/metrics.py, with k = n."""
        drawn = [completion for row in self.sampled for completion in row]
        majority = majority_rates(self._answers(), self._rewards(), [self.samples])[0]
        return evaluation_metrics(self._rewards(), self._greedy_rewards(), majority=majority) | {
            "eval_response_length": sum(completion.tokens for completion in drawn) / len(drawn),
            "eval_truncated_share": sum(completion.finish != "stop" for completion in drawn) / len(drawn),
        }

    def accuracies(self) -> dict[str, Estimate]:
        """Every accuracy by name: avg@n, pass@k and maj@k for k = 1, 2, 4, ..., n, and greedy."""
        rewards, ks = self._rewards(), ks_up_to(self.samples)
        majority = majority_rates(self._answers(), rewards, ks)
        return {
            f"avg@{self.samples}": estimate(avg_at_k(rewards)),
            **{f"pass@{k}": estimate(pass_rates(rewards, k)) for k in ks},
            **{f"maj@{k}": estimate(rates) for k, rates in zip(ks, majority, strict=True)},
            "greedy": estimate(self._greedy_rewards()),
        }

    def summary(self) -> dict[str, Any]:
        """All results in JSON types: accuracies by name, and the metrics of the log."""
        accuracies = {
            name: {"mean": found.value, "low": found.low, "high": found.high}
            for name, found in self.accuracies().items()
        }
        return {"accuracies": accuracies, **self.metrics()}

    def _rewards(self) -> list[list[float]]:
        return [[completion.reward for completion in row] for row in self.sampled]

    def _answers(self) -> list[list[str | None]]:
        return [[completion.answer for completion in row] for row in self.sampled]

    def _greedy_rewards(self) -> list[float]:
        return [completion.reward for completion in self.greedy]


def summarize(completions: Iterable[Completion]) -> Evaluation:
    """Sort completions that arrive in any order; every prompt must have all of its completions."""
    greedy: dict[int, Completion] = {}
    sampled: dict[int, dict[int, Completion]] = {}
    for completion in completions:
        if completion.sample is None:
            greedy[completion.prompt] = completion
        else:
            sampled.setdefault(completion.prompt, {})[completion.sample] = completion
    assert sampled.keys() == greedy.keys() and len({len(row) for row in sampled.values()}) == 1
    prompts = sorted(greedy)
    return Evaluation(
        [[sampled[prompt][i] for i in sorted(sampled[prompt])] for prompt in prompts], [greedy[i] for i in prompts]
    )
