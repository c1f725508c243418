"""Supervised warm start: the built-in policy learns the task's worked solutions from random weights.

The number of updates this takes varies between seeds, so measurements decide when to end. The learning rate stays
constant until the policy's loss is close to the teacher's entropy, the minimum for any policy, and its sampled pass
rate reaches a given share of the teacher's; then it decays.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibtpo.config import OptimConfig, TrainConfig, WarmStartConfig
from ibtpo.grow import Grower
from ibtpo.optim import MasterAdamW
from ibtpo.policy import Policy
from ibtpo.tasks import Problem, TeachableTask
from ibtpo_engine import Sampling
from ibtpo_engine.generate import independent
from ibtpo_kernels import linear_logprob

ADAMW: dict[str, Any] = {"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.05, "grad_clip": 1.0}
FINAL_RATE = 0.1  # the cosine ends at this share of the rate before it
WINDOW = 10  # updates whose excess losses are averaged
CHECK_EVERY = 25  # updates between two measurements of the pass rate
CHECK_PROMPTS, CHECK_SAMPLES = 128, 4  # sampled for a measurement


@dataclass(frozen=True)
class WarmStart:
    """State of a warm start, during it or at its end."""

    updates: int
    """Updates made."""
    loss: float
    """Of the last update's batch, in nats a token."""
    excess: float
    """Loss above the teacher's on the same solutions, mean over the last `WINDOW` updates, in nats a token: an estimate
    of the divergence KL(teacher | policy)."""
    total: int
    """Total updates as far as known: the limit, until the learning rate begins to decay."""


def warm_start(
    policy: Policy,
    task: TeachableTask,
    config: WarmStartConfig,
    *,
    seed: int,
    on_update: Callable[[WarmStart], None],
    pass_share: Callable[[], float] = lambda: math.inf,
    agreed: Callable[[float], float] = lambda excess: excess,
) -> WarmStart:
    """Train on new worked solutions, with the loss on the answers only.

    Args:
        policy: trained in place.
        task: draws the worked solutions; update u of batch size b uses its training problems [u*b, (u+1)*b).
        config: end conditions, batch size, learning rate.
        seed: of the teacher's draws.
        on_update: called after each update.
        pass_share: measures the policy's pass rate as a share of the teacher's (`PassShare`); called every
            `CHECK_EVERY` updates once the loss is low enough. By default the loss alone decides.
        agreed: maps this process's excess loss to one value for all processes that make the same updates, so that they
            end together although their sums may differ by rounding.

    Returns:
        the state at the end.
    """
    optimizer = MasterAdamW(policy.model, OptimConfig(lr=config.lr, warmup_steps=config.warmup_steps, **ADAMW))
    rng = np.random.default_rng([seed, 1])
    schedule = _Schedule(config, pass_share)
    recent: deque[float] = deque(maxlen=WINDOW)
    while True:
        first = schedule.updates * config.batch_size
        problems = [task.train_problem(index) for index in range(first, first + config.batch_size)]
        solutions = [task.worked_solution(p, rng) for p in problems]
        texts = [(str(p.prompt), s.text) for p, s in zip(problems, solutions, strict=True)]
        loss, num_tokens = supervised_loss(policy, texts)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.scale = schedule.rate()
        optimizer.step()
        value = float(loss.detach())
        recent.append(value + sum(s.logprob for s in solutions) / num_tokens)
        excess = agreed(sum(recent) / len(recent))
        schedule.advance(excess)
        state = WarmStart(schedule.updates, value, excess, schedule.total)
        on_update(state)
        if state.updates == state.total:
            return state


