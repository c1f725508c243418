"""Evaluating a model on held-out prompts or on a whole file; resumable, with every completion on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ibtpo.config import TrainConfig
from ibtpo.console import say
from ibtpo.evaluation.evaluate import Evaluation
from ibtpo.evaluation.folder import EvaluationFolder
from ibtpo.evaluation.sampling import Completion, sample_completions
from ibtpo.evaluation.statistics import ks_up_to
from ibtpo.grow import Grower
from ibtpo.model_card import CARD
from ibtpo.policy import Policy, base_folder
from ibtpo.printable import counted
from ibtpo.progress import track
from ibtpo.report import Estimate
from ibtpo.run_format import FORMAT_FILE
from ibtpo.setup import check_prompts, make_engine, make_sampling
from ibtpo.stopping import Interrupted, StopRequest
from ibtpo.tasks import Problem, Task, format_prompt
from ibtpo_engine.adapter_folder import is_adapter_folder

_NOT_THE_MODEL = ("optimizer.safetensors", "state.json", "checksums.json", FORMAT_FILE, CARD)  # other files there


def run_evaluation(
    config: TrainConfig, folder: Path, policy: Policy, task: Task, console: Console
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a policy, and keep every completion in ``config.out``, if that is set.

    Args:
        config: as `ibtpo eval` resolves it.
        folder: the policy's checkpoint.

    Returns:
        the evaluation, and its summary in JSON types.

    Raises:
        ValueError: a prompt or the folder cannot be used.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; graded completions are kept.
        GraderError: too many gradings failed.
    """
    stop = StopRequest()
    with stop.on_signals(console), ExitStack() as stack:
        for note in check_prompts(task, policy, config):
            say(console, note, style="dim")
        problems = task.eval_problems(config.eval.prompts)
        asked = _digest_of_prompts(config, policy, problems)  # in any case: an unusable prompt is told before sampling
        evaluation, store = Evaluation(len(problems), config.eval.samples), None
        if config.out is not None:
            settings = _settings(config, folder, len(problems), asked)
            store = stack.enter_context(EvaluationFolder(config.out, settings, evaluation))
        if len(evaluation):
            say(console, f"{config.out}: {len(evaluation):,} completions are there already", style="dim")
        try:
            speed = _sample(config, policy, task, problems, evaluation, store, console, stop)
        except (Interrupted, KeyboardInterrupt) as error:
            kept = "nothing is kept without --out"
            if store is not None:
                kept = f"{len(evaluation):,} completions are kept in {config.out}, the same command continues"
            number = stop.signal if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(f"stopped; {kept}", number) from None
        summary = {"model": config.model, "task": task.name, "data": config.data and str(config.data)}
        summary |= evaluation.summary() | {"speed": speed} | task.counts()
        if store is not None:
            store.finish(summary)
    return evaluation, summary


def _sample(
    config: TrainConfig,
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    evaluation: Evaluation,
    store: EvaluationFolder | None,
    console: Console,
    stop: StopRequest,
) -> dict[str, float | None]:
    """Add the missing completions to the evaluation and to the folder; returns the throughput."""
    grower = Grower(make_engine(config, policy), task, policy.tokenizer, config.jsonl, stop.requested)
    samples, tokens = config.eval.samples, 0
    with track(console, "Evaluating", (samples + 1) * len(problems)) as tracker:
        tracker.advance(len(evaluation))

        def keep(completion: Completion) -> None:
            nonlocal tokens
            if store is not None:
                store.add(completion, problems[completion.prompt].data.get("where"))
            evaluation.add(completion)
            tokens += completion.tokens
            tracker.advance(1)

        begin = time.perf_counter()
        sample_completions(grower, problems, make_sampling(config, policy), samples, keep, is_done=evaluation.has)
        seconds = time.perf_counter() - begin
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if tokens else None}


def _settings(config: TrainConfig, folder: Path, prompts: int, asked: str) -> dict[str, Any]:
    """Everything that decides the results; `asked` is the digest of the prompts."""
    return {
        "model": str(folder),
        "weights": _digest_of_model(folder),
        "prompts": prompts,
        "prompts and answers": asked,
        "samples": config.eval.samples,
        "reward": list(config.reward),
        "jsonl.grade": config.jsonl.grade,
        "jsonl.grade_timeout": config.jsonl.grade_timeout,
        "digits.grade": config.digits.grade,
        "seed": config.seed,
        "dtype": config.dtype,
        "parity": config.parity,
        **{f"sampling.{name}": value for name, value in asdict(config.sampling).items()},
    }


def _digest_of_prompts(config: TrainConfig, policy: Policy, problems: Sequence[Problem]) -> str:
    """Shortened SHA-256 of a JSON list of [token ids, answer], taken piece by piece."""
    digest = hashlib.sha256()
    for i, problem in enumerate(problems):
        ids = format_prompt(policy.tokenizer, problem, config.jsonl)
        digest.update((("[", ", ")[i > 0] + json.dumps([ids, problem.answer])).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _digest_of_model(folder: Path) -> str:
    """Shortened SHA-256 of the files that decide a model's output; for an adapter, also of its base's."""
    digest = hashlib.sha256()
    for part in [folder, *([Path(base_folder(folder))] if is_adapter_folder(folder) else [])]:
        for path in sorted(path for path in part.iterdir() if path.is_file() and path.name not in _NOT_THE_MODEL):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def print_evaluation(evaluation: Evaluation, summary: dict[str, Any], console: Console) -> None:
    """Print the tables: accuracies, and pass@k and maj@k by k."""
    found, samples = evaluation.accuracies, evaluation.samples
    amount = f"{counted(evaluation.prompts, 'prompt')}, {counted(samples, 'sample')} each"
    accuracy = Table("", "mean", "95 % interval", title=amount)
    for name in (f"avg@{samples}", "greedy"):
        accuracy.add_row(name, f"{found[name].value:.3f}", _interval(found[name]))
    by_k = Table("k", "pass@k", "95 % interval", "maj@k", "95 % interval")
    for k in ks_up_to(samples):
        passed, majority = found[f"pass@{k}"], found[f"maj@{k}"]
        by_k.add_row(str(k), f"{passed.value:.3f}", _interval(passed), f"{majority.value:.3f}", _interval(majority))
    console.print(accuracy)
    console.print(by_k)
    parts = [
        f"{summary['eval_truncated_share']:.1%} of the samples truncated",
        f"{summary['eval_response_length']:.1f} tokens each",
    ]
    if speed := summary["speed"]["tokens_per_second"]:
        parts.append(f"{speed:,.0f} tokens/s")
    for name, happened in (("reward_timeouts", "timed out"), ("reward_failures", "failed")):
        if number := summary.get(name):
            parts.append(f"gradings that {happened} and count as 0: {number:,}")
    console.print(", ".join(parts), style="dim", highlight=False)


def _interval(found: Estimate) -> str:
    return f"{found.low:.3f} \u2013 {found.high:.3f}"
