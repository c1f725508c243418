"""A study's tables of estimates over seeds and paired differences, for the terminal, as CSV and as markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ibtpo.printable import counted
from ibtpo.studies.results import COLUMNS, Column, Results
from ibtpo.studies.statistics import SeedMean, paired_difference, seed_mean


@dataclass(frozen=True)
class Entry:
    """A cell of the table: the estimate, and its difference to the baseline over the seeds both have."""

    value: SeedMean | None
    difference: SeedMean | None


@dataclass(frozen=True)
class Section:
    """The table of one task and policy: a row of entries a variant, an entry a column."""

    title: str
    columns: Sequence[Column]
    rows: dict[str, list[Entry]]


def sections(results: Results) -> list[Section]:
    """All tables of a study, without empty columns."""
    made = []
    for task, policy in results.sections:
        values = {
            v: results.values[task, policy, v] for v in results.study.variants if (task, policy, v) in results.values
        }
        columns = [c for c in COLUMNS[results.study.kind] if any(c.name in found for found in values.values())]
        baseline = values.get(results.study.baseline, {})
        rows = {
            variant: [
                Entry(
                    seed_mean(list(found.get(column.name, {}).values())),
                    paired_difference(found.get(column.name, {}), baseline.get(column.name, {}))
                    if column.compared and variant != results.study.baseline
                    else None,
                )
                for column in columns
            ]
            for variant, found in values.items()
        }
        policies = {"start": "warm-started policy", "half": "policy after a third of the budget"}
        title = ", ".join(part for part in (task, policies.get(policy, policy)) if part)
        made.append(Section(title, columns, rows))
    return made


def rich_tables(results: Results, width: int) -> list[Table]:
    """The tables for a terminal `width` characters wide, each with as many columns as fit: see `entry_lines`."""
    tables = []
    for section in sections(results):
        first = max(map(len, section.rows)) + 4
        texts = {
            variant: ["\n".join(entry_lines(entry, c)) for entry, c in zip(entries, section.columns, strict=True)]
            for variant, entries in section.rows.items()
        }
        widest = max(len(line) for row in texts.values() for text in row for line in text.splitlines()) + 3
        step = max((width - first) // max(widest, *(len(c.title) + 3 for c in section.columns)), 1)
        for at in range(0, len(section.columns), step):
            table = Table("", title=Text(section.title) if section.title else None)
            for column in section.columns[at : at + step]:
                table.add_column(Text(column.title))
            for variant, row in texts.items():
                table.add_row(*map(Text, (variant, *row[at : at + step])), end_section=True)
            tables.append(table)
    return tables


def entry_lines(entry: Entry, column: Column) -> list[str]:
    """Mean, interval, difference with its interval (with an asterisk if that excludes 0), as far as known."""
    if entry.value is None:
        return ["–"]
    digits = column.digits
    lines = [f"{entry.value.mean:.{digits}f}"]
    if math.isfinite(entry.value.low) and entry.value.low != entry.value.high:
        lines.append(f"[{entry.value.low:.{digits}f}, {entry.value.high:.{digits}f}]")
    if entry.difference is not None:
        d = entry.difference
        interval = f" [{d.low:+.{digits}f}, {d.high:+.{digits}f}]" if math.isfinite(d.low) else ""
        lines.append(f"Δ {d.mean:+.{digits}f}{interval}{' *' if d.is_apart_from_zero else ''}")
    return lines


def csv_text(results: Results) -> str:
    """One line for each task, policy, variant and column, in full precision; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("mean", "low", "high", "seeds")
    writer.writerow(["section", "variant", "column", *names, *(f"difference_{name}" for name in names)])
    for section in sections(results):
        for variant, entries in section.rows.items():
            for column, entry in zip(section.columns, entries, strict=True):
                writer.writerow([section.title, variant, column.name, *_cells(entry.value), *_cells(entry.difference)])
    return text.getvalue()


def markdown_text(results: Results) -> str:
    """The tables in markdown, with the meanings of their columns."""
    study = results.study
    lines = [f"# {study.title}", "", explanation(results), ""]
    for section in sections(results):
        if section.title:
            lines += [f"## {section.title}", ""]
        lines.append("| | " + " | ".join(column.title for column in section.columns) + " |")
        lines.append("|---|" + "---|" * len(section.columns))
        for variant, entries in section.rows.items():
            places = zip(entries, section.columns, strict=True)
            name = " ".join(variant.replace("|", r"\|").split())
            lines.append(f"| {name} | " + " | ".join("<br>".join(entry_lines(e, c)) for e, c in places) + " |")
        lines.append("")
    lines += [f"- **{column.title}**: {column.meaning}" for column in COLUMNS[study.kind]]
    return "\n".join(lines) + "\n"


def explanation(results: Results) -> str:
    """The meaning of the numbers, in a sentence or two."""
    note = (
        f"Mean over {counted(len(results.seeds), 'seed')} with its 95 % bootstrap interval over seeds; Δ is the paired "
        f"difference to {results.study.baseline}, with * where its interval excludes 0. No correction for multiple "
        "comparisons. Over five seeds such an interval contains the true mean in some 84 % of cases, not 95."
    )
    if results.missing:
        note += f" Cells without a result yet: {len(results.missing)}."
    return note


def _cells(value: SeedMean | None) -> list[object]:
    if value is None:
        return [""] * 4
    return [*("" if math.isnan(v) else v for v in (value.mean, value.low, value.high)), value.seeds]
