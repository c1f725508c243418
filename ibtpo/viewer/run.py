"""A run's data for the page: its logs, read as they grow."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibtpo.config_io import load_yaml, to_yaml
from ibtpo.report import Summary, Tally, describe_run
from ibtpo.run_format import CONFIG, check_run
from ibtpo.runlog import METRICS, TREES
from ibtpo.treelog import FILE, FOLDER

Row = dict[str, Any]
_LONGEST_COUNT = 20  # digits
_MOST_POINTS = 2000  # of a metric of the training steps, or of the evaluations, on the page
_TAIL = 4096  # bytes before the offset that are compared


class GrowingLog:
    """The rows of a JSONL file to which another process appends.

    ::

        [0, offset)      whole lines, in `rows`
        [offset, size)   the beginning of a line that is being written

    A file that was replaced or truncated (a resumed run drops the rows after its checkpoint) is read again, and the
    rows of a deleted file are dropped; `generation` counts these events, so that a page knows that its copy is stale. A
    new file may have the inode of the old one, so the last bytes before `offset` are compared, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.generation = 0
        self._file: tuple[int, int] | None = None  # (device, inode)
        self._offset = 0
        self._tail = b""  # [offset - len(tail), offset)

    def refresh(self) -> None:
        """Read the lines added since the last call."""
        try:
            with self.path.open("rb") as file:
                number = _number(file.fileno())
                file.seek(self._offset - len(self._tail))
                if number != self._file or file.read(len(self._tail)) != self._tail:
                    self._begin(number)
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._tail = (self._tail + line)[-_TAIL:]
                    if (row := _row(line)) is not None:
                        self.rows.append(row)
        except FileNotFoundError:
            if self._file is not None:
                self._begin(None)

    def _begin(self, number: tuple[int, int] | None) -> None:
        self.rows, self._offset, self._tail, self._file = [], 0, b"", number
        self.generation += 1

    def since(self, cursor: str) -> tuple[list[Row], bool, str]:
        """(rows after `cursor`, must the reader drop its rows, the next cursor)."""
        generation, _, count = cursor.partition(".")
        known = generation == str(self.generation) and count.isdecimal() and len(count) < _LONGEST_COUNT
        return self.rows[int(count) if known else 0 :], not known, f"{self.generation}.{len(self.rows)}"


