"""CPU memory backed by pages of 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE = 2 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


def prefer_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages under a tensor that was not written to yet; on other devices and systems do nothing.

    A step reads keys and values from all over a pool, and huge pages save TLB misses: 4 % less time a token in a pool
    of 384 MiB (docs/log.md).

    Args:
        memory: contiguous; parts that do not fill a huge page stay on small ones.
    """
    if _ADVICE is None or not memory.is_cpu:
        return
    begin, end = -(-memory.data_ptr() // HUGE) * HUGE, (memory.data_ptr() + memory.nbytes) // HUGE * HUGE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _ADVICE)
