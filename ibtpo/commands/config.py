"""``ibtpo config``: the settings that a command would use, or every one explained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ibtpo.commands.arguments import Flat, base_of_training, parse, with_data
from ibtpo.config import TrainConfig
from ibtpo.config_io import dump_yaml
from ibtpo.config_reference import sections


@dataclass(frozen=True, kw_only=True)
class ConfigArguments:
    """Print the configuration that `ibtpo train` would use with the same flags, as YAML that --config takes.

    With --explain, print every field instead: its default, its allowed values and its meaning.
    """

    preset: str = "ib-tpo"
    """Method, as for `ibtpo train`."""
    config: Path | None = None
    """YAML file with any of the fields below."""
    explain: bool = False
    """Explain every field instead (docs/configuration.md)."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    base = ConfigArguments(run=base_of_training(arguments))
    parsed = parse(ConfigArguments, base, "ibtpo config", arguments)
    print(explanation() if parsed.explain else dump_yaml(with_data(parsed.run)), end="")
    return 0


def explanation() -> str:
    """Every field of the configuration, for a terminal."""
    lines = []
    for section in sections():
        lines += [f"# {section.meaning}", ""]
        for field_ in section.fields:
            lines += [f"{field_.name} = {field_.default}", f"    {field_.allowed}", f"    {field_.meaning}"]
        lines.append("")
    return "\n".join(lines)
