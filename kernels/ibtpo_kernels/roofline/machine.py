"""The origin of a measurement: machine, device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ibtpo_kernels import cpu


@dataclass(frozen=True)
class Machine:
    """The columns of a row that give its origin."""

    date: str
    commit: str
    machine: str
    device: str
    torch: str
    triton: str
    threads: int


def here(device: torch.device) -> Machine:
    """This machine, this checkout, now."""
    return Machine(
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
        machine=processor(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        triton=_version("triton"),
        threads=torch.get_num_threads(),
    )


_INSTRUCTIONS = {"v3": "AVX2", "v4": "AVX-512", "v4bf16": "AVX-512-BF16", "v4amx": "AMX"}


def processor_name() -> str:
    """The processor's name for itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, the number of cores this process may use, and the kernels' instruction set.

    On a virtual machine, different processors may have the same name.
    """
    isa = None if cpu.native is None else cpu.native.isa()
    parts = [f"{available_cores()} cores", *([_INSTRUCTIONS[isa]] if isa in _INSTRUCTIONS else [])]
    return f"{processor_name()} ({', '.join(parts)})"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of this file's checkout, with `+` if sources differ from it; IBTPO_COMMIT if there is no git."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", ".."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IBTPO_COMMIT", "unknown")
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's last-level cache; 0 on the CPU, where inputs may stay in caches, as in an engine's step."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
