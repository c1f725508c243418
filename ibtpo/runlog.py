"""A run's folder: what was configured, measured, grown and saved.

::

    config.yaml       the configuration as resolved
    metrics.jsonl     a line of JSON a training step, names as in ibtpo/metrics.py
    trees.jsonl       a line about each grown tree that is kept; trees/ holds them (ibtpo/treelog.py)
    events.out.*      the same metrics for TensorBoard
    checkpoints/      step-000010/ ...    written under a hidden name, flushed to disk, then renamed
    latest.json       which of them is the last
    report.html       made from the above

Whatever interrupts a run, a checkpoint that carries its final name is complete, and a log continues where its
checkpoint was taken.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import yaml

from ibtpo.config import TrainConfig
from ibtpo.loggers import open_loggers, parse_names
from ibtpo.metrics import check_names
from ibtpo.treelog import thin_trees, write_tree

CONFIG, METRICS, TREES, LATEST = "config.yaml", "metrics.jsonl", "trees.jsonl", "latest.json"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
KEPT = 2
_LOCK = ".lock"
_UNFINISHED = ".tmp"  # ending of what is being written; never read, removed when a run is opened
_FULL = ("No space left on device", "Disk quota exceeded")  # how libraries that hide errno put it


class RunFolderError(ValueError):
    """The run folder cannot be used as asked; the message names it and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path


class RunFolder:
    """The folder of one run, locked while it is open. Use `create` or `open`, as a context manager."""

    def __init__(self, path: Path, lock: IO[str], purge_step: int | None, config: TrainConfig | None = None) -> None:
        self.path = path
        self._lock = lock
        names, settings = ([], {}) if config is None else (parse_names(config.log), _plain(asdict(config)))
        self._loggers = open_loggers(path, names, settings, purge_step)

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Self:
        """Make the folder of a new run.

        Raises:
            RunFolderError: it holds files already, is no folder, another run uses it, or the disk is full.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"out: {path} is a file; choose another folder with --out")
        if path.is_dir() and any(path.iterdir()):
            resume = f", or continue the run with --resume {path}" if (path / CONFIG).exists() else ""
            raise RunFolderError(f"out: {path} already holds files; choose another folder with --out{resume}")
        try:
            with no_space(path, "nothing"):
                path.mkdir(parents=True, exist_ok=True)
                lock = _take_lock(path)
        except OSError as error:
            raise RunFolderError(f"out: {path} cannot be created ({error.strerror}); choose another --out") from error
        try:
            with no_space(path, "nothing"):
                (path / CHECKPOINTS).mkdir()
                _write_config(path, config)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            lock.close()
            raise
        return cls(path, lock, None, config)

    @classmethod
    def open(cls, path: Path, config: TrainConfig | None = None, *, step: int | None = None) -> Self:
        """Go on with a run: what was logged after `step` (default: that of its last checkpoint) is dropped.

        Args:
            config: what the run goes on with, if that differs from what is written there.

        Raises:
            RunFolderError: this is no run folder, or another run uses it.
        """
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"resume: {path} is not a run folder (it has no {CONFIG}); check the path")
        lock = _take_lock(path)
        for leftover in [*path.glob(f".*{_UNFINISHED}"), *(path / CHECKPOINTS).glob(f".*{_UNFINISHED}")]:
            _remove(leftover)
        if step is None:
            last = latest_checkpoint(path)
            step = 0 if last is None else last.step
        for name in (METRICS, TREES):
            rows = [row for row in read_rows(path / name) if row["step"] <= step]
            write_atomically(path / name, "".join(json.dumps(row) + "\n" for row in rows))
        if config is not None:
            _write_config(path, config)
        return cls(path, lock, step + 1, config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a training step; several rows may share a step (an evaluation has its own).

        Infinite and NaN values are written as null.

        Raises:
            ValueError: a name is not in `ibtpo.metrics.METRICS`.
            RunFolderError: the disk is full.
        """
        check_names(values)
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._append(METRICS, {"step": step, **finite})
        self._loggers.log(step, finite)

    def add_tree(self, step: int, record: Mapping[str, Any], *, most_bytes: float = math.inf) -> None:
        """Keep a grown tree (a `tree_record`); where all would exceed `most_bytes`, whole steps go, evenly over the run.

        Raises:
            RunFolderError: the disk is full.
        """
        with no_space(self.path, "everything logged before"):
            self._append(TREES, write_tree(self.path, step, record))
            if deleted := thin_trees(self.path, most_bytes):
                rows = [row for row in read_rows(self.path / TREES) if row.get("file") not in deleted]
                write_atomically(self.path / TREES, "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, step: int, write: Callable[[Path], object], *, keep: int = KEPT) -> Path:
        """Save a checkpoint and forget all but the `keep` newest.

        Args:
            write: called with an empty folder to fill.

        Raises:
            RunFolderError: the disk is full; nothing half-written stays behind, older checkpoints do.
        """
        folder = self.path / CHECKPOINTS
        final = folder / f"step-{step:06d}"
        temporary = folder / f".{final.name}{_UNFINISHED}"
        last = latest_checkpoint(self.path)
        kept = "no checkpoint was there before" if last is None else f"{last.path}"
        with no_space(self.path, kept):
            try:
                _remove(temporary)
                temporary.mkdir(parents=True)
                write(temporary)
                _flush_folder(temporary)
                _remove(final)
                temporary.rename(final)
                _flush(folder)
                write_atomically(self.path / LATEST, json.dumps({"step": step, "path": f"{CHECKPOINTS}/{final.name}"}))
            except BaseException:
                _remove(temporary)
                raise
        for old in sorted(folder.glob("step-*"))[:-keep]:
            if old != final:
                _remove(old)
        return final

    def close(self) -> None:
        """Flush the logs and let others open the folder."""
        self._loggers.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        with no_space(self.path, "everything logged before"), (self.path / name).open("a", encoding="utf-8") as file:
            before = file.tell()
            try:
                file.write(line)
                file.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path / name, before)
                raise


def latest_checkpoint(path: Path) -> Checkpoint | None:
    """The last complete checkpoint of a run folder, or None.

    The pointer is a convenience; where it is missing, torn or points nowhere, the folders' names decide.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        pointer = json.loads((path / LATEST).read_text("utf-8"))
        if (path / pointer["path"]).is_dir():
            return Checkpoint(int(pointer["step"]), path / pointer["path"])
    folders = sorted((path / CHECKPOINTS).glob("step-*"))
    return Checkpoint(int(folders[-1].name.removeprefix("step-")), folders[-1]) if folders else None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; a line that is not whole (the run was killed while writing it) is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row


def _take_lock(path: Path) -> IO[str]:
    lock = (path / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFolderError(f"{path} is in use by another run; wait for it, or choose another --out") from None
    return lock


@contextlib.contextmanager
def no_space(path: Path, kept: str) -> Iterator[None]:
    """Turn "disk full", from whatever library, into an error that says what to do."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(phrase in str(error) for phrase in _FULL):
            raise
        raise RunFolderError(
            f"no space left on the disk of {path}; what was being written was removed, kept: {kept}; free some space, "
            f"then continue with --resume {path}"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk and rename it; no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_config(path: Path, config: TrainConfig) -> None:
    write_atomically(path / CONFIG, yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """Containers and paths as YAML knows them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
