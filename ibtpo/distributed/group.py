"""The process group of a run: meetings, exchange of objects, sums of gradients.

Objects are sent through gloo, gradients through NCCL on GPUs. Before every collective operation the processes meet and
note this in the launcher's store, so that an error can name a process that is late or has failed. They wait for each
other in a gloo operation, since a process that is killed breaks its gloo connections.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

BUCKET_BYTES = 64 << 20  # most bytes of gradients summed in one call
_FAILURE = "failure"
_GRACE = 5.0  # seconds that rank 0 waits for the others to leave

T = TypeVar("T")


class PeerFailed(ConnectionError):
    """Another process of the run failed, or did not reach a meeting in time; the message names it."""


class Group:
    """The processes of a run, seen from one of them.

    All processes must call the collective methods in the same order. A group of one sends nothing.

    Args:
        rank: this process's number.
        size: number of processes.
        store: shared store for meetings and failures; None for a group of one.
        timeout: seconds that the first process at a meeting waits for the last.
        start: how often the launcher has started the processes: 1, or more after restarts.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Store | None = None, timeout: float = 1800.0, *, start: int = 1
    ) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.start = start
        self._store = store
        self._meetings = 0
        self._failure: str | None = None
        if store is not None:
            store.set(f"at/{rank}", "0")

    @property
    def leads(self) -> bool:
        """Is this the process that writes, prints and saves?"""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The range of `count` items that this process handles; the shares concatenated by rank keep the order."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def meet(self, what: str) -> None:
        """Wait until every process has reached this meeting.

        Args:
            what: purpose of the meeting, for messages and to check that all processes do the same.

        Raises:
            PeerFailed: a process failed, was killed, or did not come within `timeout` seconds.
        """
        if self._store is None:
            return
        self._meetings += 1
        self._store.set(f"at/{self.rank}", f"{self._meetings} {what}")
        mark = zlib.crc32(what.encode())
        marks = torch.tensor([mark, -mark])
        everybody = dist.all_reduce(marks, dist.ReduceOp.MAX, async_op=True)  # gloo notices at once who is gone
        assert everybody is not None
        begin, pause = time.monotonic(), 0.0005
        while not everybody.is_completed() and not self.failure():
            if time.monotonic() - begin > self.timeout:
                self.fail(
                    f"waited {self.timeout:g} s for {self._missing()} to {what}; see what they printed, "
                    "and raise distributed_timeout if they are only slow"
                )
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        try:
            if not self.failure():
                everybody.wait()
                if marks[0] != -marks[1]:
                    self.fail(self._at_odds())
        except RuntimeError as error:
            self.fail(f"the connection broke while waiting for {self._missing()} to {what}, was it killed? ({error})")
        if failure := self.failure():  # also raised in processes that come too late
            raise PeerFailed(" ".join(failure.split()))

    def _missing(self) -> str:
        """The processes that have not reached this process's current meeting, for messages."""
        assert self._store is not None
        missing = [rank for rank, (meetings, _) in enumerate(self._places()) if meetings < self._meetings]
        return f"{ranks(missing)} of {self.size}" if missing else "others"

    def _at_odds(self) -> str:
        """Message of processes that meet for different purposes: their collectives would exchange unrelated data."""
        came = ", ".join(f"rank {rank} to {what}" for rank, (_, what) in enumerate(self._places()))
        return f"the processes do different things ({came}); if all have the same code and settings, please report this"

    def _places(self) -> list[tuple[int, str]]:
        """Each process's last meeting: its number and purpose."""
        assert self._store is not None
        came: list[bytes] = []
        with suppress(dist.DistError):
            came = self._store.multi_get([f"at/{rank}" for rank in range(self.size)])
        return [(int(number), what) for number, _, what in (str(at, "utf-8").partition(" ") for at in came)]

    def leave(self) -> None:
        """Meet for the last time; rank 0, whose process may host the store, leaves after all others.

        Raises:
            PeerFailed: as `meet`.
        """
        if self._store is None:
            return
        self.meet("end the run")
        with suppress(dist.DistError):
            deadline = time.monotonic() + _GRACE
            left = self._store.add("left", 1)
            while self.leads and left < self.size and time.monotonic() < deadline:
                time.sleep(0.01)
                left = self._store.add("left", 0)

    def fail(self, message: str) -> None:
        """Tell the others why the run ends; only the first message is kept."""
        if self._store is not None:
            self._failure = message  # in case the store is gone
            with suppress(dist.DistError):
                self._store.compare_set(_FAILURE, "", message)

    def failure(self) -> str | None:
        """Which process failed and why; None if none did."""
        with suppress(dist.DistError):  # the process that hosts the store may be gone
            if self._store is not None and self._store.check([_FAILURE]):
                self._failure = str(self._store.get(_FAILURE), "utf-8")
        return self._failure

    def gather(self, value: T, what: str) -> list[T]:
        """The values of all processes, by rank; they are pickled, so gather small values, or rarely."""
        if self.size == 1:
            return [value]
        self.meet(what)
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def join(self, values: Sequence[T], what: str) -> list[T]:
        """The lists of all processes, concatenated by rank."""
        return [value for part in self.gather(list(values), what) for value in part]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes, in its own type; a missing one counts as 0."""
        if self.size == 1:
            return
        self.meet("sum gradients")
        listed = list(parameters)
        for parameter in listed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in listed if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    @torch.no_grad()
    def copy_from_leader(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite parameters with those of rank 0."""
        if self.size == 1:
            return
        self.meet("copy the weights of rank 0")
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


ALONE = Group()
"""A run of one process."""


def balance(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Divide items of these sizes: largest first, each to the part with the least; returns sorted indices by part."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        part = loads.index(min(loads))
        shares[part].append(index)
        loads[part] += sizes[index]
    return [sorted(share) for share in shares]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one type, up to `BUCKET_BYTES` together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def ranks(numbers: Sequence[int]) -> str:
    """ "rank 1" or "ranks 1, 2"."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
