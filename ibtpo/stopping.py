"""Stopping on request: Ctrl-C, SIGTERM and a closed terminal end long work at its next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from ibtpo.console import release_closed_terminal


class Interrupted(Exception):
    """The work was asked to stop; `signal` is the number of the signal."""

    def __init__(self, message: str = "stopped", signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 0 after SIGTERM or SIGHUP, 130 after Ctrl-C."""
        return 0 if self.signal in (signal.SIGTERM, signal.SIGHUP) else 130


class StopRequest:
    """A request to stop this process, usually made by a signal.

    Attributes:
        signal: number of the signal; 0 without a request. Set it to stop for another reason.
    """

    def __init__(self) -> None:
        self.signal = 0

    def requested(self) -> bool:
        """Should the work end at its next safe point?"""
        return self.signal != 0

    @contextmanager
    def on_signals(self, console: Console, *, at_once: bool = True) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP as requests to stop until the block ends.

        SIGHUP stays ignored if it was (nohup). Only the main thread can handle signals: in others this does nothing.

        Args:
            console: prints that the work will stop.
            at_once: a second Ctrl-C raises KeyboardInterrupt; otherwise it has no effect.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if self.requested() and number == signal.SIGINT and at_once:
                raise KeyboardInterrupt
            self.signal = number
            if number == signal.SIGHUP:
                release_closed_terminal()
            again = "; Ctrl-C again to stop at once" if at_once else ""
            console.print(f"\nstopping at the next safe point{again}", highlight=False)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        stops = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            stops.append(signal.SIGHUP)
        previous = {number: signal.signal(number, note) for number in stops}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
