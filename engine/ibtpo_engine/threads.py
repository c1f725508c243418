"""The number of CPU threads for a step, and the one thread that may use an engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from typing import Any, TypeVar, cast

import torch

from ibtpo_engine.errors import EngineError

Method = TypeVar("Method", bound=Callable[..., Any])

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


def in_one_thread(method: Method) -> Method:
    """Refuse a method of an engine while another thread is in the middle of one; `used_by` holds that thread.

    Within the same thread they nest: a reward or pause, called in the middle of a step, may call them.

    Raises:
        EngineError: another thread is in the middle of such a method.
    """

    @wraps(method)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        before, thread = self.used_by, get_ident()
        if before not in (None, thread):
            raise EngineError(
                "another thread is in the middle of a step of this engine; use it from one thread at a time, or give "
                "each an engine of its own on the same model"
            )
        self.used_by = thread
        try:
            return method(self, *args, **options)
        finally:
            self.used_by = before

    return cast(Method, checked)
