"""Supervised warm start: the built-in policy learns the task's worked solutions from random weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ibtpo.config import OptimConfig, WarmStartConfig
from ibtpo.optim import MasterAdamW
from ibtpo.policy import Policy
from ibtpo.tasks import Problem, TeachableTask
from ibtpo_kernels import linear_logprob

ADAMW = {"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.05, "grad_clip": 1.0}
FINAL_RATE = 0.1  # the cosine ends at this share of the peak rate


def warm_start(
    policy: Policy,
    task: TeachableTask,
    config: WarmStartConfig,
    *,
    seed: int,
    problem: Callable[[int], Problem],
    on_update: Callable[[int, float], None],
) -> float:
    """Train on fresh worked solutions, the loss on the answer alone.

    Args:
        policy: trained in place.
        task: draws the worked solutions.
        config: updates, batch size, learning rate.
        seed: of the teacher's draws.
        problem: the problem of an index; update u of batch size b uses indices [u*b, (u+1)*b).
        on_update: called with (update, loss) after each update.

    Returns:
        Loss of the last update, in nats a token.
    """
    optimizer = MasterAdamW(policy.model, OptimConfig(lr=config.lr, warmup_steps=config.warmup_steps, **ADAMW))
    rng = np.random.default_rng([seed, 1])
    loss = math.nan
    for update in range(config.updates):
        indices = range(update * config.batch_size, (update + 1) * config.batch_size)
        problems = [problem(index) for index in indices]
        batch = [(str(p.prompt), task.worked_solution(p, rng)) for p in problems]
        value = supervised_loss(policy, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.scale = _cosine(update, config)
        optimizer.step()
        loss = float(value.detach())
        on_update(update, loss)
    return loss


def _cosine(update: int, config: WarmStartConfig) -> float:
    """Share of the peak rate: 1 at the start, `FINAL_RATE` at the end."""
    progress = update / max(config.updates - 1, 1)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def supervised_loss(policy: Policy, batch: list[tuple[str, str]]) -> Tensor:
    """Mean negative log-prob of the completions' tokens; (prompt, completion) pairs, packed as chains of one forest."""
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
    return -logprob.mean()
