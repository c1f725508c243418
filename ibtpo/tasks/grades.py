"""Grading by named rewards, for any task."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from ibtpo.config import JsonlConfig
from ibtpo.grading import Grader
from ibtpo.rewards import BUILT_IN, Graded, RewardSpec, exact_match, last_line
from ibtpo.tasks.base import Problem

_IN_PLACE = (RewardSpec("exact"),)  # compares two lines, so it needs no process: it neither hangs nor fails


class RewardGrades:
    """Grades completions by rewards, in worker processes that run until `close`.

    Args:
        rewards: names and weights; the reward of a completion is their weighted mean.
        config: number of processes, time limit, largest share of failures.

    Raises:
        GraderError: a user's reward cannot be loaded.
    """

    def __init__(self, rewards: tuple[RewardSpec, ...], config: JsonlConfig) -> None:
        self.rewards = rewards
        self.grader = None
        if rewards != _IN_PLACE:
            self.grader = Grader(rewards, config.grade_workers, config.grade_timeout, config.max_failed_share)
            if any(spec.name not in BUILT_IN for spec in rewards):
                self._check()

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float | Future[float]:
        """The weighted mean of the rewards; 0 for a truncated completion."""
        if truncated:
            return 0.0
        graded = _graded(problem, completion)
        return exact_match(graded) if self.grader is None else self.grader.submit(graded)

    def extract(self, problem: Problem, completion: str) -> str | Future[str | None] | None:
        """The completion's answer as the first reward extracts it."""
        if self.grader is None:
            return last_line(completion) or None
        return self.grader.extract(_graded(problem, completion))

    def counts(self) -> dict[str, float]:
        """Number of gradings that failed and timed out so far, by metric name."""
        if self.grader is None:
            return {}
        return {"reward_timeouts": self.grader.timeouts, "reward_failures": self.grader.failures}

    def close(self) -> None:
        """End the grading processes."""
        if self.grader is not None:
            self.grader.close()

    def _check(self) -> None:
        assert self.grader is not None
        try:
            self.grader.ready()
        except BaseException:
            self.close()
            raise


def _graded(problem: Problem, completion: str) -> Graded:
    data: dict[str, Any] = problem.data
    return Graded(problem.prompt, completion, problem.answer, data)