class _Schedule:
    """The learning rate of each update: constant, then a cosine decay once the policy is good or the limit is near."""

    def __init__(self, config: WarmStartConfig, pass_share: Callable[[], float] = lambda: math.inf) -> None:
        self._config = config
        self._pass_share = pass_share
        self._next_check = 0  # the first update at which the pass rate may be measured again
        self._fall = max(config.max_updates - config.decay_updates, 0)  # the first update of the decay
        self.updates = 0
        self.total = config.max_updates

    def rate(self) -> float:
        """The next update's share of the peak rate; the last update's is `FINAL_RATE`."""
        progress = max(self.updates + 1 - self._fall, 0) / self._config.decay_updates
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def advance(self, excess: float) -> None:
        """Count an update, after which the recent mean excess loss is `excess`."""
        self.updates += 1
        if WINDOW <= self.updates < self._fall and excess <= self._config.excess and self._passes():
            self._fall = self.updates
            self.total = self.updates + self._config.decay_updates

    def _passes(self) -> bool:
        if self.updates < self._next_check:
            return False
        self._next_check = self.updates + CHECK_EVERY
        return self._pass_share() >= self._config.pass_share


def warm_start_of(
    config: TrainConfig,
    policy: Policy,
    task: TeachableTask,
    grower: Grower,
    sampling: Sampling,
    *,
    on_update: Callable[[WarmStart], None],
    agreed: Callable[[float], float] = lambda excess: excess,
) -> WarmStart:
    """The warm start of a run: `warm_start`, ended by loss and `PassShare`."""
    first = config.warm_start.max_updates * config.warm_start.batch_size
    unseen = [task.train_problem(first + index) for index in range(CHECK_PROMPTS)]
    end = warm_start(
        policy,
        task,
        config.warm_start,
        seed=config.seed,
        on_update=on_update,
        pass_share=PassShare(grower, task, sampling, unseen, config.seed),
        agreed=agreed,
    )
    grower.engine.weights_changed()
    return end


class PassShare:
    """The sampled pass rate of a policy as a share of its teacher's, on prompts that the warm start does not train on.

    The prompts and the random numbers are the same in every measurement.

    Args:
        grower: samples from the policy, and grades.
        task: its teacher is compared with the policy.
        sampling: sampling parameters of the run.
        problems: `CHECK_PROMPTS` of them.
        seed: of the teacher's draws.
    """

    def __init__(
        self, grower: Grower, task: TeachableTask, sampling: Sampling, problems: Sequence[Problem], seed: int
    ) -> None:
        self._grower, self._sampling, self._problems = grower, sampling, problems
        rng = np.random.default_rng([seed, 2])
        draws = [(p, task.worked_solution(p, rng).text) for p in problems for _ in range(CHECK_SAMPLES)]
        grades = [grower.task.grade(p, text, False) for p, text in draws]
        right = sum(grade if isinstance(grade, float) else grade.result() for grade in grades)
        self._teacher = max(right / len(draws), 1 / len(draws))

    def __call__(self) -> float:
        """Measure with the current weights."""
        self._grower.engine.weights_changed()
        keys = [-1 - index for index in range(len(self._problems))]
        trees, _ = self._grower.grow(self._problems, keys, independent(CHECK_SAMPLES), self._sampling)
        rewards = [leaf.reward or 0.0 for tree in trees for leaf in tree.leaves()]
        return sum(rewards) / len(rewards) / self._teacher


def supervised_loss(policy: Policy, batch: Sequence[tuple[str, str]]) -> tuple[Tensor, int]:
    """Mean negative log-prob of the completions' tokens, and their number.

    Args:
        batch: (prompt, completion) pairs, packed as chains of one forest.
    """
    tokens: list[int] = []
    pos: list[int] = []
    end: list[int] = []
    rows: list[int] = []
    for prompt, completion in batch:
        begin = len(tokens)
        prompt_ids = policy.tokenizer.encode(prompt, add_special_tokens=False)
        ids = [*prompt_ids, *policy.tokenizer.encode(completion, add_special_tokens=False)]
        tokens += ids
        pos += range(len(ids))
        end += [len(tokens)] * len(ids)
        rows += range(begin + len(prompt_ids) - 1, len(tokens) - 1)
    device = policy.model.device
    tokens_N = torch.tensor(tokens, device=device)
    rows_T = torch.tensor(rows, device=device)
    hidden = policy.model.packed(
        tokens_N, torch.tensor(pos, device=device), torch.tensor(end, dtype=torch.int32, device=device)
    )
    edges = torch.arange(len(rows), device=device)
    logprob, _ = linear_logprob(hidden[rows_T], policy.model.head, edges, tokens_N[rows_T + 1])
    return -logprob.mean(), len(rows)
