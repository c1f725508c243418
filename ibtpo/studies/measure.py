"""The work of a cell's process, by kind, and its results.

start      warm-start the built-in policy of a seed; its folder then holds policy/
train      a training run from a policy; run/ is an ordinary run folder
samplers   grow trees at a fixed policy; numbers a prompt
bias       grow trees from a policy whose values are known exactly; errors a tree
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console

from ibtpo.config import TrainConfig
from ibtpo.grow import Grower
from ibtpo.metrics import num_sampled
from ibtpo.policy import Policy, built_in_policy, load_policy
from ibtpo.runlog import METRICS, read_rows
from ibtpo.search import make_search
from ibtpo.setup import make_engine, make_sampling
from ibtpo.steps import step_splitter
from ibtpo.studies.folders import POLICY, RUN
from ibtpo.studies.table_policy import TablePolicy
from ibtpo.tasks import Task, TeachableTask, make_task
from ibtpo.train import train
from ibtpo.warmstart import WarmStart, warm_start_of
from ibtpo_engine import Node, Tree

BATCH = 64  # prompts sampled together
_CURVES = (
    "tokens_sampled", "step_seconds", "avg_rate_iid", "eff_rate", "ib_score", "cov_eta1_eta2", "sampler_entropy",
    "eval_avg", "eval_pass", "eval_greedy",
)  # fmt: skip

Result = dict[str, Any]


def measure(spec: Mapping[str, Any], config: TrainConfig, folder: Path, policy: Path | None) -> Result:
    """Do the work of a cell in its folder.

    Args:
        spec: a `Cell.spec()`.
        config: its configuration.
        policy: checkpoint folder to start from; None for ``config.model``.

    Raises:
        ValueError: the settings, or the policy's folder, cannot be used.
    """
    if policy is not None:
        config = replace(config, model=str(policy))
    work: dict[str, Callable[[], Result]] = {
        "start": lambda: _start(config, folder),
        "train": lambda: _train(config, folder),
        "samplers": lambda: _samplers(config, spec["options"]),
        "bias": lambda: _bias(config, spec["options"]),
    }
    return work[spec["kind"]]()


def _start(config: TrainConfig, folder: Path) -> Result:
    begin = time.perf_counter()
    policy = built_in_policy(config.seed, dtype=getattr(torch, config.dtype), device=torch.device("cpu"))
    task = make_task(config)
    if not isinstance(task, TeachableTask):
        raise ValueError(f"model: the built-in policy cannot learn task {task.name}; give a checkpoint with model: DIR")
    grower = Grower(make_engine(config, policy), task, policy.tokenizer, config.jsonl)

    def on_update(state: WarmStart) -> None:
        if state.updates % 50 == 0:
            print(f"update {state.updates}, loss {state.loss:.3f}", flush=True)

    end = warm_start_of(config, policy, task, grower, make_sampling(config, policy), on_update=on_update)
    policy.save(folder / POLICY)
    return {"updates": end.updates, "excess": end.excess, "seconds": time.perf_counter() - begin}


def _train(config: TrainConfig, folder: Path) -> Result:
    run = folder / RUN
    train(replace(config, out=run), Console(width=120, force_terminal=False))
    rows = [{"step": row["step"], **{n: row[n] for n in _CURVES if n in row}} for row in read_rows(run / METRICS)]
    return {"rows": rows, "budget": config.sampled_tokens}


def _samplers(config: TrainConfig, options: Mapping[str, Any]) -> Result:
    policy = load_policy(config.model, dtype=getattr(torch, config.dtype), device=torch.device("cpu"))
    task = make_task(config)
    with closing(task):
        return {"prompts": _sampled(config, policy, task, options["prompts"])}


def _sampled(config: TrainConfig, policy: Policy, task: Task, prompts: int) -> list[Result]:
    grower = Grower(make_engine(config, policy), task, policy.tokenizer, config.jsonl)
    splitter = step_splitter(policy.tokenizer, config.search)
    search = make_search(config.search, config.ib, splitter, config.sampling.max_tokens)
    problems, rows = task.eval_problems(prompts), []
    for first in range(0, len(problems), BATCH):
        batch = problems[first : first + BATCH]
        keys = list(range(first, first + len(batch)))
        trees, _ = grower.grow(batch, keys, search, make_sampling(config, policy))
        rows += [tree_numbers(tree, lambda ids: str(policy.tokenizer.decode(ids))) for tree in trees]
        print(f"{len(rows)} of {len(problems)} prompts", flush=True)
    return rows


def tree_numbers(tree: Tree, decode: Callable[[list[int]], str]) -> Result:
    """A prompt's row of the sampler table, with the columns of `ibtpo.studies.results.SAMPLERS`."""
    leaves = tree.leaves()
    rewards = [leaf.reward or 0.0 for leaf in leaves]
    first = [leaf.reward or 0.0 for leaf in tree.notes.get("iid_leaves", ())]
    answers = [decode(leaf.prefix()[tree.prompt_len :].tolist()).strip() for leaf in leaves]
    return {
        "trajectories": len(leaves),
        "eff_rate": float(len(set(rewards)) > 1),
        "avg_rate": sum(rewards) / len(rewards),
        "avg_rate_iid": sum(first) / len(first) if first else math.nan,
        "recursive": recursive_value(tree),
        "tokens": num_sampled(tree),
        "answers": len({text.rsplit("\n", 1)[-1] for text in answers}),
        "solutions": len(set(answers)),
    }


def recursive_value(tree: Tree) -> float:
    """Value of the prompt, where a node's value is the mean of its children's, and a leaf's its reward."""
    values: dict[Node, float] = {}
    for node in reversed(tree.nodes()):  # depth first, so children come before parents
        below = [values[child] for child in node.children]
        values[node] = sum(below) / len(below) if below else node.reward or 0.0
    return values[tree.root]


def _bias(config: TrainConfig, options: Mapping[str, Any]) -> Result:
    policy = TablePolicy(options["facts"], options["depth"])
    search = make_search(config.search, config.ib, lambda tokens: range(1, len(tokens)), policy.depth)
    rng, rows = Random(config.seed), []
    for key in range(options["prompts"]):
        tree = policy.run(search, Tree([7], key=config.seed * options["prompts"] + key), rng)
        row = tree_numbers(tree, str)
        rows.append({name: row[name] - policy.value for name in ("avg_rate", "avg_rate_iid", "recursive")})
    return {"prompts": rows, "exact": policy.value}
