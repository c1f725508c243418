"""Running a study's cells, then making its table, figures and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ibtpo.config_io import load_yaml
from ibtpo.console import say
from ibtpo.disk import check_writable, write_atomically
from ibtpo.printable import counted, one_line
from ibtpo.stopping import Interrupted
from ibtpo.studies.figures import AVAILABLE, MISSING, draw_figures
from ibtpo.studies.matrix import Cell, Study, load_study, refuse_settings_of_study
from ibtpo.studies.page import write_page
from ibtpo.studies.results import collect
from ibtpo.studies.run import Failure, failures, is_done, run_cells
from ibtpo.studies.tables import csv_text, markdown_text, rich_tables
from ibtpo.validation import check_range

if TYPE_CHECKING:
    from ibtpo.commands.study import StudyArguments


def run_study(parsed: StudyArguments, command: str, console: Console) -> int:
    """Run the cells that are not done yet, and report; returns 0, or 1 if cells failed.

    Args:
        command: the command line as typed, shown on the page.

    Raises:
        ValueError: no such study, or settings that cannot be used.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; finished cells are kept and reported.
    """
    for name in ("seeds", "prompts"):
        check_range(name, getattr(parsed, name), low=1)
    check_range("first-seed", parsed.first_seed, low=0)
    jobs = parsed.jobs
    if jobs is None:
        from ibtpo_kernels.roofline.machine import available_cores  # loads torch

        jobs = available_cores()
    check_range("jobs", jobs, low=1)
    plan = load_study(parsed.name)
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.seeds)
    cells = plan.cells(seeds, prompts=parsed.prompts, changes=_changes(parsed))
    _make_writable_folder(parsed.out)
    done = sum(is_done(parsed.out, cell) for cell in cells)
    amount = f"{counted(len(cells), 'cell')}, {done} done, {jobs} at a time"
    console.print(f"{plan.title}: {amount}", highlight=False, markup=False)
    stopped = None
    if not parsed.report_only:
        try:
            run_cells(parsed.out, cells, jobs, console)
        except Interrupted as stop:
            stopped = stop
    failed = failures(parsed.out, cells)
    _report(plan, cells, parsed.out, failed, command, console)
    if stopped is not None:
        raise stopped
    return 1 if failed else 0


def _make_writable_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out / ".lock")
    except OSError as error:
        raise ValueError(f"out: {out} cannot be made ({error.strerror}); choose another folder with --out") from error


def _changes(parsed: StudyArguments) -> dict[str, Any]:
    """Settings that override the study's: --config, then the flags."""
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


def _report(
    plan: Study, cells: Sequence[Cell], out: Path, failed: Sequence[Failure], command: str, console: Console
) -> None:
    results = collect(plan, cells, out)
    folder = out / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.csv", csv_text(results))
    write_atomically(folder / "table.md", markdown_text(results))
    notes = [MISSING] if results.curves and not AVAILABLE else []
    try:
        figures = draw_figures(results, folder)
    except Exception as error:  # the tables do not depend on matplotlib
        figures = []
        notes.append(f"no figures: {one_line(error)}; the tables are complete")
    for note in notes:
        console.print(note, highlight=False, markup=False)
    page = write_page(results, folder, figures, failed, command, notes)
    for table in rich_tables(results, console.width):
        console.print(table)
    for failure in failed:
        console.print(f"failed: {failure.cell.id}: {failure.message}", highlight=False, markup=False, style="red")
    if results.missing:
        console.print(f"cells without a result yet: {len(results.missing)}", highlight=False)
    say(console, f"report: {page}")
