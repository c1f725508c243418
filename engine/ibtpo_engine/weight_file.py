"""One safetensors file, mapped into memory and copied out a chunk at a time.

The file is ``8 bytes: length of the header | header, JSON: name -> type, shape, offsets | data``. A tensor is converted
from the mapped file directly into its destination, and each chunk is unmapped after its copy: besides the weights,
loading takes the memory of one chunk. The weights do not depend on the file afterwards, so it may be overwritten.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ibtpo_engine.errors import CheckpointError

CHUNK = 1 << 20
"""Bytes of the file that are mapped in at a time."""

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFile:
    """The tensors of one file by name.

    Args:
        path: a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks header, offsets and length against each other
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._header: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}). Download or save it again.") from None
        self._header.pop("__metadata__", None)
        self._data = 8 + length

    def names(self) -> list[str]:
        """Every tensor in the file, in the file's order."""
        return sorted(self._header, key=lambda name: int(self._header[name]["data_offsets"][0]))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in.

        Raises:
            CheckpointError: it is not a supported floating-point type.
        """
        kind = self._header[name]["dtype"]
        if kind not in _TYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {kind}; weights must be {', '.join(_TYPES)}. "
                "Quantized checkpoints are not supported; use the bf16 or fp32 one."
            )
        return _TYPES[kind]

    def read(self, name: str, target: Tensor) -> None:
        """Convert a tensor into `target`, contiguous and of the same shape, on any device.

        Raises:
            CheckpointError: a value is NaN or Inf, or becomes Inf in the type of `target`.
        """
        for source, part in self._chunks(name, target):
            part.copy_(source)
            if not bool(part.isfinite().all()):
                self._refuse(name, source, target.dtype)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Would `read` leave a tensor unchanged?"""
        return all(torch.equal(part, source.to(part)) for source, part in self._chunks(name, tensor))

    def _chunks(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks [n] of a tensor in the file, each with the part [n] of `tensor` that it belongs in."""
        stored = self.dtype(name)
        begin, end = (self._data + offset for offset in self._header[name]["data_offsets"])
        flat = tensor.view(-1)
        with self.path.open("rb") as file:
            for start in range(begin, end, CHUNK):
                source = _mapped(file.fileno(), start, min(start + CHUNK, end), stored)
                first = (start - begin) // stored.itemsize
                yield source, flat[first : first + len(source)]

    def _refuse(self, name: str, source: Tensor, dtype: torch.dtype) -> None:
        if bool(source.isfinite().all()):
            raise CheckpointError(
                f"{self.path}: {name} holds {float(source.abs().max()):.3g}, too much for {dtype}; load it as bfloat16."
            )
        raise CheckpointError(f"{self.path}: {name} holds NaN or Inf; the checkpoint is damaged. Use an earlier one.")


def _mapped(descriptor: int, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes [start, end) of a file as a tensor [n] that owns its mapping."""
    skipped = start % mmap.ALLOCATIONGRANULARITY  # mappings begin on a page
    mapping = mmap.mmap(descriptor, end - start + skipped, access=mmap.ACCESS_COPY, offset=start - skipped)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=skipped, count=end - start)
    if raw.data_ptr() % dtype.itemsize:  # headers may have any length, so data may be unaligned
        raw = raw.clone()
    return raw.view(dtype)
