"""Texts for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape invisible characters and terminal controls, such as ESC to ``\x1b``; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
