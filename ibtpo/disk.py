"""Writing that survives: whole files or none, on the disk and not in its cache alone; plain words when it is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

AGAIN = "give the same command again"
UNFINISHED = ".tmp"  # ending of what is being written or removed; never read, swept away when a run is opened
_FULL = {  # how libraries that hide errno put it; what happened, and the remedy
    errno.ENOSPC: ("No space left on device", "no space left on the disk of", "free some space"),
    errno.EDQUOT: ("Disk quota exceeded", "no space left on the disk of", "free some space"),
    errno.EFBIG: ("File too large", "a file is too large for the disk or the limit (ulimit -f) of", "raise the limit"),
}


class RunFolderError(ValueError):
    """The run folder cannot be used as asked; the message names it and the remedy."""


@contextlib.contextmanager
def no_space(path: Path, kept: str, then: str | None = None) -> Iterator[None]:
    """Turn "disk full", from whatever library, into an error that says what to do.

    Args:
        path: the folder written to.
        kept: what is left of it.
        then: what to do once there is space; by default, to resume the run that the folder is of.
    """
    try:
        yield
    except Exception as error:
        for number, (phrase, happened, remedy) in _FULL.items():
            if (isinstance(error, OSError) and error.errno == number) or phrase in str(error):
                raise RunFolderError(
                    f"{happened} {path}; what was being written was removed, kept: {kept}; {remedy}, "
                    f"then {then or f'continue with --resume {path}'}"
                ) from error
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a single file that is written into an error that names it."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written ({error.strerror}); free some space there, or name another file"
        ) from error


def check_writable(path: Path) -> None:
    """See that a file can be written, before the work whose result it is for; it is left as it is.

    Raises:
        RunFolderError: it cannot.
    """
    with writing(path):
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # and no device or pipe
            path.open("xb").close()
            path.unlink()


def unfinished(path: Path) -> Path:
    """The hidden name beside `path` under which it is written."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk and rename it; no reader ever sees half of it."""
    temporary = unfinished(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`flush` a folder and all that lies below it."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def retire(folder: Path) -> None:
    """Remove a folder so that no moment shows half of it under its own name."""
    hidden = unfinished(folder)
    remove(hidden)
    folder.rename(hidden)
    remove(hidden)


def sweep(folder: Path) -> None:
    """Remove what an interrupted process was still writing or removing."""
    for leftover in folder.glob(f".*{UNFINISHED}"):
        remove(leftover)
