"""A CUDA device on the CPU; a pytest plugin (`-p emulated_cuda`) for a process of its own, as it patches torch.

A tensor moved to "cuda" says that it is there, and its data stay in host memory. What a GPU refuses raises: an op on
tensors of both devices, a generator of the other one, a Triton kernel given host memory. While a graph is captured so
does what waits for the device, `.item()`, a boolean mask, a copy from pageable memory or one that is not told
`non_blocking`. A graph records the ops and the (interpreted) Triton kernels that ran; a replay runs these again, on the
memory they had, without the Python between them: what was not in a buffer by then stays as it was captured.

A copy from pinned memory that nobody waits for may read it until the device is next waited for; what was written there
meanwhile raises then.

This shows which device each tensor of the CUDA branches is on, where they wait, and what a captured step reads. Else it
cannot show concurrency (all runs in program order, so that no other wait is ever missed), memory (nothing is ever
reused by a graph, or runs out), what a stream or a real kernel does, or that a capture itself runs nothing: here it
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.autograd.graph
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
MEMORY = 1 << 30
PROPERTIES = SimpleNamespace(name="Emulated CUDA", L2_cache_size=1 << 16, multi_processor_count=2, total_memory=MEMORY)

_INDEXING = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}
_WAITING = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.masked_select.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten._unique2.default",
}
"""Ops whose result, or its size, the host must know."""

_constructors = frozenset(_device_constructors())
_pinned: dict[int, Tensor] = {}  # by address; kept, so that no other memory takes it
_recorded: list[Callable[[], object]] | None = None  # by the capture under way
_in_flight: list[tuple[Tensor, bytes]] = []  # pinned memory that a copy may still read, and what it held
waits: list[str] = []
"""For what the device was waited for."""


class Cuda(Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def tolist(self) -> Any:
        wait("tolist")
        return on_host(self).tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Cuda({on_host(self)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = on_device(on_host(self).detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        # what is made of other ops, as `item`, comes as these in other modes
        if torch.is_inference_mode_enabled() and func._can_decompose():
            return func.decompose(*args, **kwargs)
        check(str(func), args, kwargs)

        def run() -> Any:
            with torch._C._DisableTorchDispatch():
                return _WIDER.get(func, func)(*args, **kwargs)

        out = run()
        record(run, out)
        given = {id(x) for x in args}  # the target of a copy to the host stays there
        return tree_map(lambda x: on_device(x) if type(x) is Tensor and id(x) not in given else x, out)


def _widened(out_dtype: torch.dtype, *operands: Tensor) -> list[Tensor]:
    """Operands of a product into another type than theirs, which must be of 16 bits, and it float32."""
    if out_dtype is not torch.float32 or {x.dtype for x in operands} not in ({torch.float16}, {torch.bfloat16}):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    return [x.to(out_dtype) for x in operands]


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.mm(*_widened(out_dtype, a, b))


def _addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    if total.dtype is not out_dtype or out.dtype is not out_dtype:
        raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
    return torch.addmm(total, *_widened(out_dtype, a, b), out=out)


_WIDER = {torch.ops.aten.mm.dtype: _mm, torch.ops.aten.addmm.dtype_out: _addmm}
"""Products that the CPU does not have."""


def on_device(x: Tensor) -> Cuda:
    """The same memory, as the device's."""
    with torch._C._DisableTorchDispatch():
        return Tensor._make_subclass(Cuda, x, x.requires_grad)


def on_host(x: Any) -> Any:
    """The same memory, as the host's; anything else as it is."""
    if isinstance(x, TensorDescriptor):
        return replace(x, base=on_host(x.base))
    if not isinstance(x, Cuda):
        return x
    with torch._C._DisableTorchDispatch():
        return Tensor._make_subclass(Tensor, x)


def wait(what: str) -> None:
    """Called where a GPU would be waited for."""
    waits.append(what)
    if _recorded is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    copies = _in_flight[:]
    _in_flight.clear()
    if any(held != _bytes(host) for host, held in copies):
        raise RuntimeError("pinned memory was written while a copy may have read it; wait for the device before")


def wait_for_copy(host: Tensor, non_blocking: bool) -> None:
    """As `wait`, unless the memory is pinned and the copy may go on by itself."""
    if not non_blocking or host.untyped_storage().data_ptr() not in _pinned:
        wait("copy of pageable memory" if non_blocking else "copy")
    elif _recorded is None:
        _in_flight.append((host, _bytes(host)))


def _bytes(host: Tensor) -> bytes:
    with torch._C.DisableTorchFunction():
        return host.detach().numpy().tobytes()


