"""``ibtpo eval``: measure a model on held-out prompts, or on a whole file; resumable, with every completion on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ibtpo.config import TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.console import say
from ibtpo.disk import check_writable
from ibtpo.evaluation.evaluate import Evaluation, summarize
from ibtpo.evaluation.folder import EvaluationFolder
from ibtpo.evaluation.sampling import Completion, Place, sample_completions
from ibtpo.evaluation.statistics import MOST_SAMPLES, ks_up_to
from ibtpo.grow import Grower
from ibtpo.model_card import CARD
from ibtpo.policy import Policy, base_folder
from ibtpo.progress import track
from ibtpo.report import Estimate
from ibtpo.run_format import CONFIG, FORMAT_FILE
from ibtpo.setup import check_prompts, make_engine, make_sampling
from ibtpo.stopping import Interrupted, StopRequest
from ibtpo.tasks import Problem, Task, format_prompt
from ibtpo.validation import check_range
from ibtpo_engine.adapter_folder import is_adapter_folder

_NOT_THE_MODEL = ("optimizer.safetensors", "state.json", "checksums.json", FORMAT_FILE, CARD)  # what else is there
_NO_FILTER = {"max_prompt_tokens": None, "pass_rate_field": None, "min_pass_rate": 0.0, "max_pass_rate": 1.0}


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure accuracy from independent rollouts: avg@k, pass@k, maj@k and greedy, with 95 % intervals over prompts.

    On the held-out prompts of the task (of a run's own, where --model is one), or with --whole on all rows of a file.
    With --out every completion is kept, and the same command goes on where it was stopped.
    """

    config: Path | None = None
    """YAML file with any of the fields below."""
    samples: int | None = None
    """Independent samples a prompt; short for --eval.samples."""
    limit: int | None = None
    """Most prompts; short for --eval.prompts. With --whole there is no limit unless it is given."""
    whole: bool = False
    """Evaluate on every prompt of the data file, none held out, trained on, or left out by a run's filters."""
    json: Path | None = None
    """Also write the numbers to this file."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def resolve(self) -> TrainConfig:
        """The configuration with the short flags in their places.

        Raises:
            ValueError: a number is out of range, --whole without a data file, or no place to write.
        """
        config, changes = self.run, dict[str, int]()
        if self.samples is not None:
            check_range("samples", self.samples, low=1, high=MOST_SAMPLES)
            changes["samples"] = self.samples
        if self.limit is not None:
            check_range("limit", self.limit, low=1)
            changes["prompts"] = self.limit
        if self.whole:
            if config.data is None:
                raise ValueError("whole: only a data file has an end; name one with --data, or leave --whole out")
            changes.setdefault("prompts", sys.maxsize)
            config = replace(config, jsonl=replace(config.jsonl, eval_fraction=1.0, eval_count=None, eval_data=None))
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"json: {self.json.parent} is no folder; make it, or name another file")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"json: {self.json} is a folder; name a file")
        if self.json is not None:
            check_writable(self.json)
        return replace(config, eval=replace(config.eval, **changes))


def instead_of_training(run: Path, data: Path | None, *, whole: bool) -> dict[str, Any]:
    """What holds, nested like YAML, in place of the settings that a run chose its own training rows with.

    Another file than the run's is read in the layout that its own rows tell, its prompts are held out of itself, not
    taken from the run's `jsonl.eval_data`, and as a `whole` no row is filtered out.

    Args:
        data: the file that is to be measured on; None: the run's own.
    """
    own = load_yaml(run / CONFIG).get("data")
    other = data is not None and (own is None or data.resolve() != Path(own).resolve())
    rows = ({"eval_data": None} if other else {}) | (_NO_FILTER if whole else {})
    return ({"layout": "auto"} if other else {}) | ({"jsonl": rows} if rows else {})


def run_evaluation(
    config: TrainConfig, folder: Path, policy: Policy, task: Task, console: Console
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate, and keep every completion in ``config.out``, if that is set.

    Args:
        config: as `EvalArguments.resolve` gives it.
        folder: where the policy is from.

    Returns:
        the evaluation, and its summary as JSON holds it.

    Raises:
        ValueError: a prompt or the folder cannot be used.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; what was graded is kept.
        GraderError: too many gradings failed.
    """
    stop = StopRequest()
    with stop.on_signals(console), ExitStack() as stack:
        for note in check_prompts(task, policy, config):
            say(console, note, style="dim")
        problems = task.eval_problems(config.eval.prompts)
        store = None
        if config.out is not None:
            settings = _settings(config, folder, policy, problems)
            store = stack.enter_context(EvaluationFolder(config.out, settings))
        found = {} if store is None else dict(store.found)
        if found:
            say(console, f"{config.out}: {len(found):,} completions are there already", style="dim")
        try:
            speed = _sample(config, policy, task, problems, found, store, console, stop)
        except (Interrupted, KeyboardInterrupt) as error:
            kept = "nothing is kept without --out"
            if store is not None:
                kept = f"{len(found):,} completions are kept in {config.out}, the same command goes on"
            number = stop.signal if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(f"stopped; {kept}", number) from None
        evaluation = summarize(found.values())
        summary = {"model": config.model, "task": task.name, "data": config.data and str(config.data)}
        summary |= evaluation.summary() | {"speed": speed}
        if store is not None:
            store.finish(summary)
    return evaluation, summary


