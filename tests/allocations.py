"""Counts what operations allocate."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The storages that operations inside the block make.

    Attributes:
        sizes: bytes of each, in order; those of temporary tensors too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._known: set[int] = set()
        self._alive: list[torch.UntypedStorage] = []  # or an address could come again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for tensor in filter(torch.is_tensor, args):
            self._note(tensor, made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, out if isinstance(out, tuple) else (out,)):
            self._note(tensor, made=tensor.device.type != "meta")
        return out

    def _note(self, tensor: torch.Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(storage)
            if made:
                self.sizes.append(storage.nbytes())