def check(name: str, args: Any, kwargs: Any) -> None:
    """Raise where a GPU would."""
    leaves = tree_leaves((args, kwargs))
    hosts = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Cuda)]
    if name in _WAITING:
        wait(name)
    if name == "aten.copy_.default":
        for host in hosts:
            wait_for_copy(host, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return
    if name in _INDEXING:
        for index in args[1]:
            if isinstance(index, Cuda) and index.dtype in (torch.bool, torch.uint8):
                wait("boolean mask")
            elif isinstance(index, Tensor) and not isinstance(index, Cuda):
                wait("index on the CPU")
        hosts = [x for x in hosts if all(x is not index for index in args[1])]  # indices alone may be the CPU's
    if any(host.dim() for host in hosts):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
    refuse_generators(leaves, "cuda")


class Generator(torch.Generator):
    """Random numbers of either device, which are the CPU's; made by `torch.Generator` once this is a plugin."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = DEVICE if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def refuse_generators(values: Any, wanted: str) -> None:
    """Of the other device than the one wanted."""
    for value in values:
        if isinstance(value, torch.Generator) and (found := value.device.type) != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


def record(run: Callable[[], Any], out: Any) -> None:
    """Have the capture under way, if any, run this again and leave the results where they are now."""
    if _recorded is None:
        return
    places = [on_host(x) for x in tree_leaves(out) if isinstance(x, Tensor)]

    def again() -> None:
        found = [on_host(x) for x in tree_leaves(run()) if isinstance(x, Tensor)]
        for place, x in zip(places, found, strict=True):
            if place.data_ptr() != x.data_ptr():  # not a view or the target of an op in place
                place.copy_(x)

    _recorded.append(again)


class Devices(TorchFunctionMode):
    """Makes "cuda" an argument that constructors and moves take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            return self.moved(*args, **kwargs)
        if func is Tensor.cpu:
            return self.moved(*args, "cpu")
        if func is Tensor.cuda:
            return self.moved(*args, "cuda")
        if func in _constructors or func.__name__.startswith("new_") or func.__name__.endswith("_like"):
            return self.constructed(func, args, **kwargs)
        return func(*args, **kwargs)

    def moved(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        was_there, is_there = isinstance(x, Cuda), device.type == "cuda" if device else isinstance(x, Cuda)
        if was_there == is_there:
            return Tensor.to(x, None if is_there else device, dtype or x.dtype, copy=copy)
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("the emulated device has no gradient of a move")
        if is_there:
            wait_for_copy(x, non_blocking)
            out = Tensor.to(x, dtype=dtype or x.dtype, copy=True)
            record(lambda: Tensor.to(x, dtype=dtype or x.dtype, copy=True), out)
            return on_device(out)
        wait("copy to the CPU")
        return on_host(Tensor.to(x, dtype=dtype or x.dtype, copy=True))

    def constructed(self, func: Any, args: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        there = device is not None and torch.device(device).type == "cuda"
        refuse_generators(kwargs.values(), "cuda" if there else "cpu")
        if not there:
            if device is not None:
                kwargs["device"] = device
            out = func(*args, **kwargs)
            if pin_memory:
                _pinned[out.untyped_storage().data_ptr()] = out
            return on_host(out) if device is not None else out
        if pin_memory:
            raise RuntimeError("Cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if func in (torch.tensor, torch.as_tensor):
            wait("tensor of Python numbers")
        with_grad = kwargs.pop("requires_grad", False)
        out = func(*args, **kwargs, device="cpu")
        record(lambda: func(*args, **kwargs, device="cpu"), out)
        return on_device(on_host(out)).requires_grad_(with_grad)


class CUDAGraph:
    """What a capture recorded."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] = []

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
            for run in self.recorded:
                run()


@contextmanager
def graph(graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """Records into the graph what runs inside."""
    global _recorded
    wait("capture within a capture")
    _recorded = graph.recorded
    try:
        yield
    finally:
        _recorded = None


class Stream:
    """Everything runs in program order, whatever the stream."""

    def wait_stream(self, other: Stream) -> None:
        """It has run."""


class Event:
    """A time, which is the host's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.is_timed = enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        wait("event")

    def elapsed_time(self, end: Event) -> float:
        if not (self.is_timed and end.is_timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return 1e3 * (end.at - self.at)


def launch_on_device(launch: Callable[..., None]) -> Callable[..., None]:
    """The launch of an interpreted kernel, on tensors of the device alone."""

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (x.base if isinstance(x, TensorDescriptor) else x for x in (*args, *kwargs.values()))
        if any(isinstance(x, Tensor) and not isinstance(x, Cuda) for x in given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        places, named = tree_map(on_host, args), tree_map(on_host, kwargs)

        def run() -> None:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
                launch(self, *places, **named)

        run()
        record(run, None)

    return launched


def backward_on_device(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The pass backward with `Devices` on: torch switches a mode off for what the mode itself calls."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with Devices():
            return backward(*args, **kwargs)

    return run


REPLACED = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "device": lambda _: nullcontext(),
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_properties": lambda *_: PROPERTIES,
    "Event": Event,
    "_sleep": lambda _: None,
    "Stream": Stream,
    "current_stream": lambda *_: Stream(),
    "stream": lambda _: nullcontext(),
    "synchronize": lambda *_: wait("synchronize"),
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: _recorded is not None,
    "get_device_capability": lambda *_: CAPABILITY,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
}
"""Of torch.cuda."""


def pytest_configure() -> None:
    from ibtpo_kernels import library

    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    for place in (torch.autograd, torch.autograd.graph):
        place._engine_run_backward = backward_on_device(place._engine_run_backward)  # type: ignore[attr-defined]
    interpreter.GridExecutor.__call__ = launch_on_device(interpreter.GridExecutor.__call__)
    library._PLAIN += (Cuda,)  # type: ignore[assignment]  # it has memory
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Devices().__enter__()  # type: ignore[no-untyped-call]
