"""A run's folder: configuration, metrics, trees and checkpoints.

::

    config.yaml       the configuration as resolved
    ibtpo.json        the format of the folder (ibtpo/run_format.py)
    environment.json  versions and command line of every start (ibtpo/environment.py)
    metrics.jsonl     one JSON object a line for each training step and evaluation, names as in ibtpo/metrics.py
    trees.jsonl       a line for each grown tree that is kept; trees/ holds them (ibtpo/treelog.py)
    events.out.*      the same metrics for TensorBoard
    checkpoints/      step-000010/ ...    see ibtpo/checkpoints.py
    report.html       made from the above
    .run-id           identifies the run to wandb and trackio (ibtpo/loggers.py)

However a run is interrupted, a checkpoint that has its final name is complete, and on resume the logs are cut back to
their rows up to the checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from ibtpo.checkpoints import CHECKPOINTS, Checkpoint, checkpoints, intact_checkpoint, write_checkpoint
from ibtpo.config import SafeguardConfig, TrainConfig
from ibtpo.config_io import dump_yaml, plain
from ibtpo.disk import AGAIN, RunFolderError, check_link, flush, no_space, sweep, unfinished, write_atomically
from ibtpo.loggers import open_loggers, parse_names
from ibtpo.metrics import check_names
from ibtpo.run_format import CONFIG, FORMAT_FILE, check_run, is_run, write_format
from ibtpo.treelog import FOLDER as TREE_FOLDER
from ibtpo.treelog import thin_trees, tree_bytes, write_tree

METRICS, TREES = "metrics.jsonl", "trees.jsonl"
REPORT = "report.html"
_LOCK = ".lock"


class RunFolder:
    """The folder of one run, locked while it is open. Use `create` or `open`, as a context manager.

    Attributes:
        path: of the folder.
        last: the checkpoint the run resumes from, or None.
        evaluations: the rows of the log that have accuracies.
    """

    def __init__(
        self,
        path: Path,
        lock: IO[str],
        last: Checkpoint | None,
        purge_step: int | None,
        config: TrainConfig | None = None,
    ) -> None:
        self.path = path
        self.last = last
        self.evaluations = list(read_rows(path / METRICS, "eval_avg"))
        self._lock = lock
        self._tree_bytes = tree_bytes(path)  # an estimate; recounted whenever trees are thinned
        names, settings = ([], {}) if config is None else (parse_names(config.log), plain(asdict(config)))
        self._loggers = open_loggers(path, names, settings, purge_step)

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Self:
        """Make the folder of a new run.

        Raises:
            RunFolderError: it already holds files, is not a folder, another run uses it, or the disk is full.
        """
        check_free(path)
        try:
            with no_space(path, "nothing", AGAIN):
                path.mkdir(parents=True, exist_ok=True)
                lock = _take_lock(path, "choose another folder with --out")
        except OSError as error:
            raise RunFolderError(f"out: {path} cannot be created ({error.strerror}); choose another --out") from error
        try:
            with no_space(path, "nothing", AGAIN):
                sweep(path)
                (path / CHECKPOINTS).mkdir(exist_ok=True)
                _write_config(path, config)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            lock.close()
            raise
        return cls(path, lock, None, None, config)

    @classmethod
    def open(
        cls,
        path: Path,
        config: TrainConfig | None = None,
        *,
        step: int | None = None,
        say: Callable[[str], object] = print,
    ) -> Self:
        """Resume a run; rows logged after `step` (default: that of its last intact checkpoint) are dropped.

        A run that was killed before its first checkpoint starts over, and all its rows are dropped.

        Args:
            config: names the loggers; written by `configure`.
            say: called with a message about each damaged checkpoint.

        Raises:
            RunFolderError: it is not a run folder or has a newer format, another run uses it, it cannot be written,
                every checkpoint is damaged, or steps were logged but there is no checkpoint.
        """
        check_run(path, "resume")
        try:
            lock = _take_lock(path, "wait until it has ended, or stop it with Ctrl-C, then resume again")
        except OSError as error:
            raise RunFolderError(
                f"resume: {path} cannot be written ({error.strerror}); make it writable, or resume a copy that is"
            ) from error
        try:
            for folder in (path, path / CHECKPOINTS, path / TREE_FOLDER, *(c.path for c in checkpoints(path))):
                sweep(folder)
            last = intact_checkpoint(path, say)
            last_step = _last_step(path, last) if step is None else step
            with no_space(path, "everything"):
                for name in (METRICS, TREES):
                    _keep_rows(path / name, lambda row: row["step"] <= last_step)
            return cls(path, lock, last, max(last_step, 0) + 1, config)
        except BaseException:
            lock.close()
            raise

    def configure(self, config: TrainConfig) -> None:
        """Write the configuration the run continues with."""
        with no_space(self.path, "everything"):
            _write_config(self.path, config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a training step; several rows may share a step (an evaluation has its own).

        Infinite and NaN values are written as null.

        Raises:
            ValueError: a name is not in `ibtpo.metrics.METRICS`.
            RunFolderError: the disk is full.
        """
        check_names(values)
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        row = {"step": step, **finite}
        self._append(METRICS, row)
        if "eval_avg" in row:
            self.evaluations.append(row)
        self._loggers.log(step, finite)

    def add_tree(self, step: int, record: Mapping[str, Any], *, most_bytes: float = math.inf) -> None:
        """Keep a grown tree (a `tree_record`); beyond `most_bytes` in total, those of some steps are deleted.

        Raises:
            RunFolderError: the disk is full.
        """
        with no_space(self.path, "everything logged before"):
            row = write_tree(self.path, step, record)
            self._append(TREES, row)
            self._tree_bytes += (self.path / TREE_FOLDER / row["file"]).stat().st_size
            if self._tree_bytes > most_bytes:
                self._thin_trees(most_bytes)

    def checkpoint(
        self, step: int, write: Callable[[Path], object], *, keep: int = SafeguardConfig.keep_checkpoints
    ) -> Path:
        """Flush the logs, save a checkpoint, and delete all but the `keep` newest.

        Args:
            write: called with an empty folder to fill.

        Raises:
            RunFolderError: the disk is full; the partial checkpoint is removed, older ones are kept.
        """
        for name in (METRICS, TREES):
            if (self.path / name).exists():
                flush(self.path / name)
        return write_checkpoint(self.path, step, write, keep=keep)

    def close(self) -> None:
        """Flush the logs and unlock the folder."""
        try:
            with contextlib.suppress(OSError):  # the disk is full: an earlier write has raised that
                self._loggers.close()
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _thin_trees(self, most_bytes: float) -> None:
        """Delete trees and their lines in the index; rarely needed, since each time a tenth of the space is freed."""
        if deleted := thin_trees(self.path, most_bytes, 0.9 * most_bytes):
            _keep_rows(self.path / TREES, lambda row: row.get("file") not in deleted)
        self._tree_bytes = tree_bytes(self.path)

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


