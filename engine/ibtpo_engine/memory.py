"""The size of a pool as a share of the memory that is free now."""

from __future__ import annotations

from pathlib import Path

import torch

from ibtpo_engine.model import Model
from ibtpo_engine.model_config import ModelConfig
from ibtpo_engine.pages import PAGE

_CGROUP = Path("/sys/fs/cgroup")
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
    without swapping, or what the limit of the process's control group leaves if that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return max(min(available, _left_in_group(available)), 0)


def _left_in_group(otherwise: int) -> int:
    """What the limit of the process's control group leaves; `otherwise` if there is none."""
    try:
        most, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return otherwise
    return otherwise if most == "max" else int(most) - int(used)
