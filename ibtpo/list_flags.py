"""Repeated flags with several values."""

from __future__ import annotations

from collections.abc import Sequence

LIST_FLAGS = ("--reward", "--jsonl.data-fields", "--jsonl.chat-template-options")


def join_repeated(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--reward a --reward b`` as ``--reward a b``: the parser would keep only the last one."""
    found: dict[str, list[str]] = {}
    others: list[str] = []
    current: list[str] | None = None  # values of the list flag that the next words belong to
    for word in arguments:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in LIST_FLAGS:
            current = found.setdefault(name, [])
            current += [value] if equals else []
        elif current is not None and not word.startswith("-"):
            current.append(word)
        else:
            current = None
            others.append(word)
    return others + [word for name, values in found.items() for word in (name, *values)]
