"""Which implementation runs an op: chosen by device, or by the caller with `backend`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ibtpo_kernels import cpu, reference

BACKENDS = ("reference", "cpu", "triton", "flashinfer")
_REMEDY = "install ibtpo with a C++17 compiler at hand (make setup)"

_SERVED = (torch.float32, torch.int32)  # what `_cpu` computes: activations, and the page tables of plan_decode

_chosen: ContextVar[str | None] = ContextVar("ibtpo_backend", default=None)


def has_compiled() -> bool:
    """Whether the compiled CPU kernels are there."""
    return cpu.native is not None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops called inside on one backend; nestable, and private to the thread or task.

    A backend serves the dtypes and ops it has kernels for (cpu: float32); the rest goes to "reference".

    Raises:
        ValueError: `name` is unknown, or not available here; the message says what is missing.
    """
    _require(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if name == "cpu" and not has_compiled():
        raise ValueError(f"backend 'cpu': the compiled module is missing; {_REMEDY}")
    if name in ("triton", "flashinfer"):
        raise ValueError(
            f"backend {name!r}: this release has no GPU kernels; use 'reference', which runs on any device"
        )


def active_backend(device: torch.device | str) -> str:
    """The backend that ops on `device` run on now: the one chosen with `backend`, else the device's default."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return "cpu" if torch.device(device).type == "cpu" and has_compiled() else "reference"


@cache
def _say_missing() -> None:
    warnings.warn(
        f"ibtpo_kernels: compiled CPU kernels are missing, plain torch is used instead (slower); {_REMEDY}",
        RuntimeWarning,
        stacklevel=4,
    )


def implementation(x: Tensor) -> ModuleType:
    """The module whose functions run ops on `x`; asked on every decode step, so nothing here allocates."""
    chosen = _chosen.get()
    if x.is_cpu and chosen != "reference":
        if cpu.native is None:
            _say_missing()
        elif x.dtype in _SERVED:
            return cpu
    elif chosen == "cpu" and not x.is_cpu:
        raise ValueError(
            f"backend 'cpu' was given a tensor on {x.device}; move it to the CPU or leave the backend block"
        )
    return reference
