"""The folder of an evaluation, from which an interrupted evaluation continues.

::

    ibtpo.json           its format, see ibtpo/run_format.py
    settings.json        all settings that decide the results; an evaluation with others is rejected
    completions.jsonl    a line a completion, appended as they arrive, in any order
    summary.json         written at the end, from these completions
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from ibtpo.disk import AGAIN, check_link, no_space, unfinished, write_atomically
from ibtpo.evaluation.evaluate import Evaluation
from ibtpo.evaluation.sampling import Completion
from ibtpo.run_format import FORMAT_FILE, check_format, is_run, write_format

SETTINGS, COMPLETIONS, SUMMARY = "settings.json", "completions.jsonl", "summary.json"


class EvaluationFolder:
    """An evaluation's folder, locked while it is open; use as a context manager.

    Args:
        path: of the folder, created if it does not exist.
        settings: everything that decides the results, by name.
        evaluation: the completions of earlier processes are added to it.

    Raises:
        ValueError: the folder holds a run, other files, or an evaluation with other settings or a newer format; another
            process uses it, or it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], evaluation: Evaluation) -> None:
        self.path = path
        self._check_free()
        try:
            with no_space(path, "nothing", AGAIN):
                path.mkdir(parents=True, exist_ok=True)
                self._file = (path / COMPLETIONS).open("a+b")
        except OSError as error:
            raise ValueError(f"out: {path} cannot be written ({error.strerror}); choose another --out") from error
        try:
            self._lock(self._file)
            check_format(path)
            self._check_settings(json.loads(json.dumps(settings)))
            self._read(evaluation)
        except BaseException:
            self._file.close()
            raise

    def add(self, completion: Completion, where: str | None = None) -> None:
        """Append a completion; after this returns it survives if the process is killed."""
        row = completion._asdict() | ({} if where is None else {"where": where})
        with no_space(self.path, "all completions before", AGAIN):
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        with no_space(self.path, "all completions", AGAIN):
            write_atomically(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # the disk is full: an earlier write has raised that
            self._file.close()

    def _check_free(self) -> None:
        check_link(self.path)
        if not self.path.exists() or (self.path / SETTINGS).is_file():
            return
        if not self.path.is_dir():
            raise ValueError(f"out: {self.path} is a file; choose another folder with --out")
        if is_run(self.path):
            raise ValueError(f"out: {self.path} is a run folder; choose another, such as {self.path / 'eval'}")
        begun = {COMPLETIONS, FORMAT_FILE, *(unfinished(Path(name)).name for name in (SETTINGS, FORMAT_FILE))}
        if {entry.name for entry in self.path.iterdir()} - begun:
            raise ValueError(f"out: {self.path} already holds other files; choose another folder with --out")

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system when the process ends
        except BlockingIOError:
            message = f"out: {self.path} is in use by another evaluation; wait for it, or choose another --out"
            raise ValueError(message) from None

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path / SETTINGS
        if not path.is_file():
            with no_space(self.path, "nothing", AGAIN):
                write_format(self.path)
                write_atomically(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise ValueError(f"out: {path} cannot be read; choose another folder with --out") from None
        changed = [
            f"{name} was {before.get(name, 'not there')!r}, is {settings.get(name, 'not there')!r}"
            for name in dict.fromkeys([*before, *settings])
            if name != "model" and before.get(name) != settings.get(name)  # a model may have moved; its weights count
        ]
        if changed:
            raise ValueError(
                f"out: {self.path} holds another evaluation ({'; '.join(changed)}); give the same settings to "
                "continue it, or choose another folder with --out"
            )

    def _read(self, evaluation: Evaluation) -> None:
        """Add the completions, and truncate a last line that is incomplete, written by a killed process."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line)
                evaluation.add(Completion(**{name: row[name] for name in Completion._fields}))
            except (ValueError, LookupError, TypeError):
                where = f"{self.path / COMPLETIONS}, line {number}"
                raise ValueError(f"{where}: not a completion; remove the line, it is then sampled again") from None
        os.truncate(self.path / COMPLETIONS, end)
