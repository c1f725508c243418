"""Compile what a wrapper would launch, for a GPU that is not there, and read what came out.

`compiled` takes a call of `triton_launches`, by its name: it runs in a process of its own, so that all cores compile.
`launches` runs a wrapper on CPU tensors with the launch itself replaced by a note of it, so that signatures,
specialisations and tile shapes are the shipped ones. `build` compiles such a note for a compute capability.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_launches import calls

from ibtpo_kernels.gpu import configs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes a thread block. sm_80 has 163 KiB; its tiles are also those of sm_86 and sm_89, which have 99, as has sm_120.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def key(self) -> object:
        """Equal for launches that run the same binary."""
        types, constants, attributes = _specialised(self)
        return self.name, types, constants, attributes, self.options


@dataclass(frozen=True)
class Built:
    """Registers a thread, bytes of spilled registers (stack) a thread, bytes of shared memory a block."""

    registers: int
    spills: int
    shared: int
    tensor_cores: frozenset[str]  # kinds of matrix instructions


@contextmanager
def recording(major: int) -> Iterator[list[Launch]]:
    """Note every launch in the block instead of making it; tiles are those of `configs.family` `major`."""
    notes: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        notes.append(Launch(self, dict(bound.arguments), options))

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(configs, "capability", lambda device: major):
        yield notes


def launches(call: Callable[[], object], major: int) -> list[Launch]:
    with recording(major) as notes:
        call()
    return notes


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(types, constants, attributes) as Triton's own specialisation would choose them for these arguments."""
    types, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        at = (parameter.num,)
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            types[parameter.name], constants[at] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            types[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, bool):
            types[parameter.name] = "i1"
        elif isinstance(value, int):
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[at] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32"
    return types, constants, attributes


def build(launch: Launch, capability: int) -> Built:
    types, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    products = frozenset(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
    return Built(registers, stack, compiled.metadata.shared, products)


_SEEN: list[object] = []


def compiled(capability: int, full: bool, name: str) -> list[tuple[str, int, str, Built | None]]:
    """(name, capability, kernel, built) of each launch of a call; None for what this process has built before."""
    found = []
    for launch in launches(dict(calls(capability, full=full))[name], configs.family(capability // 10)):
        key = capability, launch.key
        found.append((name, capability, launch.name, None if key in _SEEN else build(launch, capability)))
        _SEEN.append(key)
    return found
