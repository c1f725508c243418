"""Triton's interpreter in half the time.

Whenever a function is called it looks through all of `triton.language` for what to replace, which takes longer than
most of what it interprets. Imported by `conftest.py` under TRITON_INTERPRET=1, this lets it look once; results are
the same.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def _builtins(place: ModuleType | type) -> list[tuple[str, Any]]:
    """(name, function) of what the interpreter replaces in a module or class; asked before it first does."""
    return [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _patch_builtin(place: ModuleType | type, *how: Any) -> None:
    found = _builtins(place)
    if found and getattr(place, found[0][0]) is found[0][1]:  # otherwise all are replaced: a function called by another
        for name, member in found:
            interpreter._patch_attr(place, name, member, *how)


interpreter._patch_builtin = _patch_builtin
