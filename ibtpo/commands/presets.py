"""``ibtpo presets``: the methods that --preset knows."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ibtpo.commands.arguments import parse_alone
from ibtpo.config_io import flat
from ibtpo.presets import PRESET_NOTES, PRESETS


@dataclass(frozen=True, kw_only=True)
class PresetsArguments:
    """List the methods for --preset, each with an explanation, its source and its settings."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    parse_alone(PresetsArguments, "ibtpo presets", arguments)
    table = Table("preset", "explanation", "settings", show_lines=True)
    for name, changes in PRESETS.items():
        explanation, source = PRESET_NOTES[name]
        settings = "\n".join(f"{field} {value}" for field, value in flat(changes).items())
        table.add_row(name, f"{explanation} [dim]({source})[/]", settings)
    table.columns[0].no_wrap = True
    table.columns[2].no_wrap = console.width >= 80  # in a narrower window the explanation would have no room
    table.columns[2].overflow = "fold"
    console.print(table)
    return 0
