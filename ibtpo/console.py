"""Consoles that outlive their pipe or terminal."""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
from collections.abc import Callable
from typing import IO, Any, cast

from rich.console import Console


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Print a text as it is, whatever it holds, and leave where its lines break to the terminal."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Output(Console):
    """A console whose closed pipe (`ibtpo eval | head`) ends only what is said, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True
        _lead_nowhere(sys.stdout.fileno())


class RunConsole(Output):
    """A console whose closed pipe (`ibtpo train | head`) stops the run as SIGTERM does: at a safe point.

    rich would end the process where it stands. A closed terminal ends nothing by itself: the SIGHUP that comes with it
    stops the run, unless the user had it ignored (nohup).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet, file=cast(IO[str], _Stream(sys.stdout)))

    def on_broken_pipe(self) -> None:
        """Say nothing more, and ask for the stop."""
        super().on_broken_pipe()
        signal.raise_signal(signal.SIGTERM)


class _Stream:
    """A stream that says nothing more once its terminal was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or let go of the terminal."""
        return self._attempt(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flush, or let go of the terminal."""
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], int | None]) -> int | None:
        try:
            return act()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            release_closed_terminal()
            return None


def release_closed_terminal() -> None:
    """Where standard output and error go to a terminal that was closed, to write is an error: lead them nowhere."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:  # no terminal at all is ENOTTY
            if error.args[0] == errno.EIO:
                _lead_nowhere(descriptor)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
