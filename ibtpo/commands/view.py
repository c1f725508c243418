"""``ibtpo view``: look at a run, or at two beside each other."""

from __future__ import annotations

import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from ibtpo.commands.arguments import parse_alone
from ibtpo.console import say
from ibtpo.viewer import Viewer, export_page


@dataclass(frozen=True, kw_only=True)
class ViewArguments:
    """Look at a run, finished or under way, in the browser: curves, prompts, trees. Two runs are shown together."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """One run folder, or two to compare."""
    port: int | None = None
    """Port on 127.0.0.1; by default 8642, or any free one if that is taken."""
    browser: bool = True
    """Open the page in a browser."""
    export: Path | None = None
    """Write the page to this HTML file instead of serving it; it needs neither server nor network."""
    trees: int = 400
    """Largest number of trees per run in an exported page."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; Ctrl-C ends it. Returns the exit code."""
    parsed = parse_alone(ViewArguments, "ibtpo view", arguments)
    if not 1 <= len(parsed.runs) <= 2:
        raise ValueError(f"runs: {len(parsed.runs)} folders given; give one run folder, or two to compare")
    if parsed.port is not None and not 0 <= parsed.port <= 65535:
        raise ValueError(f"port: {parsed.port} must be between 0 and 65535")
    if parsed.trees < 0:
        raise ValueError(f"trees: {parsed.trees} must be at least 0")
    if parsed.export is not None:
        if parsed.export.is_dir():
            raise ValueError(
                f"export: {parsed.export} is a folder; name a file in it, such as {parsed.export}/page.html"
            )
        if not parsed.export.absolute().parent.is_dir():
            raise ValueError(f"export: {parsed.export.parent} is not a folder; make it, or name another file")
        page = export_page(parsed.runs, parsed.export, trees=parsed.trees)
        say(console, f"page: {page}")
        return 0
    with Viewer(parsed.runs, parsed.port) as viewer:
        console.print(f"{viewer.url}  (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        if parsed.browser:
            threading.Thread(target=webbrowser.open, args=(viewer.url,), daemon=True).start()
        try:
            viewer.serve()
        except KeyboardInterrupt:
            console.print("ended", highlight=False)
    return 0
