"""The command `python -m ibtpo_kernels.roofline`."""

from __future__ import annotations

import argparse
import math
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ibtpo_kernels.roofline import plot, roofs, table
from ibtpo_kernels.roofline.catalog import names, problems
from ibtpo_kernels.roofline.machine import Machine, here
from ibtpo_kernels.roofline.problem import Problem
from ibtpo_kernels.roofline.roofs import Roofs
from ibtpo_kernels.roofline.rows import Row, measured_on, read, roof_rows, rows_of, write
from ibtpo_kernels.roofline.runner import Interrupted, run
from ibtpo_kernels.roofline.timing import Budget

_DESCRIPTION = """Measure the machine's limits, then every op against its peers in the same run, taking turns.
Prints useful operations and bytes a second, the share of the limit that binds, and the ratio to the best peer; writes a
CSV and a plot. docs/benchmarks.md says how, and what each column means. Ctrl-C keeps what has been measured."""

_SECONDS = """Time each contender for about so long, in 5 to 200 repetitions. Default: 1, with --quick 0.05."""
_LIMIT = """Begin no problem and no contender after so many seconds; what is left is named. Default: none."""
_OUT = """Where roofline_DEVICE.csv and .png go; rows of other problems that are there stay. Default: bench/results."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="python -m ibtpo_kernels.roofline", description=_DESCRIPTION)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = found.add_argument
    add("--device", default=default, help=f"Where to measure: cpu, cuda or cuda:N. Here the default is {default}.")
    add("--ops", nargs="+", choices=names(), metavar="OP", help=f"Measure these ops only: {', '.join(names())}.")
    add("--only", metavar="TEXT", help="Measure only problems whose line in --list contains this text.")
    add("--quick", action="store_true", help="Measure one small problem of each op, briefly: does it all work?")
    add("--seconds", type=float, metavar="S", help=_SECONDS)
    add("--limit", type=float, metavar="S", help=_LIMIT)
    add("--threads", type=int, metavar="N", help="Threads on the CPU. Default: as many as torch takes.")
    add("--out", type=Path, default=Path("bench/results"), metavar="DIR", help=_OUT)
    add("--list", action="store_true", help="Name the problems and who is in each, and measure nothing.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if an op of ours failed or nothing was chosen; 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    console = _console()
    if problem := _problem_with(options):
        console.print(problem, markup=False)
        return 1
    device = torch.device(options.device)
    chosen = [p for p in problems(device, quick=options.quick) if _is_chosen(p, options)]
    if not chosen:
        console.print(
            f"No problem is left by --ops {options.ops} --only {options.only}; --list names them.", markup=False
        )
        return 1
    if options.list:
        for p in chosen:
            console.print(f"{p}: {'; '.join(c.who for c in p.contenders)}", markup=False, soft_wrap=True)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    try:
        return _measure(chosen, options, device, console)
    except KeyboardInterrupt:
        console.print("interrupted before anything was measured")
        return 130


def _console() -> Console:
    """A console as wide as the terminal, or, in a file, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _problem_with(options: argparse.Namespace) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        return f"--device {options.device} is neither cpu, nor cuda, nor cuda:N."
    if options.device != "cpu" and not torch.cuda.is_available() and not options.list:
        return "There is no CUDA device; measure with --device cpu, or see --list --device cuda for what would be run."
    for name in ("seconds", "limit", "threads"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            return f"--{name} {value} must be greater than 0, and finite."
    return ""


def _is_chosen(problem: Problem, options: argparse.Namespace) -> bool:
    return (not options.ops or problem.op in options.ops) and (not options.only or options.only in str(problem))


def _measure(chosen: list[Problem], options: argparse.Namespace, device: torch.device, console: Console) -> int:
    start, machine = time.monotonic(), here(device)
    slug = re.sub(r"[^a-z0-9]+", "_", machine.device.lower()).strip("_")
    csv_path = options.out / f"roofline_{slug}.csv"
    if csv_path.exists():
        read(csv_path)  # if its columns differ, raises before anything is measured
    console.print(f"{machine.machine}, {machine.device}, torch {machine.torch}, commit {machine.commit}", markup=False)
    limits = roofs.measure(device, quick=options.quick)
    table.print_roofs(console, limits)
    rows = roof_rows(machine, limits)
    write(csv_path, rows)
    seconds = options.seconds or (0.05 if options.quick else 1.0)
    budget = Budget(seconds, fewest=3 if options.quick else 5)
    until = start + (options.limit or math.inf)
    left, skipped, interrupted = list(chosen), list[str](), False
    try:
        with _on_signals(signal.default_int_handler, signal.SIGTERM), _progress(console) as progress:
            task = progress.add_task("", total=len(chosen))
            while left and not interrupted and time.monotonic() <= until:
                problem = left[0]
                progress.update(task, description=str(problem))
                try:
                    results = run(problem, device, budget, until=until)
                except Interrupted as stop:
                    results, interrupted = stop.results, True
                if results:
                    left.pop(0)
                    skipped += [f"{problem}: {contender.who}" for contender in problem.contenders[len(results) :]]
                    rows += rows_of(problem, results, machine, limits)
                    write(csv_path, rows)
                progress.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    with _on_signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not lose the report
        return _report(rows, [*skipped, *map(str, left)], machine, limits, csv_path, interrupted, console)


@contextmanager
def _on_signals(handler: Any, *kinds: signal.Signals) -> Iterator[None]:
    """Use another signal handler; `timeout` and schedulers send SIGTERM, which should end a run like Ctrl-C."""
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True)


def _report(
    rows: list[Row],
    left: list[str],
    machine: Machine,
    limits: Roofs,
    csv_path: Path,
    interrupted: bool,
    console: Console,
) -> int:
    measured = [row for row in rows if row.op != "roof"]
    table.print_rows(console, measured)
    for what in left:
        console.print(f"not reached: {what}", markup=False)
    console.print(f"wrote {csv_path}", markup=False)
    drawn = measured_on(csv_path, machine)  # including earlier runs on this machine
    commits = ", ".join(dict.fromkeys(row.commit for row in drawn))
    title = f"{machine.device if machine.device != 'cpu' else machine.machine}, commit {commits}"
    try:
        plot.draw(csv_path.with_suffix(".png"), drawn, limits, title)
        console.print(f"wrote {csv_path.with_suffix('.png')}", markup=False)
    except ImportError:
        console.print("no plot: matplotlib is missing; pip install 'ibtpo[bench]'", markup=False)
    failed = [row for row in measured if row.kind == "ours" and row.median_us is None]
    for row in failed:
        console.print(f"FAILED: {row.who}, {' '.join(row.problem)}: {row.note}", markup=False)
    return 130 if interrupted else int(bool(failed))
