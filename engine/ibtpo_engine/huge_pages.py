"""Memory of the CPU backed by pages of 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE = 2 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


def prefer_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages under a tensor that nothing was written to yet; on other devices and systems nothing happens.

    A step reads keys and values from all over a pool, and the processor need not look up so often where they are: 4 %
    less time a token in a pool of 384 MiB (docs/log.md).

    Args:
        memory: contiguous; what of it fills no huge page stays on small ones.
    """
    if _ADVICE is None or not memory.is_cpu:
        return
    begin, end = -(-memory.data_ptr() // HUGE) * HUGE, (memory.data_ptr() + memory.nbytes) // HUGE * HUGE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _ADVICE)
