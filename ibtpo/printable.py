"""Text of which nobody knows what it holds, for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with what cannot be seen, or would command the terminal, spelled out: ESC as ``\x1b``. Lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; where it says nothing, its type."""
    return " ".join(str(error).split()) or type(error).__name__
