"""Timing calls in turns, A B C, A B C, ..., so that a machine that slows down affects all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

_LEAD_CYCLES = 500_000  # a fraction of a millisecond, in which the host queues the timed call


class Clock(Protocol):
    """Measures one call."""

    def seconds(self, call: Callable[[], object]) -> float: ...


class WallClock:
    """Wall-clock time until the call has returned and the device, if there is one, is done."""

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        if self._waits:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter() - start


class DeviceClock:
    """Time between two events on the device.

    The device is kept busy while the host queues the call, so that launches follow each other as in a model, and the
    device's work is timed rather than the host's. A call that itself waits for the device has no such lead.
    """

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_LEAD_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: torch.device, *, host_work: bool) -> Clock:
    """Device events on a GPU, unless the work is the host's; else the wall clock."""
    return WallClock(device) if host_work or device.type != "cuda" else DeviceClock()


@dataclass(frozen=True)
class Budget:
    """How often a call is timed.

    Attributes:
        seconds: about how long a contender is timed.
        fewest, most: bounds on repetitions, whatever the time.
    """

    seconds: float
    fewest: int = 5
    most: int = 200

    def repetitions(self, estimate: float) -> int:
        """Repetitions of a call that takes `estimate` seconds."""
        return max(self.fewest, min(self.most, int(self.seconds / max(estimate, 1e-9))))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over `repetitions`."""

    median: float
    p20: float
    p80: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        ).tolist()  # fmt: skip
        return cls(median, p20, p80, len(seconds))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Turn the garbage collector off during calls."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def estimate(clock: Clock, calls: Sequence[Callable[[], object]]) -> float:
    """Least seconds of a call after warm-up; `calls` are the same one on different buffers."""
    for call in calls:
        call()
    return min(clock.seconds(calls[i % len(calls)]) for i in range(3))


def interleave(
    clock: Clock,
    contenders: Sequence[Sequence[Callable[[], object]]],
    repetitions: Sequence[int],
    settle: float = 0.0,
) -> list[list[float]]:
    """Seconds of every repetition of every contender, taken in turns.

    Args:
        contenders: for each the same call on different buffers, used in rotation.
        repetitions: how often each is timed; one with fewer has its turns spread over the whole time.
        settle: seconds to wait before each call, so that threads of the previous call, which spin for some
            milliseconds, do not take a core from it.
    """
    rounds = max(repetitions, default=0)
    seconds: list[list[float]] = [[] for _ in contenders]
    with _no_collection():
        for turn in range(rounds):
            for calls, count, found in zip(contenders, repetitions, seconds, strict=True):
                if (turn + 1) * count // rounds > turn * count // rounds:
                    time.sleep(settle)
                    found.append(clock.seconds(calls[len(found) % len(calls)]))
    return seconds
