"""The format of run folders, checkpoints and evaluations: a number in ibtpo.json, so that no older ibtpo misreads them.

::

    {"format": 1, "version": "0.1.0"}      beside a run's config.yaml, in each of its checkpoints, in evaluations

A change to the meaning of their files must raise `FORMAT`, still read older formats, and be noted in CHANGELOG.md. New
files and new metrics are not such changes. A folder without a number has format 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from ibtpo.disk import RunFolderError, write_atomically
from ibtpo.environment import package_version

FORMAT = 1
"""The format this version writes; it reads this and all earlier ones."""

CONFIG, FORMAT_FILE = "config.yaml", "ibtpo.json"


def is_run(folder: Path) -> bool:
    """Is this the folder of a run?"""
    return (folder / CONFIG).is_file()


def check_run(folder: Path, what_for: str) -> None:
    """Check that `folder` is a run folder in a format that this version reads.

    Args:
        what_for: the command or flag it was given to; the message begins with it.

    Raises:
        RunFolderError: it is not a run folder, or has a newer format.
    """
    if not is_run(folder):
        above = next((path for path in folder.absolute().parents[:2] if is_run(path)), None)
        remedy = "check the path" if above is None else f"give {above}, the folder of the run"
        raise RunFolderError(f"{what_for}: {folder} is not a run folder (it has no {CONFIG}); {remedy}")
    check_format(folder)


def check_format(folder: Path) -> None:
    """Check that a run folder, a checkpoint or an evaluation has a format that this version reads.

    Raises:
        RunFolderError: it has a newer one, or its number cannot be read.
    """
    path = folder / FORMAT_FILE
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number, writer = int(content["format"]), str(content.get("version"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{path} holds no format number; restore it from a copy") from None
    if number > FORMAT:
        raise RunFolderError(
            f"{folder} has format {number}, this ibtpo ({package_version('ibtpo')}) reads up to {FORMAT}; update it to "
            f"{writer}, which wrote the folder, or later"
        )


def write_format(folder: Path) -> None:
    """Record this version's format in `folder`."""
    write_atomically(folder / FORMAT_FILE, json.dumps({"format": FORMAT, "version": package_version("ibtpo")}) + "\n")
