"""Stopping when told to: Ctrl-C, SIGTERM and a closed terminal end long work at its next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from ibtpo.console import release_closed_terminal


class Interrupted(Exception):
    """The user asked to stop; `signal` is the number of the signal that did."""

    def __init__(self, message: str = "stopped", signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """What the process ends with: 0 where the system stopped it, 130 after Ctrl-C."""
        return 0 if self.signal in (signal.SIGTERM, signal.SIGHUP) else 130


class StopRequest:
    """Has this process been told to stop, and by what?

    Attributes:
        signal: number of the signal that said so; 0 before one did. Set it to stop for another reason.
    """

    def __init__(self) -> None:
        self.signal = 0

    def requested(self) -> bool:
        """Shall the work end at its next safe point?"""
        return self.signal != 0

    @contextmanager
    def on_signals(self, console: Console, *, at_once: bool = True) -> Iterator[None]:
        """Note SIGINT, SIGTERM and SIGHUP until the block ends, instead of dying of them.

        SIGHUP stays ignored where it was (nohup). Signals are the main thread's: elsewhere nothing is noted.

        Args:
            console: told that the work will stop.
            at_once: a second Ctrl-C raises KeyboardInterrupt; without, it changes nothing.
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
