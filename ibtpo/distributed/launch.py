"""Joining the processes that torchrun started: backend, device, and how a failure reaches the others."""

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
    """The group of processes that this one was started in, until the block ends; a group of one without torchrun.

    An exception that leaves the block ends the others with its message. Only rank 0 says how a run was interrupted.

    Raises:
        ValueError: the launcher's environment and the configuration do not fit.
        PeerFailed: another process failed.
        SystemExit: on the others, once the message is out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    device = choose_device(device_name(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = _connect(device, config.distributed_timeout)
    try:
        group.meet("begin")  # so that nobody fails while others still connect to it
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
            raise SystemExit(2) from None  # who failed has said why, and rank 0 says who
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
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
        start, name = _agree(store, rank, size, timeout)
        store = PrefixStore(f"ibtpo-{name}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        longer = wait + timedelta(seconds=_GRACE)  # so that a meeting ends first and says who was missing
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longer)
    except (RuntimeError, ValueError) as error:
        raise PeerFailed(
            f"this process could not join the others ({one_line(error)}); start all with torchrun, with the same "
            "--nnodes and --rdzv-endpoint"
        ) from None
    return Group(rank, size, PrefixStore("group", store), timeout, start=start)


def _agree(store: Store, rank: int, size: int, timeout: float) -> tuple[int, str]:
    """How often processes have been started with this store, and a name that only those started together know.

    The store outlives them where torchrun restarts them, and its count of restarts is no name: over several nodes it
    differs, as a node whose processes were well does not count. So rank 0 answers whoever says hello, by a name of
    their own; by the time that processes start, those from before have ended on every node.
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
    """The device of this process: with several on a node, the GPU of its local rank.

    Raises:
        ValueError: there are fewer GPUs than processes, or the configuration names one for all.
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
    """The run as a restart by torchrun must go on with it: one that began in `out` is resumed from there.

    Rank 0 decides, from its own view of the folder and of how often it was started.
    """
    again = group.start > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    begun = config.resume is None and config.out is not None and is_run(config.out)
    resumes = group.gather(again and begun, "ask whether the run has begun")[0]
    return replace(config, resume=config.out) if resumes else config
