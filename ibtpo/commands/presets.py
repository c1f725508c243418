"""``ibtpo presets``: the methods that --preset knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ibtpo.commands.arguments import parse_alone
from ibtpo.presets import PRESET_NOTES, PRESETS


@dataclass(frozen=True, kw_only=True)
class PresetsArguments:
    """List the methods that --preset knows: what each is, where it comes from, what it sets."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    parse_alone(PresetsArguments, "ibtpo presets", arguments)
    table = Table("preset", "what it is", "sets", show_lines=True)
    for name, changes in PRESETS.items():
        explanation, source = PRESET_NOTES[name]
        table.add_row(name, f"{explanation} [dim]({source})[/]", "\n".join(_settings(changes)))
    table.columns[0].no_wrap = True
    table.columns[2].no_wrap = console.width >= 80  # in a narrower window they would leave the explanation no room
    table.columns[2].overflow = "fold"
    console.print(table)
    return 0


def _settings(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of a nested mapping as flags and values."""
    for name, value in changes.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value}"
