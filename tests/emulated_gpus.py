"""Several emulated CUDA devices, one a process: what `emulated_cuda` patches, and what training in shares asks besides.

Collectives on the devices run through gloo in place of NCCL. Each tensor that one is given must be dense, as NCCL asks,
and on the device of its process, which every op on it checks. It cannot show what `emulated_cuda` cannot, nor that NCCL
is slower to notice a process that is gone.
"""

from __future__ import annotations

import os
from typing import Any, Self

import emulated_cuda
import torch
import torch.distributed as dist
from emulated_cuda import Cuda, Devices, on_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

collectives: list[str] = []
"""Names of those that this process has taken part in with tensors of its device."""


class Event:
    """What it waits for has run."""

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


class Stream(emulated_cuda.Stream):
    """With what FSDP2 asks of one."""

    def __init__(self, priority: int = 0) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self) -> Event:
        return Event()


class _Devices(Devices):
    """`Devices` for shares, too: their local part is on the device."""

    def moved(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, DTensor):
            return super().moved(x, *args, **kwargs)
        _, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        return Tensor.to(x, dtype or x.dtype)

    def constructed(self, func: Any, args: Any, *, device: Any = None, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], DTensor) and device is not None):
            return super().constructed(func, args, device=device, **kwargs)
        share = args[0]  # of a model on "meta"
        local = func(torch.empty(share.to_local().shape, dtype=share.dtype), **kwargs)
        return DTensor(on_device(local), share._spec, requires_grad=False)


def install() -> None:
    """Make this process, one of those of `processes.run`, see as many devices, of which its own is its local rank's."""
    rank = int(os.environ["LOCAL_RANK"])
    stream, dispatched, init = Stream(), Cuda.__torch_dispatch__, dist.init_process_group

    def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(("c10d.", "_c10d_functional.")):
            for x in tree_leaves((args, kwargs)):
                assert not isinstance(x, Tensor) or (isinstance(x, Cuda) and x.is_contiguous()), (func, x)
            collectives.append(str(func))
        return dispatched(func, types, args, kwargs)

    def init_with_gloo(backend: str, **kwargs: Any) -> None:
        init(backend.replace("nccl", "gloo"), **kwargs)

    emulated_cuda.DEVICE = torch.device("cuda", rank)
    emulated_cuda.Devices = _Devices  # type: ignore[misc]
    emulated_cuda.REPLACED |= {
        "device_count": lambda: int(os.environ["LOCAL_WORLD_SIZE"]),
        "current_device": lambda: rank,
        "set_device": lambda device: None,
        "is_initialized": lambda: True,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: stream,
    }
    Cuda.__torch_dispatch__ = classmethod(dispatch)  # type: ignore[method-assign,assignment]
    dist.init_process_group = init_with_gloo
    for name in ("device", "is_cuda", "is_cpu"):
        setattr(DTensor, name, property(lambda share, name=name: getattr(share._local_tensor, name)))
    emulated_cuda.pytest_configure()
