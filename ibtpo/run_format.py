"""The format of the folders we write: a number in ibtpo.json, so that no older ibtpo misreads a newer folder.

::

    {"format": 1, "version": "0.1.0"}      beside a run's config.yaml, in each of its checkpoints, in evaluations

Whoever changes what the files of one of them mean raises `FORMAT`, goes on reading what was written before, and says
so in CHANGELOG.md. New files and new metrics change no meaning. A folder without a number is of format 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from ibtpo.disk import RunFolderError, write_atomically
from ibtpo.environment import package_version

FORMAT = 1
"""What this version writes; it reads this and all before."""

CONFIG, FORMAT_FILE = "config.yaml", "ibtpo.json"


def is_run(folder: Path) -> bool:
    """Is this the folder of a run?"""
    return (folder / CONFIG).is_file()


def check_run(folder: Path, what_for: str) -> None:
    """See that `folder` is a run's, of a format that this version reads.

    Args:
        what_for: the command or flag it was given to; the message begins with it.

    Raises:
        RunFolderError: it is none, or of a newer format.
    """
    if not is_run(folder):
        raise RunFolderError(f"{what_for}: {folder} is not a run folder (it has no {CONFIG}); check the path")
    check_format(folder)


def check_format(folder: Path) -> None:
    """See that a run folder, a checkpoint or an evaluation is of a format that this version reads.

    Raises:
        RunFolderError: it is of a newer one, or its number cannot be read.
    """
    path = folder / FORMAT_FILE
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number, writer = int(content["format"]), str(content.get("version"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{path} does not say a format; put it back from a copy") from None
    if number > FORMAT:
        raise RunFolderError(
            f"{folder} has format {number}, this ibtpo ({package_version('ibtpo')}) reads up to {FORMAT}; update it to "
            f"{writer}, which wrote the folder, or later"
        )


def write_format(folder: Path) -> None:
    """Say that what is written into `folder` from now on is of this version's format."""
    write_atomically(folder / FORMAT_FILE, json.dumps({"format": FORMAT, "version": package_version("ibtpo")}) + "\n")
