"""The number of CPU threads for a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_STEP = 200_000_000
"""Floating-point operations below which a step runs on one thread: about 1 ms of work in forty parallel regions."""


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Run a small step on one thread, whatever torch's setting.

    Splitting a region of 20 µs saves little on an idle machine, and on a busy one each region waits for a thread that
    is not running: a decode step of the built-in policy then takes several times as long (docs/log.md).
    """
    before = torch.get_num_threads()
    if flops >= SMALL_STEP or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
