"""Importing packages that may not be installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from ibtpo_kernels.roofline.problem import Unavailable


def module(name: str, distribution: str) -> Any:
    """The module `name`; Unavailable if it, or what it needs, cannot be imported."""
    if find_spec(name.partition(".")[0]) is None:
        raise Unavailable(f"{distribution} is not installed")
    try:
        return import_module(name)
    except Exception as error:  # a peer's import may raise anything; it is reported
        raise Unavailable(f"{distribution} does not import: {type(error).__name__}: {error}") from error


def bare_packages(*names: str, distribution: str) -> None:
    """Make packages importable without running their `__init__`, which may need more than their kernels do.

    A package already imported is not changed.
    """
    root = find_spec(names[0])
    if root is None or root.submodule_search_locations is None:
        raise Unavailable(f"{distribution} is not installed")
    for name in names:
        if name not in sys.modules:
            tail = name.split(".")[1:]
            package = ModuleType(name)
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = ["/".join((x, *tail)) for x in root.submodule_search_locations]
            package.__spec__, package.__path__ = spec, spec.submodule_search_locations
            sys.modules[name] = package


def needs_cuda(what: str) -> None:
    """Raise Unavailable if there is no CUDA device."""
    if not torch.cuda.is_available():
        raise Unavailable(f"{what} runs on CUDA only")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile; drops code for other shapes, since torch keeps only a limited number."""
    torch.compiler.reset()
    fast: Callable[..., Any] = torch.compile(function, dynamic=False)
    return fast
