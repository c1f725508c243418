"""Rows as tables in a terminal, one a problem."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
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


def rate(giga: float | None, unit: str) -> str:
    """A rate given in 1e9 a second, in three digits and a unit."""
    if giga is None:
        return "-"
    return f"{giga / 1e3:.3g} T{unit}" if giga >= 1e3 else f"{giga:.3g} G{unit}"


def print_roofs(console: Console, roofs: Roofs) -> None:
    """Print the machine's limits."""
    table = Table(title="roofs", title_justify="left")
    for name in ("what", "dtype", "p20", "rate"):
        table.add_column(name, justify="left" if name in ("what", "dtype") else "right")
    for roof in roofs.measured:
        seconds = roof.seconds
        compute, memory = roof.work.flops / seconds / 1e9, roof.work.bytes / seconds / 1e9
        of_roof = rate(compute, "FLOP/s") if roof.work.flops else rate(memory, "B/s")
        table.add_row(roof.name, name_of(roof.dtype), duration(seconds * 1e6), of_roof)
    console.print(table)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """One table a problem. Rates are of useful work; `vs peer` above 1 is faster than the best peer."""
    for (op, shape, dtype, which), found in groupby(rows, key=lambda row: row.problem):
        of_problem = list(found)
        short = _SHORT.get(dtype, dtype)
        console.print(_table(f"{op}  {shape}  {short} {which}", [r for r in of_problem if r.median_us is not None]))
        for row in of_problem:
            if row.median_us is None:
                console.print(f"  {row.who}: {row.note}", markup=False, style="dim")


def _table(title: str, rows: Sequence[Row]) -> Table:
    has_bound = any(row.times_bound is not None for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("who", min_width=30)
    names = ("median", "p20", "p80", "reps", "FLOP/s", "B/s", "roof", "vs peer", *(("x bound",) if has_bound else ()))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        who = f"{row.who} [dim]{escape(row.note)}[/dim]" if row.note else row.who
        table.add_row(who, *_cells(row)[: len(names)], style="bold" if row.kind == "ours" else None)
    return table


def _cells(row: Row) -> list[str]:
    return [
        *map(duration, (row.median_us, row.p20_us, row.p80_us)),
        str(row.repetitions),
        rate(row.gflops, ""),
        rate(row.gbytes, ""),
        "-" if row.roof_share is None else f"{row.roof_share:.0%} {row.roof[:3]}",
        "-" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}",
        "-" if row.times_bound is None else f"{row.times_bound:.2f}",
    ]
