"""``ibtpo train``: train a policy, and say what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ibtpo.checkpoints import latest_checkpoint
from ibtpo.commands.arguments import Flat, Preset, base_of_training, parse, with_data
from ibtpo.config import TrainConfig
from ibtpo.console import RunConsole, say
from ibtpo.loading import loading
from ibtpo.report import NOT_ACCURACY, summarize_run
from ibtpo.runlog import REPORT


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a policy with IB-TPO or another method; write a run folder with metrics, checkpoints and a report.

    Without --model and --data the built-in policy is warm-started and trained on the built-in task. --model takes a
    Hugging Face checkpoint folder, --data a file of prompts and answers. Learning rate, sampling and other defaults
    differ between the two: `ibtpo train --data FILE --help` lists those with a data file.
    """

    preset: Preset = "ib-tpo"
    config: Path | None = None
    """YAML file with any of the fields below."""
    quiet: bool = False
    """Show no progress, only the result."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    parsed = parse(TrainArguments, TrainArguments(run=base_of_training(arguments)), "ibtpo train", arguments)
    config = with_data(parsed.run)
    with loading():
        from ibtpo.distributed import join, restarted
        from ibtpo.train import train

    with join(config) as group:
        how = RunConsole(quiet=parsed.quiet or not group.leads)
        out = train(restarted(config, group), how, group=group)
    if not group.leads:
        return 0
    for table in _result_tables(out):
        console.print(table)
    if config.search.method == "ibtree":
        console.print(NOT_ACCURACY, style="dim")
    last = latest_checkpoint(out)
    if last is not None:
        say(console, f"checkpoint: {last.path}")
    say(console, f"report: {out / REPORT}")
    return 0


def _result_tables(folder: Path) -> list[Table]:
    """Tables of a run's results: held-out accuracy before and after, and cost."""
    summary = summarize_run(folder)
    accuracy = Table(
        "held-out accuracy", "before", "after", title=f"{escape(str(folder))}: {summary.steps} training steps"
    )
    for row in summary.accuracies:
        accuracy.add_row(row.name, str(row.before or "–"), str(row.after or "–"))
    amounts = Table("", "", "")
    amounts.show_header = False
    for name, value, note in summary.amounts:
        amounts.add_row(name, value, f"[dim]{note}[/]")
    return [accuracy, amounts]
