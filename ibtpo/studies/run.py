"""Running cells in processes of this machine; results and failures stay on disk if the study is interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ibtpo.disk import write_atomically
from ibtpo.progress import Tracker, track
from ibtpo.stopping import Interrupted, StopRequest
from ibtpo.studies.folders import CELLS, ERROR, LOG, RESULT, SPEC, policy_of
from ibtpo.studies.matrix import Cell, with_policies

_POLL_SECONDS = 0.05
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Failure:
    """A cell that ended without a result."""

    cell: Cell
    message: str


def is_done(out: Path, cell: Cell) -> bool:
    """Has this cell a result?"""
    return (out / CELLS / cell.id / RESULT).is_file()


def failures(out: Path, cells: Sequence[Cell]) -> list[Failure]:
    """The cells that were started and have no result, with the reasons found in their folders."""
    undone = [cell for cell in with_policies(cells) if not is_done(out, cell)]
    paths = [out / CELLS / cell.id / ERROR for cell in undone]
    return [
        Failure(cell, path.read_text(encoding="utf-8"))
        for cell, path in zip(undone, paths, strict=True)
        if path.is_file()
    ]


def run_cells(out: Path, cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Run the cells that are not done yet, after those of their starting policies, each in a process of its own.

    The reason of a failure is written to the cell's folder.

    Raises:
        ValueError: another study is running in this folder.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; running cells were ended, finished ones are kept.
    """
    stop = StopRequest()
    needed = with_policies([cell for cell in cells if not is_done(out, cell)])
    waiting = [cell for cell in needed if not is_done(out, cell)]
    with _locked(out), stop.on_signals(console), track(console, "Study", len(waiting)) as tracker:
        processes = _Processes(out, waiting, jobs, console, tracker)
        try:
            while processes.waiting or processes.under_way:
                if stop.requested():
                    raise Interrupted("stopped; finished cells are kept, the same command continues", stop.signal)
                processes.begin()
                processes.collect()
                time.sleep(_POLL_SECONDS)
        finally:
            processes.kill()


@dataclass
class _Processes:
    """The processes of a study, at most `jobs` at a time; a cell waits for its starting policy."""

    out: Path
    waiting: list[Cell]
    jobs: int
    console: Console
    tracker: Tracker
    under_way: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Start the cells that can start; cells whose starting policy failed fail, too."""
        for cell in list(self.waiting):
            if len(self.under_way) == self.jobs:
                return
            above = cell.policy
            if above is None or is_done(self.out, above):
                self.waiting.remove(cell)
                self.under_way[cell.id] = (cell, _begin(self.out, cell))
            elif above.id in self.failed:
                self.waiting.remove(cell)
                self.failed.add(cell.id)
                self.tracker.advance(1)

    def collect(self) -> None:
        """Handle the cells that have ended."""
        ended = [name for name, (_, process) in self.under_way.items() if process.poll() is not None]
        for name in ended:
            cell, process = self.under_way.pop(name)
            _close(process)
            if not is_done(self.out, cell):
                self.failed.add(name)
                message = _message(self.out / CELLS / name, process.returncode)
                self.console.print(f"failed: {name}: {message}", highlight=False, markup=False)
            self.tracker.advance(1, f"{name} ({len(self.failed)} failed)" if self.failed else name)

    def kill(self) -> None:
        """Kill the running cells."""
        for _, process in self.under_way.values():
            process.kill()
            _close(process)


def _begin(out: Path, cell: Cell) -> subprocess.Popen[bytes]:
    folder = out / CELLS / cell.id
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt that failed
    folder.mkdir(parents=True)
    policy = None if cell.policy is None else str(policy_of(out / CELLS / cell.policy.id).resolve())
    write_atomically(folder / SPEC, json.dumps(cell.spec() | {"folder": policy}, indent=1))
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ibtpo.studies.cell", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach only the study, which ends its cells
            env=os.environ | dict.fromkeys(_THREADS, "1"),
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _message(folder: Path, code: int) -> str:
    """Why a cell has no result; also written to its folder for the report."""
    if not (folder / ERROR).is_file():
        said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f"; last line of {LOG}: {said[-1]}" if said else ""
        write_atomically(folder / ERROR, f"ended with code {code}{last}")
    return (folder / ERROR).read_text(encoding="utf-8")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another study is at work in {out}; wait for it, or choose another --out") from None
        yield
