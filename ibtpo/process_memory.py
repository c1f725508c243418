"""Host memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_host_memory() -> int:
    """The most memory this process has held, in bytes."""
    if _STATUS.is_file():  # of this program only; getrusage also counts the program before exec
        return _of_process("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def host_memory() -> int:
    """The memory this process holds now, in bytes; its peak if that cannot be read."""
    return _of_process("VmRSS") if _STATUS.is_file() else peak_host_memory()


def _of_process(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) * 1024
