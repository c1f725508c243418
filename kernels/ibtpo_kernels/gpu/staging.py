"""Arrays that the host fills and a captured graph reads, sent in one transfer."""

from __future__ import annotations

from math import prod

import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, as Triton's loads like them


class Staging:
    """Named arrays, one behind the other in one block of pinned memory and in one on the device.

    Addresses stay the same, so a CUDA graph may read the arrays on the device. The host must not write between `send`
    and the next time it waits for the device.

    Args:
        device: the other device.
        arrays: (dtype, shape) of each.

    Attributes:
        host: the arrays in host memory, filled with 0.
        there: the same on the device.
    """

    def __init__(self, device: torch.device, **arrays: tuple[torch.dtype, tuple[int, ...]]) -> None:
        sizes = [prod(shape) * dtype.itemsize for dtype, shape in arrays.values()]
        total = sum(_aligned(size) for size in sizes)
        self._host = torch.zeros(total, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._there = torch.zeros(total, dtype=torch.uint8, device=device)
        self.host: dict[str, npt.NDArray] = {}  # type: ignore[type-arg]
        self.there: dict[str, Tensor] = {}
        start = 0
        for (name, (dtype, shape)), size in zip(arrays.items(), sizes, strict=True):
            self.host[name] = self._host[start : start + size].view(dtype).view(shape).numpy()
            self.there[name] = self._there[start : start + size].view(dtype).view(shape)
            start += _aligned(size)

    def send(self) -> None:
        """Copy all arrays to the device, without waiting."""
        self._there.copy_(self._host, non_blocking=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
