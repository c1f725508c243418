"""Rows as tables in a terminal, one an op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from ibtpo_kernels.roofline.problem import name_of
from ibtpo_kernels.roofline.roofs import Roofs
from ibtpo_kernels.roofline.rows import Row

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def duration(microseconds: float | None) -> str:
    """Three digits and a unit."""
    if microseconds is None:
        return "-"
    if microseconds < 1e3:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"


def _rate(giga: float | None, unit: str) -> str:
    if giga is None:
        return "-"
    return f"{giga / 1e3:.3g} T{unit}" if giga >= 1e3 else f"{giga:.3g} G{unit}"


def print_roofs(console: Console, roofs: Roofs) -> None:
    """What the machine can do."""
    table = Table(title="roofs", title_justify="left")
    for name in ("what", "dtype", "median", "rate"):
        table.add_column(name, justify="left" if name in ("what", "dtype") else "right")
    for roof in roofs.measured:
        seconds = roof.timing.median
        compute, memory = roof.work.flops / seconds / 1e9, roof.work.bytes / seconds / 1e9
        rate = _rate(compute, "FLOP/s") if roof.work.flops else _rate(memory, "B/s")
        table.add_row(roof.name, name_of(roof.dtype), duration(seconds * 1e6), rate)
    console.print(table)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """One table an op; a rule between problems. Rates are of useful work, `vs peer` above 1 is faster than the best."""
    for op, of_op in groupby(sorted(rows, key=lambda row: row.op), key=lambda row: row.op):
        console.print(_table(op, of_op))


def _table(op: str, rows: Iterable[Row]) -> Table:
    table = Table(title=op, title_justify="left")
    for name in ("shape", "who"):
        table.add_column(name, overflow="fold")
    for name in ("median", "p20-p80", "reps", "FLOP/s", "B/s", "roof", "vs peer", "x bare"):
        table.add_column(name, justify="right")
    for _, of_problem in groupby(rows, key=lambda row: row.problem):
        for i, row in enumerate(of_problem):
            label = f"{row.shape}\n{_SHORT.get(row.dtype, row.dtype)} {row.which}" if i == 0 else ""
            table.add_row(label, *_cells(row), style="bold" if row.kind == "ours" else None)
        table.add_section()
    return table


def _cells(row: Row) -> list[str]:
    who = f"{row.who}\n[dim]{_escaped(row.note)}[/dim]" if row.note else row.who
    if row.median_us is None:
        return [who, *["-"] * 8]
    return [
        who,
        duration(row.median_us),
        f"{duration(row.p20_us)} - {duration(row.p80_us)}",
        str(row.repetitions),
        _rate(row.gflops, ""),
        _rate(row.gbytes, ""),
        "-" if row.roof_share is None else f"{row.roof_share:.0%} {row.roof[:3]}",
        "-" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}",
        "-" if row.times_bound is None else f"{row.times_bound:.2f}",
    ]


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
