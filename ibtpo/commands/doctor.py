"""``ibtpo doctor``: what is installed, what works here, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from ibtpo.commands.arguments import parse_alone
from ibtpo.console import say
from ibtpo.loading import loading

if TYPE_CHECKING:
    from ibtpo.diagnosis import Finding

_COLORS = {"ok": "green", "note": "dim", "slow": "yellow", "broken": "red"}


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Report what is installed and what works here, and check every kernel against its reference; takes seconds.

    The exit code is 1 if something that a run needs is broken. `slow` means that it works, but could be faster;
    in a `note` something optional is missing.
    """

    json: bool = False
    """Print the findings as JSON: group, name, status (ok, note, slow, broken), text."""
    kernels: bool = True
    """Check the kernels."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns 0, or 1 if something is broken."""
    parsed = parse_alone(DoctorArguments, "ibtpo doctor", arguments)
    with loading():
        from ibtpo.diagnosis import examine

    found: list[Finding] = []
    for finding in examine(kernels=parsed.kernels):
        if not parsed.json:
            _show(console, finding, is_first=not found or found[-1].group != finding.group)
        found.append(finding)
    broken = [finding.name for finding in found if finding.status == "broken"]
    if parsed.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        console.print(f"\nbroken: {', '.join(broken)}" if broken else "\nnothing is broken", highlight=False)
    return 1 if broken else 0


def _show(console: Console, finding: Finding, *, is_first: bool) -> None:
    if is_first:
        console.print(f"\n[bold]{finding.group}[/]", highlight=False)
    color = _COLORS[finding.status]
    console.print(f"  [{color}]{finding.status:<6}[/] {finding.name:<26} ", end="", highlight=False)
    say(console, finding.text)