def _sample(
    config: TrainConfig,
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    found: dict[Place, Completion],
    store: EvaluationFolder | None,
    console: Console,
    stop: StopRequest,
) -> dict[str, float | None]:
    """Add what is missing to `found` and to the folder; returns how fast that was."""
    grower = Grower(make_engine(config, policy), task, policy.tokenizer, config.jsonl, stop.requested)
    samples, before = config.eval.samples, set(found)
    with track(console, "Evaluating", (samples + 1) * len(problems)) as tracker:
        tracker.advance(len(before))

        def keep(completion: Completion) -> None:
            if store is not None:
                store.add(completion, problems[completion.prompt].data.get("where"))
            found[completion.prompt, completion.sample] = completion
            tracker.advance(1)

        begin = time.perf_counter()
        sample_completions(grower, problems, make_sampling(config, policy), samples, keep, done=before)
        seconds = time.perf_counter() - begin
    tokens = sum(completion.tokens for place, completion in found.items() if place not in before)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if tokens else None}


def _settings(config: TrainConfig, folder: Path, policy: Policy, problems: Sequence[Problem]) -> dict[str, Any]:
    """Whatever decides the numbers."""
    tokens = [format_prompt(policy.tokenizer, problem, config.jsonl) for problem in problems]
    asked = json.dumps([[ids, problem.answer] for ids, problem in zip(tokens, problems, strict=True)])
    return {
        "model": str(folder),
        "weights": _digest_of_model(folder),
        "prompts": len(problems),
        "prompts and answers": hashlib.sha256(asked.encode()).hexdigest()[:16],
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


def _digest_of_model(folder: Path) -> str:
    """SHA-256, shortened, over the files that decide what a model writes; of an adapter, those of its base too."""
    digest = hashlib.sha256()
    for part in [folder, *([Path(base_folder(folder))] if is_adapter_folder(folder) else [])]:
        for path in sorted(path for path in part.iterdir() if path.is_file() and path.name not in _NOT_THE_MODEL):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def print_evaluation(evaluation: Evaluation, summary: dict[str, Any], console: Console) -> None:
    """The tables: accuracies, and pass@k and maj@k by k."""
    found, samples = evaluation.accuracies(), evaluation.samples
    accuracy = Table("", "mean", "95 % interval", title=f"{len(evaluation.greedy)} prompts, {samples} samples each")
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
    console.print(", ".join(parts), style="dim", highlight=False)


def _interval(found: Estimate) -> str:
    return f"{found.low:.3f} \u2013 {found.high:.3f}"
