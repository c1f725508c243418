"""The limits of this machine, measured: bytes a second of a large copy and read, and large matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ibtpo_kernels.linear import torch_is_slow
from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.problem import name_of
from ibtpo_kernels.roofline.timing import Budget, Timing, clock_for, estimate, interleave


@dataclass(frozen=True)
class Roof:
    """One limit: what was run, and how fast. Its 20th percentile of time counts, as a limit is the speed reachable."""

    name: str
    dtype: torch.dtype
    work: Work
    timing: Timing

    @property
    def seconds(self) -> float:
        return self.timing.p20


@dataclass(frozen=True)
class Roofs:
    """The limits of a device."""

    measured: tuple[Roof, ...]

    @property
    def bytes_per_second(self) -> float:
        """The rate of the faster of copying and reading."""
        return max(r.work.bytes / r.seconds for r in self.measured if not r.work.flops)

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """The rate of a product in this dtype; if not measured that of float32, in which sums are kept."""
        found = {r.dtype: r.work.flops / r.seconds for r in self.measured if r.work.flops}
        return found.get(dtype, found[torch.float32])

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The least time for the work: the longer of the times of its operations and its bytes."""
        return max(work.flops / self.flops_per_second(dtype), work.bytes / self.bytes_per_second)

    def binding(self, work: Work, dtype: torch.dtype) -> str:
        """Which of the two is longer."""
        compute = work.flops / self.flops_per_second(dtype)
        return "compute" if compute > work.bytes / self.bytes_per_second else "memory"


def measure(device: torch.device, *, quick: bool = False) -> Roofs:
    """Measure the limits; `quick` takes smaller sizes, which may not reach them."""
    on_gpu = device.type == "cuda"
    num_bytes = (1 << 30 if on_gpu else 1 << 28) >> (3 if quick else 0)
    size = (8192 if on_gpu else 2048) >> (2 if quick else 0)
    found = [_bandwidth(device, num_bytes, "copy"), _bandwidth(device, num_bytes, "read")]
    is_slow = torch_is_slow(torch.empty(0, dtype=torch.bfloat16, device=device))  # float32 is faster then
    found += [_product(device, size, dtype) for dtype in (torch.float32, *([] if is_slow else [torch.bfloat16]))]
    return Roofs(tuple(found))


def _timed(device: torch.device, call: Callable[[], object]) -> Timing:
    clock = clock_for(device, host_work=False)
    repetitions = Budget(1.0, fewest=10, most=50).repetitions(estimate(clock, [call]))
    return Timing.of(interleave(clock, [[call]], [repetitions])[0])


def _bandwidth(device: torch.device, num_bytes: int, kind: str) -> Roof:
    source = torch.randn(num_bytes // 4, device=device)
    if kind == "copy":
        target = torch.empty_like(source)
        timing = _timed(device, lambda: target.copy_(source))
        return Roof(f"copy of {num_bytes >> 20} MiB", source.dtype, Work(0, 2 * num_bytes), timing)
    return Roof(f"sum of {num_bytes >> 20} MiB", source.dtype, Work(0, num_bytes), _timed(device, source.sum))


def _product(device: torch.device, size: int, dtype: torch.dtype) -> Roof:
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    work = Work(2 * size**3, 3 * size**2 * dtype.itemsize)
    return Roof(f"{name_of(dtype)} product of {size}^3", dtype, work, _timed(device, lambda: a @ b))
