"""Progress of long work: a bar with the latest figures on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ibtpo.process_memory import peak_host_memory

SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    """A progress bar with a line of figures below it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the figures, if there are any yet."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(f"  {self.note}", style="dim", no_wrap=True, overflow="ellipsis")


class Tracker:
    """One piece of work in progress; `advance` moves it on."""

    def __init__(self, console: Console, description: str, total: int, bar: _Bar | None) -> None:
        self._console = console
        self._description = description
        self.total = total  # may change during the work
        self._done = self._first = 0
        self._bar = bar
        self._task = None if bar is None else bar.add_task(description, total=total)
        self._begin = self._last_line = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        """Move on by `amount` and show `note`; earlier progress of a resumed run has no note."""
        self._done += amount
        if not note and self._done == amount:
            self._first = amount
        if self._bar is not None and self._task is not None:
            self._bar.note = note
            self._bar.update(self._task, completed=min(self._done, self.total), total=self.total)
            self._bar.refresh()
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or self._done >= self.total:
            self._last_line = time.monotonic()
            share = min(self._done / self.total, 1.0) if self.total else 1.0
            parts = [note, self._time_left()]
            line = "  ".join(part for part in parts if part)
            self._console.print(f"{self._description}: {share:4.0%}  {line}", highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        done = self._done - self._first
        if done <= 0 or self._done >= self.total:
            return ""
        return f"{duration((time.monotonic() - self._begin) * (self.total - self._done) / done)} left"


@contextmanager
def track(console: Console, description: str, total: int) -> Iterator[Tracker]:
    """Show the progress of work of size `total` while the block runs."""
    if not console.is_terminal or console.quiet:
        yield Tracker(console, description, total, None)
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]left"),
    )
    with _Bar(*columns, console=console) as bar:
        yield Tracker(console, description, total, bar)


def step_note(step: int, values: Mapping[str, float]) -> str:
    """The figures of a training step on one line: reward (independent rollouts), Eff-Rate, speed, memory."""
    parts = [f"step {step}"]
    shown = (
        ("avg_rate_iid", "reward (iid) {:.3f}"),
        ("eff_rate", "eff-rate {:.2f}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
    )
    parts += [text.format(values[name]) for name, text in shown if name in values]
    parts.append(f"{(values.get('peak_memory') or peak_host_memory()) / 2**30:.1f} GiB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time for reading: 42 s, 3:05, 2:10:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
