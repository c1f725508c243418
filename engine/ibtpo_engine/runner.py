"""One forward pass of the model over rows of the page pool.

A row is one token of one path: its id, its position, the pool slot for its key and value (-1: they are there already),
and the page-table row of its path. Decoding, chunked prefill and recomputing a single token all use rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ibtpo_engine.arrays import Ints, Longs
from ibtpo_engine.capture import Capture
from ibtpo_engine.model import Model
from ibtpo_engine.native import native_decoder
from ibtpo_engine.paged_attention import PagedAttention
from ibtpo_engine.pages import PAGE, PagePool
from ibtpo_engine.parity import Parity, check_parity, project_for
from ibtpo_engine.slots import Slots
from ibtpo_engine.threads import threads_for
from ibtpo_kernels import (
    DecodePlan,
    DecodePlanner,
    Decoder,
    DecodeRun,
    DecodeStep,
    active_backend,
    batch_invariant_linear,
    fastest_linear,
)

if TYPE_CHECKING:
    from ibtpo_engine.step_graphs import StepGraphs

MOST_STEPS = 16
"""Most decode steps in one call, between which nothing else is done; in 16 every branch begins a page."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """T rows to compute; rows of one path must be neighbours for shared pages to be read once.

    Attributes:
        tokens: int64 [T].
        pos: int64 [T], depth of each token on its path.
        address: int64 [T], page * PAGE + offset for its key and value; -1 writes nothing.
        row: int32 [T], the page-table row of its path.
    """

    tokens: Longs
    pos: Longs
    address: Longs
    row: Ints

    def followed_by(self, others: Rows) -> Rows:
        """These rows, then others."""
        both = zip(vars(self).values(), vars(others).values(), strict=True)
        return Rows(*(np.concatenate(arrays) for arrays in both))


class Runner:
    """Runs rows; keeps the attention plan while the set of rows stays the same.

    A model that `native_decoder` accepts runs there, any other as a torch module. The native decoder is always bitwise,
    the module only with `parity="bitwise"`. With `capture` the module's decode steps are captured and replayed
    (`step_graphs`, which needs Triton).
    """

    def __init__(self, model: Model, pool: PagePool, parity: Parity = "fast", capture: Capture | None = None) -> None:
        self.model = model
        self.pool = pool
        self.parity: Parity = parity
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._plan: DecodePlan | None = None
        self._planned: Ints = np.empty(0, np.int32)  # the rows that _plan is for
        self._decoder: Decoder | None = None
        self._step: DecodeStep | None = None
        self._chosen: Longs | None = None  # the slots that the step or graph runs
        self.graphs: StepGraphs | None = None
        if capture is not None:
            from ibtpo_engine.step_graphs import StepGraphs  # needs Triton

            self.graphs = StepGraphs(model, pool, self.logits, capture, parity)
        self.weights_changed()

    def invalidate(self) -> None:
        """The set of rows changed: plan anew at the next `forward` or `decode`."""
        self._plan = self._chosen = None

    def forget(self) -> None:
        """Drop recorded and captured steps: slots or pool are about to be replaced."""
        self._step = None
        if self.graphs is not None:
            self.graphs.forget()
        self.invalidate()

    def weights_changed(self) -> None:
        """Rebuild the native decoder, and drop captured graphs if parameters have moved."""
        self._decoder = native_decoder(self.model, max_positions=(self.pool.num_pages + 1) * PAGE)
        self._step = None
        if self.graphs is not None:
            self.graphs.weights_changed()

    @property
    def is_native(self) -> bool:
        """Whether a forward pass is one native call."""
        return self._decoder is not None and active_backend(_CPU) == "cpu"

    @property
    def has_step(self) -> bool:
        """Whether `decode` can run a step that has only decode rows."""
        return self.is_native or self.graphs is not None

    def threads(self, num_rows: int) -> AbstractContextManager[None]:
        """The CPU threads for a step of so many rows."""
        if self.is_native or self.model.device.type != "cpu":  # the native decoder chooses them itself
            return nullcontext()
        return threads_for(2.0 * self._num_parameters * num_rows)

    def forward(self, rows: Rows, planner: DecodePlanner) -> Tensor:
        """Hidden states [T, H] of `rows`; the table of `planner` holds the pages of their paths."""
        device = self.model.device
        tokens, pos, address = torch.from_numpy(np.stack([rows.tokens, rows.pos, rows.address])).to(device)
        if self._plan is None or not np.array_equal(self._planned, rows.row):
            lengths = (rows.pos + 1).astype(np.int32)
            row, uniform = torch.from_numpy(rows.row), self.parity == "bitwise"
            self._plan = planner.plan(row, torch.from_numpy(lengths), uniform=uniform)
            self._planned = rows.row  # last: an interrupt of `plan` must not leave an older plan under these rows
        else:  # same rows, one token further; some have a new page
            self._plan.lengths.copy_(pos + 1)
            planner.upload()
        if self._decoder is not None and self.is_native:
            return self._decoder.forward(tokens, pos, address, self._plan, self.pool.keys, self.pool.values)
        check_parity(self.parity, dtype=self.model.dtype, device=device)  # the backend may have changed
        attend = PagedAttention(self.pool, self._plan, address, *self.model.rotation(pos))
        hidden: Tensor = self.model(tokens, attend, project_for(self.parity))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, V], float32 or the model's type, which `sample` reads; with the bits of `decode` if native."""
        if self.is_native or self.parity == "bitwise":
            return batch_invariant_linear(hidden, self.model.head)
        logits = fastest_linear(hidden, self.model.head)
        return logits if logits.dtype is torch.bfloat16 else logits.float()

    def announce(self, num_rows: int) -> None:
        """Announce a `decode` of so many rows, so that the native decoder's threads wake up meanwhile."""
        if self._decoder is not None:
            self._decoder.announce(num_rows)

    def decode(
        self, slots: Slots, chosen: Longs, most: int = 1, *, most_ended: int = 0, spare: Ints | None = None
    ) -> DecodeRun:
        """Run the last token of each slot chosen and record the next one, natively or by replaying a graph.

        Requires `has_step`. For `most` steps, `most_ended` and `spare` see `DecodeStep.run`.
        """
        if not self.is_native:
            assert self.graphs is not None
            if self._chosen is not chosen:
                self.graphs.choose(slots, chosen)
                self._chosen = chosen
            return self.graphs.decode(slots, chosen, most, most_ended=most_ended, spare=spare)
        assert self._decoder is not None
        if self._step is None or not self._step.is_current(self.pool.keys, self.pool.values):
            self._step, self._chosen = self._decoder.record(slots, self.pool.keys, self.pool.values), None
        if self._chosen is not chosen:
            lengths = torch.from_numpy(slots.length[chosen])
            plan = slots.planner.plan(torch.from_numpy(chosen.astype(np.int32)), lengths)
            self._step.choose(chosen, plan.items)
            self._chosen = chosen
        return self._step.run(most, most_ended=most_ended, spare=spare)
