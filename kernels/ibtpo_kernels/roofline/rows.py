"""Results as rows of a CSV; docs/benchmarks.md explains the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.machine import Machine
from ibtpo_kernels.roofline.problem import Problem, name_of
from ibtpo_kernels.roofline.roofs import Roofs
from ibtpo_kernels.roofline.runner import Result
from ibtpo_kernels.roofline.timing import Timing

Number = float | None  # None: an empty cell


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one problem; the columns, in order. Times in microseconds, rates in 1e9 a second."""

    date: str
    commit: str
    machine: str
    device: str
    torch: str
    triton: str
    threads: int
    op: str
    shape: str
    dtype: str
    which: str
    who: str
    kind: str
    median_us: Number
    p20_us: Number
    p80_us: Number
    repetitions: int
    flops: int
    bytes: int
    gflops: Number
    gbytes: Number
    roof: str
    roof_share: Number
    ratio_to_best_peer: Number
    times_bound: Number
    note: str

    @property
    def problem(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.which


_HEADER = {"which": "pass"}  # a keyword of Python
COLUMNS = [_HEADER.get(f.name, f.name) for f in fields(Row)]


def rows_of(problem: Problem, results: Sequence[Result], machine: Machine, roofs: Roofs) -> list[Row]:
    """Rows of one problem. The best peer is the fastest one of kind "peer": bounds compute less than the op."""

    def fastest(kind: str) -> float | None:
        return min((r.timing.median for r in results if r.timing and r.contender.kind == kind), default=None)

    peer, bound, work = fastest("peer"), fastest("bound"), problem.work
    limit = roofs.seconds(work, problem.dtype)
    return [
        Row(
            **asdict(machine),
            op=problem.op,
            shape=problem.shape,
            dtype=name_of(problem.dtype),
            which=problem.which,
            who=result.contender.who,
            kind=result.contender.kind,
            **_rates(result.timing, work),
            roof=roofs.binding(work, problem.dtype) if limit else "",
            roof_share=_ratio(limit or None, result.timing),
            ratio_to_best_peer=_ratio(peer, result.timing),
            times_bound=result.timing.median / bound if bound and result.timing else None,
            note=result.contender.note if result.timing else f"not measured: {result.reason}",
        )
        for result in results
    ]


def roof_rows(machine: Machine, roofs: Roofs) -> list[Row]:
    """The limits themselves, as rows of op "roof"."""
    return [
        Row(
            **asdict(machine),
            op="roof",
            shape=roof.name,
            dtype=name_of(roof.dtype),
            which="forward",
            who="torch",
            kind="bound",
            **_rates(roof.timing, roof.work, roof.seconds),
            roof="",
            roof_share=None,
            ratio_to_best_peer=None,
            times_bound=None,
            note="rates at the 20th percentile",
        )
        for roof in roofs.measured
    ]


def _ratio(seconds: float | None, timing: Timing | None) -> Number:
    return seconds / timing.median if seconds and timing else None


def _rates(timing: Timing | None, work: Work, seconds: float | None = None) -> dict[str, Any]:
    """Times, and rates over `seconds`, by default the median."""

    def rate(count: int) -> Number:
        return count / (seconds or timing.median) / 1e9 if timing and count else None

    return {
        "median_us": timing.median * 1e6 if timing else None,
        "p20_us": timing.p20 * 1e6 if timing else None,
        "p80_us": timing.p80 * 1e6 if timing else None,
        "repetitions": timing.repetitions if timing else 0,
        "flops": work.flops,
        "bytes": work.bytes,
        "gflops": rate(work.flops),
        "gbytes": rate(work.bytes),
    }


def _cell(value: object) -> object:
    if isinstance(value, float):
        return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="-")
    return "" if value is None else value


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV. Existing rows stay, except those of a problem measured again on the same device.

    Raises:
        ValueError: the file has other columns.
    """
    new = [dict(zip(COLUMNS, map(_cell, asdict(row).values()), strict=True)) for row in rows]
    measured = {_identity(row) for row in new}
    kept = [row for row in read(path) if _identity(row) not in measured] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *new])
    part.replace(path)


def measured_on(path: Path, machine: Machine) -> list[Row]:
    """The rows of a CSV measured on this machine at any time, without the limits."""
    where = ("machine", "device", "threads")
    mine = tuple(str(getattr(machine, name)) for name in where)
    rows = [row for row in read(path) if tuple(row[name] for name in where) == mine and row["op"] != "roof"]
    return [Row(**{f.name: _value(f.type, str(row[_HEADER.get(f.name, f.name)])) for f in fields(Row)}) for row in rows]


def _value(kind: object, text: str) -> Any:
    if kind == "Number":
        return float(text) if text else None
    return int(text) if kind == "int" else text


def _identity(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("machine", "device", "threads", "op", "shape", "dtype", "pass"))


def read(path: Path) -> list[dict[str, object]]:
    """Rows of a CSV as text."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; move it away, or give another --out")
        return [dict(row) for row in reader]
