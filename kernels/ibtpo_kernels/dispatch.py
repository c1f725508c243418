"""The choice of the implementation that runs an op: by device, or by the caller with `backend`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ibtpo_kernels import cpu, reference
from ibtpo_kernels.gradients import forward_mode

BACKENDS = ("reference", "cpu", "triton", "flashinfer")
_REMEDY = "install a C++17 compiler, then ibtpo again (make setup)"
_INTERPRET = "set TRITON_INTERPRET=1 before Python starts to run on the CPU, slowly"

_SERVED = (torch.float32, torch.bfloat16, torch.int32)  # by "cpu": activations, and the page tables of plan_decode
_SERVED_BY_TRITON = (torch.bfloat16, torch.float32, torch.float16, torch.int32)

_chosen: ContextVar[str | None] = ContextVar("ibtpo_backend", default=None)


def has_compiled() -> bool:
    """Whether the compiled CPU kernels are there."""
    return cpu.native is not None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops called inside on one backend; nestable, and private to the thread or task.

    A backend serves the dtypes it has kernels for (cpu: float32, bfloat16; triton: these and float16); the rest goes to
    "reference". "flashinfer" has `tree_decode` in float16 and bfloat16; the rest goes to "triton".

    Raises:
        ValueError: `name` is unknown, or not available here; the message says what is missing.
    """
    _require(name)
    with _choice(name):
        yield


@contextmanager
def _choice(name: str | None) -> Iterator[None]:
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def same_choice() -> AbstractContextManager[None]:
    """A context in which ops run on the backend chosen here, whenever and in whatever thread it is entered.

    For recomputation in a backward pass, which runs in a thread of its own for tensors on a GPU.
    """
    return _choice(_chosen.get())


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if name == "cpu" and not has_compiled():
        raise ValueError(f"backend 'cpu': the compiled module is missing; {_REMEDY}")
    if name == "triton":
        if triton_kernels() is None:
            raise ValueError("backend 'triton': Triton is missing; install ibtpo[gpu] (Linux), or use 'reference'")
        if not torch.cuda.is_available() and not _interprets():
            raise ValueError(f"backend 'triton': there is no CUDA device; {_INTERPRET}, or use 'reference'")
    if name == "flashinfer":
        if find_spec("flashinfer") is None:
            raise ValueError("backend 'flashinfer': FlashInfer is missing; install ibtpo[gpu] (Linux), or use 'triton'")
        if not torch.cuda.is_available():
            raise ValueError("backend 'flashinfer': there is no CUDA device, and it runs on no other; use 'reference'")


@cache
def triton_kernels() -> ModuleType | None:
    """The Triton kernels, imported at first use; None if Triton is not installed."""
    try:
        import_module("triton")
    except ImportError:
        return None
    return import_module("ibtpo_kernels.gpu")


@cache
def _too_old(device: torch.device) -> bool:
    """Whether this GPU is too old for the Triton kernels: before sm_80."""
    return torch.cuda.get_device_capability(device) < (8, 0)


@cache
def _interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return bool(import_module("triton").knobs.runtime.interpret)


def active_backend(device: torch.device | str) -> str:
    """The backend that ops on `device` run on now: the one chosen with `backend`, else the device's default."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    device = torch.device(device)
    if device.type == "cuda" and triton_kernels() is not None and not _too_old(device):
        return "triton"
    return "cpu" if device.type == "cpu" and has_compiled() else "reference"


def direct() -> cpu.DirectOps | None:
    """The compiled ops that take tensors, if ops on the CPU run on "cpu"; else None.

    They return None, having written nothing, for a call that they do not serve: it then goes through `checks` and
    `implementation`, which serve it or raise an error.
    """
    chosen = _chosen.get()
    return cpu.direct if chosen is None or chosen == "cpu" else None


def direct_forward() -> cpu.DirectOps | None:
    """As `direct`, for an op with a gradient: None if one may be needed, or torch.compile is tracing."""
    return None if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_mode() else direct()


@cache
def _say_missing(kernels: str, remedy: str) -> None:
    warnings.warn(
        f"ibtpo_kernels: {kernels} are missing, plain torch is used instead (slower); {remedy}",
        RuntimeWarning,
        stacklevel=4,
    )


def implementation(x: Tensor, also: tuple[torch.dtype, ...] = ()) -> ModuleType:
    """The module whose functions run ops on `x`; called in every decode step, so nothing here allocates.

    `also`: dtypes that this op serves on the CPU besides those that every op serves.
    """
    chosen = _chosen.get()
    if chosen == "reference":
        return reference
    if chosen == "triton" and not x.is_cuda and not _interprets():
        raise ValueError(f"backend 'triton' was given a tensor on {x.device}; move it to a GPU, or {_INTERPRET}")
    if chosen == "cpu" and not x.is_cpu:
        raise ValueError(
            f"backend 'cpu' was given a tensor on {x.device}; move it to the CPU or leave the backend block"
        )
    if chosen == "flashinfer" and not x.is_cuda:
        raise ValueError(
            f"backend 'flashinfer' was given a tensor on {x.device}; move it to a GPU or leave the backend block"
        )
    if x.is_cuda or chosen == "triton":
        return _on_gpu(x)
    if x.is_cpu:
        if cpu.native is None:
            _say_missing("compiled CPU kernels", _REMEDY)
        elif x.dtype in _SERVED or x.dtype in also:
            return cpu
    return reference


def host_planner() -> ModuleType:
    """The module that plans on the host, whatever device the kernels run on."""
    return reference if cpu.native is None or _chosen.get() == "reference" else cpu


def _on_gpu(x: Tensor) -> ModuleType:
    if _chosen.get() == "flashinfer":
        adapter = import_module("ibtpo_kernels.flashinfer_backend")
        if x.dtype in adapter.SERVED:
            return adapter
    kernels = triton_kernels()
    if kernels is None:
        _say_missing("Triton kernels", "install ibtpo[gpu] (Linux)")
    elif x.is_cuda and _too_old(x.device):
        _say_missing("Triton kernels for a GPU before sm_80 (Ampere)", "run it on a newer one")
    elif x.dtype in _SERVED_BY_TRITON:
        return kernels
    return reference