def _number(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(
            line,
            parse_constant=lambda name: None,  # NaN and Infinity are not JSON
            object_pairs_hook=lambda pairs: {sys.intern(name): value for name, value in pairs},  # a name is held once
        )
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class RunView:
    """One run folder for the page. Safe to use from several threads.

    Raises:
        ValueError: the path is not a run folder, or has a newer format.
    """

    def __init__(self, path: Path) -> None:
        check_run(path, "view")
        self.path = path
        self.name = path.resolve().name
        self._metrics = GrowingLog(path / METRICS)
        self._trees = GrowingLog(path / TREES)
        self._tally = Tally()
        self._tallied = ""  # cursor into the metrics
        self._lock = threading.Lock()

    def poll(self, metrics: str = "", trees: str = "") -> dict[str, Any]:
        """Rows added since the cursors of the last answer; without cursors, everything."""
        with self._lock:
            self._metrics.refresh()
            self._trees.refresh()
            rows, reset, cursor = self._metrics.since(metrics)
            grown, tree_reset, tree_cursor = self._trees.since(trees)
            answer: dict[str, Any] = {
                "age": self._age(),
                "metrics": {"cursor": cursor, "reset": reset, **curves(rows)},
                "trees": {"cursor": tree_cursor, "reset": tree_reset, "rows": [r for r in grown if _has_file(r)]},
            }
            if rows or reset:
                answer["summary"] = asdict(self._summary())
            if reset:  # the folder may hold another run now
                answer |= self._description()
                if (every := _bin_size(_training_rows(rows))) > 1:
                    answer["facts"] = [*answer["facts"], f"curves: lowest, highest and mean of every {every} steps"]
            return answer

    def trees(self) -> list[Row]:
        """The index rows of the trees whose files exist."""
        with self._lock:
            self._trees.refresh()
            return [row for row in self._trees.rows if _has_file(row) and (self.path / FOLDER / row["file"]).is_file()]

    def tree(self, name: str) -> bytes | None:
        """A tree's file (gzipped JSON), or None if there is none of that name; a live run may delete some."""
        if not FILE.fullmatch(name):
            return None
        try:
            return (self.path / FOLDER / name).read_bytes()
        except OSError:
            return None

    def _summary(self) -> Summary:
        """The result so far; looks at the rows that are new since the last call."""
        rows, reset, self._tallied = self._metrics.since(self._tallied)
        self._tally = Tally() if reset else self._tally
        for row in rows:
            self._tally.add(row)
        return self._tally.summary()

    def _description(self) -> dict[str, Any]:
        try:
            config = load_yaml(self.path / CONFIG)
        except (OSError, ValueError):
            config = {}
        search = config.get("search")
        return {
            "name": self.name,
            "facts": describe_run(config),
            "config": to_yaml(config),
            "budget": config.get("sampled_tokens"),
            "guided": isinstance(search, dict) and search.get("method") == "ibtree",
        }

    def _age(self) -> float | None:
        """Seconds since the run last wrote a metric."""
        try:
            return max(time.time() - (self.path / METRICS).stat().st_mtime, 0.0)
        except FileNotFoundError:
            return None


def open_views(runs: Sequence[Path]) -> list[RunView]:
    """The views of several runs; folders with the same name are prefixed with that of their parent folder.

    Raises:
        ValueError: a path is not a run folder.
    """
    views = [RunView(run) for run in runs]
    if len({view.name for view in views}) < len(views):
        for view in views:
            view.name = "/".join(view.path.resolve().parts[-2:])
    return views


def _has_file(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("file"), str) and FILE.fullmatch(row["file"]) is not None


def curves(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows by column, of long runs only each bin's extremes and means, so that a page's size has a bound.

    Evaluations are thinned apart from training steps. Each bin becomes two rows, at its first and last step, with the
    lowest and highest value of each metric in the order in which they occurred. Besides `columns` there are then
    ``means``, which the page smooths instead of the extremes, and ``sampled``, the tokens sampled for each row.
    """
    training = _training_rows(rows)
    if _bin_size(training) == 1:
        return columns(rows)
    evaluations = [row for row in rows if "eval_avg" in row]
    points = [point for part in (training, evaluations) for point in _thin(part)]
    points.sort(key=lambda point: point[0]["step"])  # stable: an evaluation comes after its step
    shown, means, sampled = zip(*points, strict=True)
    return {**columns(shown), "means": columns(means)["values"], "sampled": sampled}


def _training_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "eval_avg" not in row]


def _bin_size(rows: Sequence[Row]) -> int:
    """Number of rows in a bin; 1 if there are not too many."""
    return 1 if len(rows) <= _MOST_POINTS else math.ceil(2 * len(rows) / _MOST_POINTS)


def _thin(rows: Sequence[Row]) -> Iterator[tuple[Row, Row, float]]:
    """(extremes, means, tokens sampled) of each row that is shown."""
    size = _bin_size(rows)
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        if len(part) == 1:
            yield part[0], part[0], _sampled(part)
            continue
        first, last, mean = {"step": part[0]["step"]}, {"step": part[-1]["step"]}, {"step": part[0]["step"]}
        for name in dict.fromkeys(name for row in part for name in row if name != "step"):
            if values := [value for row in part if (value := _short(row.get(name))) is not None]:
                low, high = min(values), max(values)
                rising = values.index(low) <= values.index(high)
                first[name], last[name] = (low, high) if rising else (high, low)
                mean[name] = math.fsum(values) / len(values)
        yield first, mean, _sampled(part[:1])
        yield last, mean, _sampled(part[1:])


def _sampled(rows: Sequence[Row]) -> float:
    return sum(_short(row.get("tokens_sampled")) or 0.0 for row in rows)


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows in the smaller form by column: ``{"steps": [...], "values": {name: [value or None, ...]}}``."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "steps": [row["step"] for row in rows],
        "values": {name: [_short(row.get(name)) for row in rows] for name in names},
    }


def _short(value: Any) -> float | None:
    """A value rounded to seven digits, more than a plot can show."""
    return float(f"{value:.7g}") if isinstance(value, int | float) and math.isfinite(value) else None
