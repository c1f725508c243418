"""The running branches as arrays, so that a decode step costs no Python per branch."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ibtpo_engine.arrays import Floats, Ints, Longs
from ibtpo_engine.features import Features, FeatureTable
from ibtpo_engine.pages import PAGE
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.shaping import sample_shaped
from ibtpo_kernels import DecodePlanner

Number = TypeVar("Number", np.int32, np.int64, np.float32)
Outputs = tuple[Ints, Floats, Floats, Floats]  # tokens, logprob, logprob_raw, entropy of one branch, each [n]

FINISH = (None, "stop", "length")
LACKS_PAGE = 3  # a further code of a decode step: the branch goes on once it has another page


class Slots:
    """Structure of arrays; a branch keeps its slot from start to end.

    Interval picture of slot s on its path::

        0 ......... start[s] .................. length[s] ..... limit[s]
        [ancestors )[sampled here: out_tokens  )               most it may reach

    Attributes:
        table: int32 [num, max_pages], page ids of the path; -1 past them. Written by `take` and `add_page` alone.
        planner: plans steps over the table; it is told of each write.
        start, length, limit: int32 [num], depths as drawn above.
        before: int32 [num], the token at depth start - 1: while length == start, the next row repeats this token,
            whose key and value are there.
        stream: int64 [num], names the branch's random numbers.
        temperature, top_p, min_p: float32 [num]; top_k: int32 [num].
        stops: int64 [num, S], stop tokens, padded with -1.
        features: what some of the branches need beyond a plain step.
        tokens: int32 [num, width], sampled; logprob, logprob_raw, entropy: float32 [num, width], theirs.
    """

    OUTPUTS = ("tokens", "logprob", "logprob_raw", "entropy")

    def __init__(self, num: int, max_pages: int, device: torch.device | None = None) -> None:
        self.table: Ints = np.full((num, max_pages), -1, np.int32)
        elsewhere = device if device is not None and device.type != "cpu" else None
        self.planner = DecodePlanner(torch.from_numpy(self.table), page_size=PAGE, device=elsewhere)
        self.start: Ints = np.zeros(num, np.int32)
        self.length: Ints = np.zeros(num, np.int32)
        self.limit: Ints = np.zeros(num, np.int32)
        self.before: Ints = np.zeros(num, np.int32)
        self.stream: Longs = np.zeros(num, np.int64)
        self.temperature: Floats = np.ones(num, np.float32)
        self.top_p: Floats = np.ones(num, np.float32)
        self.top_k: Ints = np.zeros(num, np.int32)
        self.min_p: Floats = np.zeros(num, np.float32)
        self.stops: Longs = np.full((num, 1), -1, np.int64)
        self.tokens: Ints = np.zeros((num, 64), np.int32)
        self.logprob: Floats = np.zeros((num, 64), np.float32)
        self.logprob_raw: Floats = np.zeros((num, 64), np.float32)
        self.entropy: Floats = np.zeros((num, 64), np.float32)
        self.features = FeatureTable()
        self._free = list(range(num - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots not taken."""
        return len(self._free)

    def take(self, pages: list[int]) -> int:
        """Reserve a slot whose path has these pages."""
        slot = self._free.pop()
        self.table[slot, : len(pages)] = pages
        self.table[slot, len(pages) :] = -1
        self.planner.rewrote(slot)
        return slot

    def add_page(self, slot: int, column: int, page: int) -> None:
        """Put a page at the end of the slot's path."""
        self.table[slot, column] = page
        if self.planner.keeps_copy:
            self.planner.extended(slot, column)

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)
        self.features.by_slot.pop(slot, None)

    def begin(
        self,
        slot: int,
        *,
        start: int,
        before: int,
        limit: int,
        stream: int,
        sampling: Sampling,
        features: Features | None = None,
    ) -> None:
        """Set up a branch that has sampled nothing yet."""
        self.start[slot] = self.length[slot] = start
        self.before[slot] = before
        self.limit[slot] = limit
        self.stream[slot] = stream
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = sampling.top_k
        self.min_p[slot] = sampling.min_p
        if len(sampling.stop_tokens) > self.stops.shape[1]:
            self.stops = _widen(self.stops, len(sampling.stop_tokens), fill=-1)
        self.stops[slot] = -1
        self.stops[slot, : len(sampling.stop_tokens)] = sampling.stop_tokens
        if features is not None:
            self.features.by_slot[slot] = features
        if limit - start > self.tokens.shape[1]:
            width = max(limit - start, 2 * self.tokens.shape[1])
            for name in self.OUTPUTS:
                setattr(self, name, _widen(getattr(self, name), width, fill=0))

    def next_rows(self, slots: Longs) -> tuple[Ints, Ints, Longs]:
        """The next decode row of each slot.

        Returns:
            (token int32 [n], depth int32 [n], address int64 [n]: page * PAGE + offset of its key and value; -1 for the
            token before a branch that has sampled nothing).
        """
        depth, start = self.length[slots] - 1, self.start[slots]
        begins = depth < start
        token = np.where(begins, self.before[slots], self.tokens[slots, np.maximum(depth - start, 0)])
        page = self.table[slots, depth // PAGE].astype(np.int64)
        return token, depth, np.where(begins, -1, page * PAGE + depth % PAGE)

    def outputs(self, slot: int) -> Outputs:
        """Copies of what the slot has sampled: tokens, logprob, logprob_raw, entropy, each [n]."""
        n = self.length[slot] - self.start[slot]
        tokens, *floats = (getattr(self, name)[slot, :n].copy() for name in self.OUTPUTS)
        return (tokens, *floats)

    def follow(self, slots: Longs, code: Longs) -> list[tuple[int, BaseException]]:
        """After `record`: see `FeatureTable.follow`."""
        last = self.tokens[slots, self.length[slots] - self.start[slots] - 1]
        return self.features.follow(slots, code, self.length, last.tolist())

    def draw(self, slots: Longs, logits: torch.Tensor) -> tuple[npt.NDArray[Any], ...]:
        """Sample the next token of each slot from its logits [len(slots), V]; returns what `record` takes."""
        shapes = []
        for i, slot in enumerate(slots.tolist()) if self.features else ():
            shape = self.features.shape(slot, int(self.length[slot]))
            if shape is not None:
                shapes.append((i, shape, self.tokens[slot, : self.length[slot] - self.start[slot]]))
        whole = np.stack([self.stream[slots], self.length[slots], self.top_k[slots]])
        reals = np.stack([self.temperature[slots], self.top_p[slots], self.min_p[slots]]).astype(np.float64)
        there = torch.from_numpy(np.concatenate([whole, reals.view(np.int64)])).to(logits.device)  # one copy
        temperature, top_p, min_p = there[3:].view(torch.float64)
        drawn = sample_shaped(
            logits, there[:2].T, shapes, temperature=temperature, top_p=top_p, top_k=there[2], min_p=min_p
        )
        token, *numbers = torch.stack([part.double() for part in drawn]).cpu().numpy()
        return (token.astype(np.int32), *(part.astype(np.float32) for part in numbers))

    def restore(self, slot: int, outputs: Outputs) -> None:
        """Put back what `outputs` took."""
        for name, values in zip(self.OUTPUTS, outputs, strict=True):
            getattr(self, name)[slot, : len(values)] = values
        self.length[slot] = self.start[slot] + len(outputs[0])

    def record(self, slots: Longs, token: Ints, logprob: Floats, logprob_raw: Floats, entropy: Floats) -> Longs:
        """Append one sampled token to each slot.

        Returns:
            int64 [len(slots)]: index into `FINISH`; 0 where the branch goes on.
        """
        column = self.length[slots] - self.start[slots]
        self.tokens[slots, column] = token
        self.logprob[slots, column] = logprob
        self.logprob_raw[slots, column] = logprob_raw
        self.entropy[slots, column] = entropy
        self.length[slots] += 1
        stopped = (token[:, None] == self.stops[slots]).any(1)
        return np.where(stopped, 1, np.where(self.length[slots] >= self.limit[slots], 2, 0))

    def record_run(
        self, slots: Longs, count: Ints, tokens: Ints, logprob: Floats, logprob_raw: Floats, entropy: Floats
    ) -> None:
        """Append the first `count[i]` of the sampled tokens [steps, n] to slot i of [n]; the numbers likewise."""
        sampled = np.arange(len(tokens))[:, None] < count
        step, place = np.nonzero(sampled)
        slot = slots[place]
        cell = slot * self.tokens.shape[1] + self.length[slot] - self.start[slot] + step
        for name, values in zip(self.OUTPUTS, (tokens, logprob, logprob_raw, entropy), strict=True):
            getattr(self, name).reshape(-1)[cell] = values[sampled]
        self.length[slots] += count


def _widen(array: npt.NDArray[Number], width: int, *, fill: int) -> npt.NDArray[Number]:
    wide = np.zeros((array.shape[0], width), array.dtype)  # costs no memory before it is written to
    if fill:
        wide.fill(fill)
    wide[:, : array.shape[1]] = array
    return wide
