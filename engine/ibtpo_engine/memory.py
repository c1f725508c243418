"""The size of a pool as a share of the memory that is free now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ibtpo_engine.model import Model
from ibtpo_engine.model_config import ModelConfig
from ibtpo_engine.pages import PAGE

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def bytes_per_token(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position, all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def tokens_in_share(model: Model, share: float) -> int:
    """Positions, in whole pages, that `share` of the free memory of the model's device holds.

    Raises:
        ValueError: the share lies outside (0, 1], or does not hold one page.
    """
    if not 0 < share <= 1:
        raise ValueError(f"Engine: kv_share={share} lies outside (0, 1]")
    free, page = free_memory(model.device), bytes_per_token(model.config, model.dtype) * PAGE
    pages = int(share * free) // page
    if pages < 1:
        raise ValueError(
            f"Engine: kv_share={share} of {free} free bytes holds no page of {page} bytes; raise it or free memory"
        )
    return pages * PAGE


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now.

    On a GPU: what the driver has free plus what torch's allocator holds unused. On a CPU: what the system can give
    without swapping, or what the limits of the process's control groups leave if that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return max(min(available, _left_in_group(available)), 0)


def _left_in_group(otherwise: int) -> int:
    """What the limits of the process's control group, and of those above it, leave; `otherwise` if there are none.

    Groups are charged for cached files, too, which the kernel drops before it lets a group run out.
    """
    left = otherwise
    for names, folder in _groups():
        try:
            most, used = ((folder / name).read_text().strip() for name in names)
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        total = "total_" if "total_inactive_file" in stat else ""  # version 1 has both, with and without groups below
        cached = sum(int(stat.get(total + name, 0)) for name in ("inactive_file", "active_file"))
        if most != "max":
            left = min(left, int(most) - int(used) + cached)
    return left


def _groups() -> Iterator[tuple[tuple[str, str], Path]]:
    """The names of limit and use, and the folder, of each group the process is in, from the innermost outwards."""
    for line in _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current"), _CGROUP
        elif "memory" in controllers.split(","):
            names, mount = ("memory.limit_in_bytes", "memory.usage_in_bytes"), _CGROUP / "memory"
        else:
            continue
        inner = mount / path.strip("/")  # in a container without a namespace of its own there may be no such folder
        for folder in (inner, *inner.parents):
            yield names, folder
            if folder == mount:
                break
