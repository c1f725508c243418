"""A pool on the CPU asks Linux for huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibtpo_engine.pages import PagePool

SUPPORTED = Path("/sys/kernel/mm/transparent_hugepage").exists() and Path("/proc/self/smaps").exists()


@pytest.mark.skipif(not SUPPORTED, reason="this kernel has no transparent huge pages")
def test_a_pool_larger_than_huge_pages_asks_for_them() -> None:
    pool = PagePool(layers=2, num_pages=2048, kv_heads=2, head_dim=64, dtype=torch.float32, device=torch.device("cpu"))
    assert is_advised(pool.values.data_ptr())  # values follow the keys: the middle of 64 MiB
    assert not pool.keys.any() and not pool.values.any()


def is_advised(address: int) -> bool:
    """Was Linux asked to back the memory at `address` by huge pages?"""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return "hg" in values
    raise AssertionError(f"{address:x} is not mapped")
