"""A run's environment: versions, commit and command line, an entry for each start and resume."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from ibtpo.disk import no_space, write_atomically

ENVIRONMENT = "environment.json"
VERSIONS = ("ibtpo", "commit", "python", "torch", "transformers", "platform")
"""The entries compared when a run is resumed."""


def environment() -> dict[str, Any]:
    """This process's versions and command line; "commit" is null outside a git checkout of the package."""
    return {
        "ibtpo": package_version("ibtpo"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "platform": platform.platform(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def record_environment(run: Path) -> list[str]:
    """Add an entry to the run folder's environment.json.

    Returns:
        descriptions of differences from the last entry, with which the run may not be bitwise reproducible.

    Raises:
        RunFolderError: the disk is full.
    """
    path, now = run / ENVIRONMENT, environment()
    entries: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):  # of an earlier version, or damaged: start a new list
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for entry in content if isinstance(entry, dict)]
    with no_space(run, "everything"):
        write_atomically(path, json.dumps([*entries, now], indent=1) + "\n")
    before = entries[-1] if entries else now
    return [f"{name} {before.get(name)} -> {now[name]}" for name in VERSIONS if before.get(name) != now[name]]


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the package's sources, with "-dirty" if they differ; None if git does not track them."""
    here = Path(__file__)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # fails if git does not track the package
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
