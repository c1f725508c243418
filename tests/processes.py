"""Several processes as torchrun would start them, forked from a server that has everything imported: cheap."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ibtpo.cli", "torch.distributed.fsdp", "test_distributed"])


def start(size: int, work: Callable[..., Any], *arguments: Any, logs: Path) -> list[Any]:
    """Start `work(*arguments)` as ranks 0 to `size` - 1; what each prints goes to logs/RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    logs.mkdir(parents=True, exist_ok=True)
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, logs, work, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[Any], *, seconds: float = 60.0) -> list[int]:
    """Their exit codes; whoever takes longer is killed."""
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def run(size: int, work: Callable[..., Any], *arguments: Any, logs: Path) -> None:
    """Start and wait; all must end well."""
    codes = end(start(size, work, *arguments, logs=logs))
    printed = "\n".join(path.read_text() for path in sorted(logs.glob("*.txt")))
    assert codes == [0] * size, printed


def _rank(rank: int, size: int, port: int, logs: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with (logs / f"{rank}.txt").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            code = work(*arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(int(code or 0))
