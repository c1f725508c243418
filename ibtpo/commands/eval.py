"""``ibtpo eval``: accuracy of a model on held-out prompts, or on a whole file."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ibtpo.commands.arguments import UNUSED_BY_EVAL, Flat, base_of_model, check_used, parse, with_data, without
from ibtpo.config import TrainConfig
from ibtpo.console import RunConsole
from ibtpo.disk import check_writable, writing
from ibtpo.loading import loading
from ibtpo.run_format import is_run
from ibtpo.sections.eval import MOST_SAMPLES
from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure accuracy from independent rollouts: avg@k, pass@k, maj@k and greedy, with 95 % intervals over prompts.

    The prompts are the held-out ones of the task (of the run, if --model is a run) or, with --whole, all rows of a
    file. With --out every completion is kept, and the same command continues an evaluation that was stopped.
    """

    config: Path | None = None
    """YAML file with any of the fields below."""
    samples: int | None = None
    """Independent samples per prompt; short for --eval.samples."""
    limit: int | None = None
    """Largest number of prompts; short for --eval.prompts. With --whole the default is no limit."""
    whole: bool = False
    """Evaluate on every prompt of the data file, without holding out rows and without a run's filters."""
    json: Path | None = None
    """Also write the numbers to this file."""
    quiet: bool = False
    """Show no progress, only the result."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=lambda: without(TrainConfig(), UNUSED_BY_EVAL))

    def resolve(self) -> TrainConfig:
        """The configuration with the short flags applied.

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
                raise ValueError("whole: --whole needs a data file; name one with --data, or leave --whole out")
            changes.setdefault("prompts", sys.maxsize)
            config = replace(config, jsonl=replace(config.jsonl, eval_fraction=1.0, eval_count=None, eval_data=None))
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"json: {self.json.parent} is not a folder; make it, or name another file")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"json: {self.json} is a folder; name a file")
        if self.json is not None:
            check_writable(self.json)
        return replace(config, eval=replace(config.eval, **changes))


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    check_used("ibtpo eval", UNUSED_BY_EVAL, arguments)
    base = base_of_model(arguments)
    if base.out is not None and is_run(base.out):  # from a run's config.yaml given as --config
        base = replace(base, out=None)
    parsed = parse(EvalArguments, EvalArguments(run=without(base, UNUSED_BY_EVAL)), "ibtpo eval", arguments)
    config = with_data(parsed.resolve())
    with loading():
        from ibtpo.evaluation.run import print_evaluation, run_evaluation
        from ibtpo.setup import open_model

    how = RunConsole(quiet=parsed.quiet)
    folder, policy, task = open_model(config, how)
    with closing(task):
        evaluation, summary = run_evaluation(config, folder, policy, task, how)
    print_evaluation(evaluation, summary, console)
    if parsed.json is not None:
        with writing(parsed.json):
            parsed.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0
