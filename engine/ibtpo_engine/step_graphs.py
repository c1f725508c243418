"""Decode steps on a GPU as captured CUDA graphs.

A step launches some ten kernels a layer, most of which take less time than their launch; replayed as a graph they are
one launch. A captured step ends by making the rows of the next one, so a run of steps needs the host only at its ends::

    host      plan, settings, rows, spare pages                                  tokens, log-probs, entropies
                 | one or two transfers                                             ^  one
    device       +--> [ model -> logits -> sample -> record, next rows ] ... [ ] ---+
                        captured once a bucket, then replayed until few branches are left

After each step the host waits for five numbers, from which it sees whether to replay another one.

A bucket is a number of rows and the room of its plan, both rounded up. Unused rows are at position -1: they see
nothing, write nothing, and what they sample is ignored. Weights are read in place, so graphs survive in-place updates;
if a parameter, the pool or the page table has moved, all are captured anew.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ibtpo_engine.arrays import Ints, Longs
from ibtpo_engine.capture import Capture
from ibtpo_engine.model import Model
from ibtpo_engine.paged_attention import PagedAttention
from ibtpo_engine.pages import PagePool
from ibtpo_engine.parity import Parity, project_for
from ibtpo_engine.runner import MOST_STEPS
from ibtpo_engine.slots import Slots
from ibtpo_kernels import DecodePlanner, DecodeRun, sample
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.advance import RunRows
from ibtpo_kernels.gpu.replay import Heads, ReplayPlan, Room, work_for

MOST_GRAPHS = 48  # beyond this, the least recently used one is dropped


class _Bucket:
    """A captured step of at most `rows.size` rows; it is captured while all rows are unused, since that runs it."""

    def __init__(
        self,
        model: Model,
        pool: PagePool,
        logits: Callable[[Tensor], Tensor],
        rows: RunRows,
        plan: ReplayPlan,
        parity: Parity,
        capture: Capture,
    ) -> None:
        self.rows, self.plan = rows, plan
        self._model, self._pool, self._logits, self._project = model, pool, logits, project_for(parity)
        self.replay = capture(self.step)

    def step(self) -> None:
        """The step that is captured."""
        there, plan = self.rows.there, self.plan.plan
        attention = PagedAttention(self._pool, plan, there["address"], *self._model.rotation(there["pos"]))
        drawn = sample(
            self._logits(self._model(there["token"], attention, self._project)),
            there["keys"],
            temperature=there["temperature"],
            top_p=there["top_p"],
            top_k=there["top_k"],
            min_p=there["min_p"],
        )
        self.rows.advance(drawn, plan)


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
        self._buckets: dict[tuple[Room, int], _Bucket] = {}
        self._bucket: _Bucket | None = None  # for the branches chosen
        self._grown = 0  # steps since then
        self._is_sending = False  # may a transfer to the device still read pinned memory?
        self._seen: object = None

    def forget(self) -> None:
        """Drop the graphs and their memory: something that they read, such as the page table, is being replaced."""
        self._bucket, self._buckets = None, {}

    def weights_changed(self) -> None:
        """Drop the graphs if a parameter has moved or adapters changed since they were captured."""
        adapters = self._model.adapters
        seen = ([p.data_ptr() for p in self._model.parameters()], adapters and adapters.state())
        if seen != self._seen:
            self._seen = seen
            self.forget()

    def choose(self, slots: Slots, chosen: Longs) -> None:
        """Choose the branches of the next runs.

        Raises:
            ValueError: a bucket is captured, and a weight is NaN or inf.
        """
        if self._is_sending:  # an interrupt came before the device was waited for
            torch.cuda.synchronize(self._model.device)
        self._is_sending = True
        planner, count, rows = slots.planner, len(chosen), chosen.astype(np.int32)
        lengths = torch.from_numpy(slots.length[chosen])
        plan = planner.host_plan(torch.from_numpy(rows), lengths, uniform=self._heads.uniform)
        work = work_for(plan, self._heads)
        bucket = self._bucket_of(planner, Room.for_work(work, rounded_up(count)), slots.stops.shape[1])
        bucket.plan.load(rows, work)
        host = bucket.rows.host
        for name in ("temperature", "top_p", "top_k", "min_p", "limit", "stops"):
            host[name][:count] = getattr(slots, name)[chosen]
        host["keys"][:count, 0] = slots.stream[chosen]
        self._bucket, self._grown = bucket, 0

    def _bucket_of(self, planner: DecodePlanner, room: Room, num_stops: int) -> _Bucket:
        bucket = self._buckets.pop((room, num_stops), None)
        if bucket is None:
            rows = RunRows(room.queries, num_stops, MOST_STEPS, self._model.device)
            plan = ReplayPlan(planner.table, planner.page_size, room, self._heads, rows.there["lengths"])
            bucket = _Bucket(self._model, self._pool, self._logits, rows, plan, self._parity, self._capture)
            self.captured += 1
            if len(self._buckets) >= MOST_GRAPHS:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[room, num_stops] = bucket  # the dict is ordered by last use
        return bucket

    def decode(
        self, slots: Slots, chosen: Longs, most: int = 1, *, most_ended: int = 0, spare: Ints | None = None
    ) -> DecodeRun:
        """Run the last token of each branch chosen and record the next one; arguments as `DecodeStep.run`.

        Once they have grown by a split, they are planned anew: one program walks all the splits that a path has gained.

        Raises:
            ValueError: a branch has NaN or inf logits in the first step; then nothing is recorded.
        """
        if self._grown >= configs.SPLIT:
            self.choose(slots, chosen)
        assert self._bucket is not None
        try:
            return self._run(self._bucket, slots, chosen, most, most_ended, spare)
        except BaseException:  # an interrupt: the device's table may have pages that ours does not get
            self._grown = configs.SPLIT  # choose again, which waits, before the host writes
            for slot in chosen.tolist():
                slots.planner.rewrote(slot)
            raise

    def _run(
        self, bucket: _Bucket, slots: Slots, chosen: Longs, most: int, most_ended: int, spare: Ints | None
    ) -> DecodeRun:
        rows, host, count = bucket.rows, bucket.rows.host, len(chosen)
        host["token"][:count], host["pos"][:count], host["address"][:count] = slots.next_rows(chosen)
        host["lengths"][:count] = host["keys"][:count, 1] = slots.length[chosen]
        slots.planner.upload()
        self._is_sending = True
        rows.begin(count, most, most_ended=most_ended, spare=spare)
        self._replay(bucket)
        outcome = rows.outcome()
        run = outcome.run
        self._grown += run.steps
        if run.paged:  # the device's table has them
            slots.table[chosen[run.paged], outcome.columns] = spare[: len(run.paged)]  # type: ignore[index]
        slots.record_run(chosen, *outcome[2:])
        return run

    def _replay(self, bucket: _Bucket) -> None:
        """Replay a step until the run is over."""
        is_over = False
        while not is_over:
            bucket.replay()
            self.replayed += 1
            is_over = bucket.rows.is_over()
        self._is_sending = False


def rounded_up(count: int) -> int:
    """Rows of the bucket for `count` branches: rounded up to three significant bits, so under a quarter is unused."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
