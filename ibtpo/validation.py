"""Checks of settings, which raise ValueError with field, value and allowed values; suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

_limits: ContextVar[dict[str, str] | None] = ContextVar("ibtpo_limits", default=None)


@contextmanager
def noting_limits() -> Iterator[dict[str, str]]:
    """Record the values that each check in the block allows, by field, to generate documentation from the checks."""
    noted: dict[str, str] = {}
    token = _limits.set(noted)
    try:
        yield noted
    finally:
        _limits.reset(token)


def _note(name: str, allowed: str) -> None:
    if (noted := _limits.get()) is not None:
        noted[name] = allowed


def check_range(
    name: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise unless `value` lies in the interval (an open end excludes its bound)."""
    left = "(-inf" if low is None else f"{'(' if low_open else '['}{low}"
    right = "inf)" if high is None else f"{high}{')' if high_open else ']'}"
    _note(name, f"{left}, {right}")
    too_low = low is not None and (value <= low if low_open else value < low)
    too_high = high is not None and (value >= high if high_open else value > high)
    if too_low or too_high or value != value:
        raise ValueError(f"{name}: {value} lies outside {left}, {right}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    _note(name, ", ".join(choice or '""' for choice in choices))
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")


def as_path(text: str, name: str = "") -> Path:
    """A path; "" is none: so arrives an unset variable of a shell, and pathlib would take it for ".".

    Args:
        text: the path.
        name: the field, for the message; "" where the caller names it.

    Raises:
        ValueError: it is empty or blank.
    """
    if not text.strip():
        named = f"{name}: " if name else ""
        raise ValueError(f"{named}{text!r} is no path; name one, or leave it out (is a variable of the shell unset?)")
    return Path(text)


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


def check_choices(settings: object, section: str = "") -> None:
    """Raise unless every field whose type is a `Literal` holds one of its values; `section` precedes its name."""
    kind: type = type(settings)
    for name, choices in _choices(kind).items():
        check_choice(f"{section}{name}", getattr(settings, name), choices)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question that suggests the nearest known name, with a space after it; "" if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{nearest[0]}"? ' if nearest else ""


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, and all of them if they are few."""
    shown = ", ".join(known) if len(known) <= 12 else f"{len(known)} names, from {known[0]} to {known[-1]}"
    return f"{did_you_mean(name, known)}known: {shown}"
