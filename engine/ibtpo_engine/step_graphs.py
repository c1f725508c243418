"""Decode steps on a GPU as captured CUDA graphs.

A step launches some ten kernels a layer, most of which take less time than their launch; replayed as a graph they are
one launch. A captured step reads and writes buffers at fixed addresses::

    host      plan, temperatures ...             token, pos, address, stream        tokens, log-probs, entropy
                 | when branches begin or end       | every step                       ^
    device    plan, settings ---------------->  [ model -> logits -> sample ] ---------+
                                                  captured once a bucket, then replayed

A bucket is a number of rows and the room of its plan, both rounded up. Unused rows are at position -1: they see
nothing, write nothing, and what they sample is ignored. Weights are read in place, so graphs survive in-place updates;
if a parameter, the pool or the page table has moved, all are captured anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_engine.arrays import Longs
from ibtpo_engine.capture import Capture, Step
from ibtpo_engine.model import Model
from ibtpo_engine.paged_attention import PagedAttention
from ibtpo_engine.pages import PagePool
from ibtpo_engine.parity import Parity, project_for
from ibtpo_engine.slots import LACKS_PAGE, Slots
from ibtpo_kernels import DecodePlan, Events, sample
from ibtpo_kernels.gpu.replay import Heads, ReplayPlan, Room, work_for

MOST_GRAPHS = 48  # beyond this, the least recently used one is dropped


class _Bucket:
    """A step of at most `room.queries` rows at fixed addresses."""

    def __init__(
        self, model: Model, pool: PagePool, logits: Callable[[Tensor], Tensor], plan: ReplayPlan, parity: Parity
    ) -> None:
        size, device = plan.room.queries, model.device
        host: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        self.plan = plan
        self.rows = torch.zeros(4, size, dtype=torch.int64, **host)  # token, pos, address, stream
        self.settings = torch.zeros(4, size, dtype=torch.float32, **host)  # temperature, top_p, top_k, min_p
        self.replay: Step | None = None
        self._rows, self._settings = self.rows.to(device), self.settings.to(device)
        self._out = torch.zeros(4, size, dtype=torch.float64, device=device)  # token, logprob, logprob_raw, entropy
        self._model, self._pool, self._logits, self._project = model, pool, logits, project_for(parity)

    def step(self) -> None:
        """The step that is captured."""
        token, pos, address, stream = self._rows.unbind()
        temperature, top_p, top_k, min_p = self._settings.unbind()
        plan = self.plan.plan
        plan.lengths.copy_(pos + 1)
        attention = PagedAttention(self._pool, plan, address, *self._model.rotation(pos))
        drawn = sample(
            self._logits(self._model(token, attention, self._project)),
            torch.stack((stream, pos + 1), -1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k.int(),
            min_p=min_p,
        )
        self._out.copy_(torch.stack([part.double() for part in drawn]))

    def send(self, values: Tensor) -> None:
        """Copy `rows` or `settings` to the device."""
        (self._rows if values is self.rows else self._settings).copy_(values, non_blocking=True)

    def out(self, count: int) -> npt.NDArray[np.float64]:
        """[4, count], the results of the last replay, for which this waits."""
        return self._out[:, :count].cpu().numpy()


class StepGraphs:
    """Decode steps of one model over one pool.

    Args:
        model, pool: on a GPU.
        logits: hidden states [B, H] to logits [B, V], as `Runner.logits`.
        capture: `CudaCapture`.
        parity: what is promised of the bits.

    Attributes:
        captured, replayed: counts.
    """

    def __init__(
        self,
        model: Model,
        pool: PagePool,
        logits: Callable[[Tensor], Tensor],
        capture: Capture,
        parity: Parity = "fast",
    ) -> None:
        self.captured = self.replayed = 0
        self._parity: Parity = parity
        self._model, self._pool, self._logits, self._capture = model, pool, logits, capture
        config = model.config
        uniform = parity == "bitwise"
        self._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, model.dtype, uniform)
        self._buckets: dict[Room, _Bucket] = {}
        self._bucket: _Bucket | None = None  # for the branches chosen
        self._seen: object = None

    def forget(self) -> None:
        """Drop the graphs and their memory: something that they read, such as the page table, is being replaced."""
        self._bucket, self._buckets = None, {}

    def _forget_moved(self) -> None:
        """Drop the graphs if a parameter or the pool has moved, or adapters changed, since they were captured."""
        adapters = self._model.adapters
        places = [p.data_ptr() for p in self._model.parameters()]
        seen = (places, adapters and adapters.state(), self._pool.keys.data_ptr())
        if seen != self._seen:
            self._seen = seen
            self.forget()

    def choose(self, slots: Slots, chosen: Longs) -> None:
        """Choose the branches of the next steps."""
        self._forget_moved()
        lengths = torch.from_numpy(slots.length[chosen])
        rows = torch.from_numpy(chosen.astype(np.int32))
        plan = slots.planner.plan(rows, lengths, uniform=self._heads.uniform)
        work = work_for(plan, self._heads)
        bucket = self._bucket_of(plan, Room.for_work(work, rounded_up(len(chosen))))
        bucket.plan.load(plan, work)
        count = len(chosen)
        settings, inputs = bucket.settings.numpy(), bucket.rows.numpy()
        for row, name in enumerate(("temperature", "top_p", "top_k", "min_p")):
            settings[row, :count] = getattr(slots, name)[chosen]
            settings[row, count:] = 1.0 if name == "top_p" else 0.0
        inputs[:, count:] = np.array([0, -1, -1, 0])[:, None]
        inputs[3, :count] = slots.stream[chosen]
        bucket.send(bucket.settings)
        self._bucket = bucket

    def _bucket_of(self, like: DecodePlan, room: Room) -> _Bucket:
        bucket = self._buckets.pop(room, None)
        if bucket is None:
            plan = ReplayPlan(like, room, self._heads)
            bucket = _Bucket(self._model, self._pool, self._logits, plan, self._parity)
            if len(self._buckets) >= MOST_GRAPHS:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[room] = bucket  # the dict is ordered by last use
        return bucket

    def decode(self, slots: Slots, chosen: Longs) -> Events:
        """Run the last token of each branch chosen and record the next one.

        Returns:
            The branches that ended or lack a page.

        Raises:
            ValueError: a branch has NaN or inf logits; then nothing is recorded.
        """
        bucket, count = self._bucket, len(chosen)
        assert bucket is not None
        bucket.rows.numpy()[:3, :count] = slots.next_rows(chosen)
        bucket.send(bucket.rows)
        slots.planner.upload()
        if bucket.replay is None:
            bucket.replay = self._capture(bucket.step)
            self.captured += 1
        bucket.replay()
        self.replayed += 1
        token, *numbers = bucket.out(count)
        if token.min() < 0:
            raise ValueError(f"sample: row {int(token.argmin())} has no distribution (NaN or inf logits)")
        code = slots.record(chosen, token.astype(np.int32), *(part.astype(np.float32) for part in numbers))
        lacks = slots.table[chosen, (slots.length[chosen] - 1) // slots.planner.page_size] < 0
        code = np.where((code == 0) & lacks, LACKS_PAGE, code)
        places = np.flatnonzero(code)
        return list(zip(places.tolist(), code[places].tolist(), strict=True))


def rounded_up(count: int) -> int:
    """Rows of the bucket for `count` branches: rounded up to three significant bits, so under a quarter is unused."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
