"""Progress on long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Tracker:
    """One piece of work under way; `advance` moves it on."""

    def __init__(self, console: Console, description: str, total: int, bar: Progress | None) -> None:
        self._console = console
        self._description = description
        self.total = total  # may change on the way
        self._done = 0
        self._bar = bar
        self._task = None if bar is None else bar.add_task(description, total=total, note="")
        self._last_line = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        """Move on by `amount`; `note` is shown beside it."""
        self._done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(self._done, self.total), total=self.total, note=note)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or self._done >= self.total:
            self._last_line = time.monotonic()
            share = min(self._done / self.total, 1.0)
            self._console.print(f"{self._description}: {share:4.0%}  {note}", highlight=False)


@contextmanager
def track(console: Console, description: str, total: int) -> Iterator[Tracker]:
    """Show the progress of work of size `total` while the block runs."""
    if not console.is_terminal:
        yield Tracker(console, description, total, None)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Tracker(console, description, total, bar)
