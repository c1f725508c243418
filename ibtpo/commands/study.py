"""``ibtpo study``: the paper's tables, re-run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ibtpo.commands.arguments import parse_alone
from ibtpo.loading import loading


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Re-run one of the paper's tables: methods x seeds at an equal budget of sampled tokens.

    Each cell of the table runs in its own process, on one thread. A finished cell is not run again, also not by another
    study in the same folder. If the command is stopped, only unfinished cells are lost; the same command runs these and
    the failed ones again.
    """

    name: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            help="main, ablation, samplers, bias, beta, lambda, segmentation-noise, open-points, beyond, plus, rounds; "
            "or FILE.yaml, a study of your own."
        ),
    ]
    seeds: int = 5
    """Number of seeds; each has its own task, starting policy and random numbers, shared by all variants."""
    first_seed: int = 0
    """First of the seeds. Judge a choice on other seeds than those it was made on."""
    jobs: int | None = None
    """Processes at a time; by default one per core."""
    out: Path = Path("runs/studies")
    """Folder of the cells; the study's table and page go to OUT/NAME."""
    tokens: int | None = None
    """Sampled tokens of every training run; by default 600,000, or as the study says."""
    prompts: int = 1024
    """Over all seeds: prompts per variant and policy (samplers), or trees per variant and task (bias)."""
    eval_prompts: int | None = None
    """Held-out prompts of every evaluation; by default 192, or as the study says."""
    config: Path | None = None
    """YAML file with settings for all cells, as for `ibtpo train`, such as a model and data of your own."""
    report_only: bool = False
    """Run nothing; make table, figures and page from the finished cells."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns 0, or 1 if cells failed."""
    parsed = parse_alone(StudyArguments, "ibtpo study", arguments)
    with loading():
        from ibtpo.studies.command import run_study

    words = (argument for argument in arguments if argument != "--report-only")
    return run_study(parsed, shlex.join(["ibtpo", "study", *words]), console)
