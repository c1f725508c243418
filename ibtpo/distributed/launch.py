"""Joining the processes that torchrun started: backend, device, and passing failures on to the others."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ibtpo.config import TrainConfig
from ibtpo.distributed.group import ALONE, Group, PeerFailed, ranks
from ibtpo.printable import one_line
from ibtpo.run_format import is_run
from ibtpo.setup import choose_device
from ibtpo.stopping import Interrupted

_GRACE = 5.0  # seconds


@contextmanager
def join(config: TrainConfig) -> Iterator[Group]:
    """Join the processes that were started with this one, until the block ends; a group of one without torchrun.

    An exception that leaves the block ends the others with its message. Only rank 0 reports an interruption.

    Raises:
        ValueError: the launcher's environment and the configuration do not match.
        PeerFailed: another process failed, on rank 0; or this one could not join or lost its connection.
        SystemExit: another process failed or the run was interrupted, on other ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    device = choose_device(device_name(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = _connect(device, config.distributed_timeout)
    try:
        group.meet("begin")  # no process may fail while others still connect to it
        yield group
        group.leave()
        dist.destroy_process_group()
    except Interrupted as stop:
        group.leave()
        dist.destroy_process_group()
        if group.leads:
            raise
        raise SystemExit(stop.exit_code) from None
    except Exception as error:
        failure = group.failure()
        if failure is not None and not group.leads:
            raise SystemExit(2) from None  # the failed process has said why, and rank 0 says which it was
        if failure is not None:
            raise PeerFailed(failure) from None
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            group.fail(f"the connection to another process broke, was it killed? ({one_line(error)})")
            raise PeerFailed(group.failure()) from None
        if not isinstance(error, PeerFailed):
            group.fail(f"rank {group.rank} failed: {one_line(error)}")
        raise


def _connect(device: torch.device, timeout: float) -> Group:
    wait = timedelta(seconds=timeout)
    remedy = "start all with torchrun, with the same --nnodes and --rdzv-endpoint"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
        start, name = _agree(store, rank, size, timeout)
        # The launch was right, then: what can fail is gloo, which listens where the name of its host points to.
        remedy = "set GLOO_SOCKET_IFNAME on every node to a network interface on which the others reach it, at any port"
        store = PrefixStore(f"ibtpo-{name}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        longer = wait + timedelta(seconds=_GRACE)  # a meeting must time out first, as it names missing processes
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longer)
    except (RuntimeError, ValueError) as error:
        raise PeerFailed(f"this process could not join the others ({one_line(error)}); {remedy}") from None
    return Group(rank, size, PrefixStore("group", store), timeout, start=start)


def _agree(store: Store, rank: int, size: int, timeout: float) -> tuple[int, str]:
    """How often processes have been started with this store, and a name shared only by those started together.

    The store outlives restarts by torchrun. Its restart count cannot serve as the name: it differs between nodes, since
    a node counts only failures of its own processes. So each process writes a name of its own, and rank 0 answers it
    with the common one. Earlier processes have ended on every node before new ones start.
    """
    store, mine = PrefixStore("ibtpo", store), uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        count, name = str(store.get(f"answer/{mine}"), "utf-8").split()
        store.set(f"heard/{name}/{rank}", "")
        return int(count), name
    start, deadline = store.add("starts", 1), time.monotonic() + timeout
    while missing := [other for other in range(1, size) if not store.check([f"heard/{mine}/{other}"])]:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", f"{start} {mine}")
        if time.monotonic() > deadline:
            raise PeerFailed(f"waited {timeout:g} s for {ranks(missing)} of {size} to begin; see what they printed")
        time.sleep(0.01)
    return start, mine


def device_name(config: TrainConfig) -> str:
    """The device of this process; if several processes use GPUs, the GPU of its local rank.

    Raises:
        ValueError: there are fewer GPUs than processes, or the configuration names a single one for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return config.device
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise ValueError(f"device: {name} would be shared by all processes of torchrun; use --device cuda, or auto")
    if name != "cuda":
        return name
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"device: process {local} of this node has no GPU, torch sees {count}; lower --nproc-per-node")
    return f"cuda:{local}"


def restarted(config: TrainConfig, group: Group) -> TrainConfig:
    """The configuration after a restart by torchrun: a run that has begun in `out` is resumed from there.

    Rank 0 decides, from its view of the folder and of how often it was started.
    """
    again = group.start > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    begun = config.resume is None and config.out is not None and is_run(config.out)
    resumes = group.gather(again and begun, "ask whether the run has begun")[0]
    return replace(config, resume=config.out) if resumes else config
