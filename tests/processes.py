"""Several processes as torchrun would start them, forked from a server that has everything imported: cheap.

None outlives `SECONDS`, whatever it does: what it was at is in its log then.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

SECONDS = 120.0
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
"""Where gloo listens: it looks for the host's name otherwise, and warns in every process if no address has it."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ibtpo.train", "ibtpo.distributed.shard", "test_distributed", "adder_runs"])


@contextmanager
def started(size: int, work: Callable[..., Any], *arguments: Any, logs: Path) -> Iterator[list[Any]]:
    """`work(*arguments)` as ranks 0 to `size` - 1 while the block runs; what each prints goes to logs/RANK.txt.

    Like torchrun, the caller keeps the store where they meet.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    logs.mkdir(parents=True, exist_ok=True)
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, size, store.port, logs, work, arguments), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        yield ranks
    finally:
        end(ranks, seconds=0)


def end(ranks: list[Any], *, seconds: float = SECONDS) -> list[int]:
    """Their exit codes; whoever is not done in time is killed."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        if process.pid is not None:
            process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        if process.pid is not None and process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def run(size: int, work: Callable[..., Any], *arguments: Any, logs: Path, ends_well: bool = True) -> list[int]:
    """Start, wait, and return the exit codes; all must be 0, or none."""
    with started(size, work, *arguments, logs=logs) as ranks:
        codes = end(ranks)
    printed = "\n".join(path.read_text() for path in sorted(logs.glob("*.txt")))
    assert not any(codes) if ends_well else all(codes), printed
    return codes


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A TimeoutError in the main thread, whatever it waits for, if the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _rank(rank: int, size: int, port: int, logs: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
    }  # fmt: skip
    torch.set_num_threads(1)
    with (logs / f"{rank}.txt").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
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
