"""This process among those of its run: meeting, exchanging objects, summing gradients.

Objects travel through gloo, gradients through NCCL on GPUs. Before anything collective the processes meet at the
launcher's store: whoever does not come in time is named there, and so is whoever has failed meanwhile. Who is killed
breaks the connections of the others, which therefore wait at a gloo operation.
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

BUCKET_BYTES = 64 << 20  # of gradients summed in one call
_FAILURE = "failure"
_GRACE = 5.0  # seconds that rank 0 waits for the others to have left

T = TypeVar("T")


class PeerFailed(ConnectionError):
    """Another process of the run failed, or did not come to a meeting in time; the message says which."""


class Group:
    """The processes of a run, seen from one of them.

    Every method but `share` must be called by all of them in the same order. A group of one sends nothing.

    Args:
        rank: this process's number.
        size: how many there are.
        store: where they meet; None for a group of one.
        timeout: seconds that the first to come waits for the last.
        start: 1, or more where the launcher had to start the processes again.
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
        """Which of `count` things are this process's: a run of them, so that shares put together keep the order."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def meet(self, what: str) -> None:
        """Wait until every process has come here.

        Args:
            what: what for, in a few words; for the message.

        Raises:
            PeerFailed: one failed, was killed, or did not come within `timeout` seconds.
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
        if failure := self.failure():  # also for those who came too late
            raise PeerFailed(" ".join(failure.split()))

    def _missing(self) -> str:
        """Who has not come to the meeting that this process waits at."""
        assert self._store is not None
        missing = [rank for rank, (meetings, _) in enumerate(self._places()) if meetings < self._meetings]
        return f"{ranks(missing)} of {self.size}" if missing else "others"

    def _at_odds(self) -> str:
        """Who has come for what, where that is not the same: another collective than the others' would mix them up."""
        came = ", ".join(f"rank {rank} to {what}" for rank, (_, what) in enumerate(self._places()))
        return f"the processes do not do the same ({came}); if all have the same code and settings, please report this"

    def _places(self) -> list[tuple[int, str]]:
        """The last meeting that each process has come to: its number, and what it is for."""
        assert self._store is not None
        came: list[bytes] = []
        with suppress(dist.DistError):
            came = self._store.multi_get([f"at/{rank}" for rank in range(self.size)])
        return [(int(number), what) for number, _, what in (str(at, "utf-8").partition(" ") for at in came)]

    def leave(self) -> None:
        """Meet for the last time; rank 0, which may keep the store, goes when all others have.

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
        """Tell the others why the run ends; the first message stays."""
        if self._store is not None:
            self._failure = message  # should the store be gone
            with suppress(dist.DistError):
                self._store.compare_set(_FAILURE, "", message)

    def failure(self) -> str | None:
        """Which process failed and why, if one did."""
        with suppress(dist.DistError):  # whoever keeps the store may be gone
            if self._store is not None and self._store.check([_FAILURE]):
                self._failure = str(self._store.get(_FAILURE), "utf-8")
        return self._failure

    def gather(self, value: T, what: str) -> list[T]:
        """What every process brings, in the order of their ranks; small, or seldom: it is pickled."""
        if self.size == 1:
            return [value]
        self.meet(what)
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def join(self, values: Sequence[T], what: str) -> list[T]:
        """The lists of all processes, one after the other."""
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
    """Share out things of these sizes: largest first to whoever has least; indices, in order, by part."""
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
