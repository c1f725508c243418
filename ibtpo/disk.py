"""Durable writing: atomic and flushed to disk, with errors that explain a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

AGAIN = "give the same command again"
UNFINISHED = ".tmp"  # suffix of files being written or removed; never read, removed when a run is opened
_FULL = {  # messages of libraries that hide errno -> what happened, and the remedy
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
        kept: the part of it that is saved, for the message.
        then: what to do once there is space; by default, to resume the run in the folder.
    """
    try:
        yield
    except Exception as error:
        for number, (phrase, happened, remedy) in _FULL.items():
            if (isinstance(error, OSError) and error.errno == number) or phrase in str(error):
                raise RunFolderError(
                    f"{happened} {path}; unfinished files were removed, kept: {kept}; {remedy}, "
                    f"then {then or f'continue with --resume {path}'}"
                ) from error
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing a single file into an error that names it."""
    try:
        yield
    except OSError as error:
        remedy = "free some space there" if error.errno in _FULL else "make the folder writable"
        raise RunFolderError(f"{path} cannot be written ({error.strerror}); {remedy}, or name another file") from error


def check_writable(path: Path) -> None:
    """Check that a file can be written, without changing it, before doing the work whose result it will hold.

    Raises:
        RunFolderError: it cannot.
    """
    with writing(path):
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # not a device or pipe
            path.open("xb").close()
            path.unlink()


def check_link(path: Path) -> None:
    """Check that a folder's name is not a link to nothing, which the system calls a file that exists.

    Raises:
        RunFolderError: it is.
    """
    if path.is_symlink() and not path.exists():
        raise RunFolderError(
            f"out: {path} is a link to {path.readlink()}, which does not exist; make it, or remove the link"
        )


def unfinished(path: Path) -> Path:
    """The hidden temporary name beside `path` under which it is written."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts one by one, under a temporary name, flush it to disk and rename it.

    No reader sees a partial file.
    """
    temporary = unfinished(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
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
    """Remove a folder; it is renamed first, so that its name never has partial contents."""
    hidden = unfinished(folder)
    remove(hidden)
    folder.rename(hidden)
    remove(hidden)


def sweep(folder: Path) -> None:
    """Remove leftovers of writes and removals that were interrupted."""
    for leftover in folder.glob(f".*{UNFINISHED}"):
        remove(leftover)
