"""Consoles that survive the closing of their pipe or terminal."""

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
    """Print a text literally, without markup, and leave line breaks to the terminal."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Output(Console):
    """A console that falls silent if its pipe is closed (`ibtpo eval | head`); rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True
        _lead_nowhere(sys.stdout.fileno())


class RunConsole(Output):
    """A console that stops the run at a safe point, as SIGTERM does, if its pipe is closed (`ibtpo train | head`).

    rich would end the process at once. Output to a closed terminal is dropped; the SIGHUP sent with the closing stops
    the run, unless it is ignored (nohup).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet, file=cast(IO[str], _Stream(sys.stdout)))

    def on_broken_pipe(self) -> None:
        """Print nothing more, and request the stop."""
        super().on_broken_pipe()
        signal.raise_signal(signal.SIGTERM)


class _Stream:
    """A stream that drops its output once its terminal has been closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or release a closed terminal."""
        return self._attempt(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flush, or release a closed terminal."""
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
    """Redirect standard output and error to /dev/null if they go to a closed terminal, where writing fails."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:  # ENOTTY: not a terminal
            if error.args[0] == errno.EIO:
                _lead_nowhere(descriptor)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