def read_rows(path: Path, having: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a log, or those with the key `having`; incomplete lines of a killed run are skipped."""
    if not path.exists():
        return
    sought = b"" if having is None else json.dumps(having).encode()
    with path.open("rb") as file:
        for line in filter(lambda line: sought in line, file):  # parsing takes over ten times as long as searching
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row


def check_free(path: Path) -> None:
    """Check that a new run may begin here.

    Raises:
        RunFolderError: it is a file or a link to nothing, or holds more than leftovers of a run killed before it wrote
            its configuration.
    """
    check_link(path)
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"out: {path} is a file; choose another folder with --out")
    if path.is_dir() and not _is_free(path):
        resume = f", or continue the run with --resume {path}" if is_run(path) else ""
        raise RunFolderError(f"out: {path} already holds files; choose another folder with --out{resume}")


def _is_free(path: Path) -> bool:
    leftovers = {_LOCK, CHECKPOINTS, FORMAT_FILE, *(unfinished(path / name).name for name in (FORMAT_FILE, CONFIG))}
    names = {entry.name for entry in path.iterdir()}
    return names <= leftovers and not (CHECKPOINTS in names and any((path / CHECKPOINTS).iterdir()))


def _last_step(path: Path, last: Checkpoint | None) -> int:
    """The step that a run resumes from; -1 if it was killed before its first checkpoint.

    Raises:
        RunFolderError: it has logged steps but has no checkpoint; dropping its log would lose them.
    """
    if last is not None:
        return last.step
    if steps := max((row["step"] for row in read_rows(path / METRICS)), default=0):
        raise RunFolderError(
            f"resume: {path} has logged {steps} steps, but there is no checkpoint in {path / CHECKPOINTS}; restore "
            "one from a copy, or begin a new run with --out"
        )
    return -1


def _keep_rows(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a log, if there is one, with only the complete rows for which `is_kept` holds."""
    if path.exists():
        write_atomically(path, (json.dumps(row) + "\n" for row in read_rows(path) if is_kept(row)))


def _take_lock(path: Path, remedy: str) -> IO[str]:
    """Lock a run folder; the system releases the lock when the process ends.

    Raises:
        RunFolderError: another process holds it.
        OSError: the folder cannot be written.
    """
    lock = (path / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFolderError(f"{path} is in use by another run; {remedy}") from None
    return lock


def _write_config(path: Path, config: TrainConfig) -> None:
    write_format(path)  # before the configuration, whose presence makes the folder a run
    write_atomically(path / CONFIG, dump_yaml(config))
