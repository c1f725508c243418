"""``ibtpo study``: run a study's cells, then make its table, figures and page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ibtpo.config_io import load_yaml
from ibtpo.console import say
from ibtpo.disk import write_atomically
from ibtpo.printable import one_line
from ibtpo.studies.cell import ERROR
from ibtpo.studies.figures import AVAILABLE, MISSING, draw_figures
from ibtpo.studies.matrix import Cell, Study, load_study, refuse_settings_of_study, with_policies
from ibtpo.studies.page import write_page
from ibtpo.studies.results import collect
from ibtpo.studies.run import CELLS, Failure, is_done, run_cells
from ibtpo.studies.tables import csv_text, markdown_text, rich_tables
from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Re-run one of the paper's tables: methods x seeds at an equal budget of sampled tokens.

    Each cell is a process of its own on one thread. A cell that is done is not run again, also not by another study in
    the same folder; whatever ends the command loses only the cells under way. Failed ones are tried again.
    """

    name: Annotated[str, tyro.conf.Positional]
    """main, ablation, samplers, bias, beta, lambda, segmentation-noise, open-points, beyond, plus, rounds;
    or FILE.yaml, your own."""
    seeds: int = 5
    """How many; each seed has its own task, starting policy and random numbers, shared by all variants."""
    first_seed: int = 0
    """The seeds are this and those after it: what was picked on some seeds is to be judged on others."""
    jobs: int | None = None
    """Processes at a time; by default one a core."""
    out: Path = Path("runs/studies")
    """Folder of the cells; the study's table and page go to OUT/NAME."""
    tokens: int | None = None
    """Sampled tokens of every training run; by default 600,000, or what the study says."""
    prompts: int = 1024
    """samplers and bias: prompts a variant and policy (bias: trees a variant and task), over all seeds."""
    eval_prompts: int | None = None
    """Held-out prompts of every evaluation; by default 192, or what the study says."""
    config: Path | None = None
    """YAML file with settings for all cells, as for `ibtpo train`; a model and data of your own, for one."""
    report_only: bool = False
    """Make table, figures and page from the cells that are done."""


def study(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns 0, or 1 if cells failed.

    Raises:
        ValueError: no such study, or settings that cannot be used.
    """
    parsed = tyro.cli(StudyArguments, prog="ibtpo study", args=list(arguments), use_underscores=False)
    for name in ("seeds", "prompts"):
        check_range(name, getattr(parsed, name), low=1)
    check_range("first-seed", parsed.first_seed, low=0)
    jobs = parsed.jobs if parsed.jobs is not None else os.cpu_count() or 1
    check_range("jobs", jobs, low=1)
    plan = load_study(parsed.name)
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.seeds)
    cells = plan.cells(seeds, prompts=parsed.prompts, changes=_changes(parsed))
    for variant, reason in plan.skipped.items():
        console.print(f"left out: {variant}, {reason}", highlight=False, markup=False)
    done = sum(is_done(parsed.out, cell) for cell in cells)
    console.print(f"{plan.title}: {len(cells)} cells, {done} done, {jobs} at a time", highlight=False, markup=False)
    interrupted = False
    if not parsed.report_only:
        try:
            run_cells(parsed.out, cells, jobs, console)
        except KeyboardInterrupt:
            interrupted = True
            console.print("\nstopped; what is done is kept, the same command goes on", highlight=False)
    failures = _failures(parsed.out, cells)
    _report(plan, cells, parsed.out, failures, _command(arguments), console)
    if interrupted:
        raise KeyboardInterrupt
    return 1 if failures else 0


def _changes(parsed: StudyArguments) -> dict[str, Any]:
    """What wins over the study's own settings: --config, then the flags."""
    changes: dict[str, Any] = {} if parsed.config is None else load_yaml(parsed.config)
    refuse_settings_of_study(changes, str(parsed.config))
    if parsed.tokens is not None:
        changes["sampled_tokens"] = parsed.tokens
    if parsed.eval_prompts is not None:
        of_file = changes.get("eval") or {}
        if not isinstance(of_file, dict):
            raise ValueError(f"{parsed.config}: eval must hold fields and values")
        changes["eval"] = of_file | {"prompts": parsed.eval_prompts}
    return changes


def _failures(out: Path, cells: Sequence[Cell]) -> list[Failure]:
    """What the folders say about cells that were begun and have no result."""
    unfinished = [cell for cell in with_policies(cells) if not is_done(out, cell)]
    paths = [out / CELLS / cell.id / ERROR for cell in unfinished]
    return [
        Failure(cell, path.read_text(encoding="utf-8"))
        for cell, path in zip(unfinished, paths, strict=True)
        if path.is_file()
    ]


def _report(
    plan: Study, cells: Sequence[Cell], out: Path, failures: Sequence[Failure], command: str, console: Console
) -> None:
    results = collect(plan, cells, out)
    folder = out / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.csv", csv_text(results))
    write_atomically(folder / "table.md", markdown_text(results))
    notes = [MISSING] if results.curves and not AVAILABLE else []
    try:
        figures = draw_figures(results, folder)
    except Exception as error:  # whatever matplotlib trips over, the tables are there
        figures = []
        notes.append(f"no figures: {one_line(error)}; the tables are complete")
    for note in notes:
        console.print(note, highlight=False, markup=False)
    page = write_page(results, folder, figures, failures, command, notes)
    for table in rich_tables(results, console.width):
        console.print(table)
    for failure in failures:
        console.print(f"failed: {failure.cell.id}: {failure.message}", highlight=False, markup=False, style="red")
    if results.missing:
        console.print(f"{len(results.missing)} cells have no result yet", highlight=False)
    say(console, f"report: {page}")


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["ibtpo", "study", *(argument for argument in arguments if argument != "--report-only")])
