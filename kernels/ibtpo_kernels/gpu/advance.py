# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Several decode steps on a GPU without the host: a kernel that records a step and makes the rows of the next one.

With this kernel at its end, a captured step can be replayed many times in a row. It does what `DecodeStep.run` does
between two native steps, with the same results: the token drawn is recorded and becomes the row's next input, a branch
that drew a stop token or reached its limit sits out, and one that begins a page gets a spare one. For example, with
`most_ended` 0 and one spare page::

    step 0    all go on; row 1 begins a page and gets the spare one
    step 1    row 3 draws a stop token: 1 > most_ended have ended, so the run is over
       or     row 2 begins a page, none is left: the run is over, row 2 lacks a page

One program handles all rows, so that spare pages are given in the order of the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels.decoder import DecodeRun
from ibtpo_kernels.gpu.launch import FUSED, on_device
from ibtpo_kernels.gpu.staging import Staging
from ibtpo_kernels.plan import DecodePlan

_BLOCK = 512


@triton.jit
def _runs(row, count, is_first, results_ptr):
    """Whether each row is still run."""
    code = tl.load(results_ptr + row, mask=row < count, other=0)
    return (row < count) & (tl.where(is_first, 0, code) == 0)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["logprob_ptr", "raw_ptr", "entropy_ptr"])
def advance(
    drawn_ptr, logprob_ptr, raw_ptr, entropy_ptr, token_ptr, pos_ptr, address_ptr, keys_ptr, lengths_ptr, rows_ptr,
    limit_ptr, stops_ptr, spare_ptr, limits_ptr, progress_ptr, table_ptr, results_ptr, table_width, size,
    PAGE: tl.constexpr, STOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of a run; the arrays are those of `RunRows`. A run that is over does not change."""
    count, most_steps = tl.load(limits_ptr), tl.load(limits_ptr + 1)
    most_ended, num_spare = tl.load(limits_ptr + 2), tl.load(limits_ptr + 3)
    steps, ended = tl.load(progress_ptr), tl.load(progress_ptr + 1)
    given, was_over = tl.load(progress_ptr + 2), tl.load(progress_ptr + 3)
    count = tl.where(was_over == 0, count, 0)
    tl.debug_barrier()  # all threads have read these; one writes them below

    failed = count * 0 + 0x7FFFFFFF
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        runs = _runs(row, count, steps == 0, results_ptr)
        drawn = tl.load(drawn_ptr + row, mask=runs, other=0)
        failed = tl.minimum(failed, tl.min(tl.where(drawn < 0, row, 0x7FFFFFFF), 0))
    has_failed = failed < 0x7FFFFFFF
    count = tl.where(has_failed, 0, count)  # a step that fails records nothing

    num_going, num_waiting = count * 0, count * 0
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        runs = _runs(row, count, steps == 0, results_ptr)
        drawn = tl.load(drawn_ptr + row, mask=runs, other=0)
        out_ptr = results_ptr + (4 + 4 * steps) * size + row
        tl.store(out_ptr, drawn.to(tl.int32), mask=runs)
        logprob = tl.load(logprob_ptr + row, mask=runs, other=0.0)
        raw = tl.load(raw_ptr + row, mask=runs, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=runs, other=0.0)
        tl.store(out_ptr + size, logprob.to(tl.int32, bitcast=True), mask=runs)
        tl.store(out_ptr + 2 * size, raw.to(tl.int32, bitcast=True), mask=runs)
        tl.store(out_ptr + 3 * size, entropy.to(tl.int32, bitcast=True), mask=runs)

        length = tl.load(lengths_ptr + row, mask=runs, other=0) + 1
        is_stop = drawn < 0
        for i in tl.static_range(STOPS):
            is_stop |= drawn == tl.load(stops_ptr + row * STOPS + i, mask=runs, other=-1)
        ends = runs & (is_stop | (length >= tl.load(limit_ptr + row, mask=runs, other=0)))
        goes_on = runs & (ends == 0)

        column = (length - 1) // PAGE
        cell_ptr = table_ptr + tl.load(rows_ptr + row, mask=runs, other=0).to(tl.int64) * table_width + column
        page = tl.load(cell_ptr, mask=goes_on, other=0)
        lacks = goes_on & (page < 0)
        place = given + tl.cumsum(lacks.to(tl.int32), 0) - lacks.to(tl.int32)
        gets = lacks & (place < num_spare)
        page = tl.where(gets, tl.load(spare_ptr + place, mask=gets, other=0), page)
        tl.store(cell_ptr, page, mask=gets)
        tl.store(results_ptr + 2 * size + place, row, mask=gets)
        tl.store(results_ptr + 3 * size + place, column, mask=gets)
        lacks &= gets == 0
        goes_on &= lacks == 0

        tl.store(token_ptr + row, drawn, mask=goes_on)
        tl.store(pos_ptr + row, (length - 1).to(tl.int64), mask=goes_on)
        tl.store(keys_ptr + 2 * row + 1, length.to(tl.int64), mask=goes_on)
        tl.store(lengths_ptr + row, length, mask=goes_on)
        address = page.to(tl.int64) * PAGE + (length - 1) % PAGE
        tl.store(address_ptr + row, tl.where(goes_on, address, -1), mask=runs)
        tl.store(results_ptr + row, tl.where(ends, tl.where(is_stop, 1, 2), tl.where(lacks, 3, 0)), mask=runs)
        tl.store(results_ptr + size + row, tl.zeros([BLOCK], tl.int32) + steps + 1, mask=runs)
        given += tl.sum(gets.to(tl.int32), 0)
        ended += tl.sum(ends.to(tl.int32), 0)
        num_going += tl.sum(goes_on.to(tl.int32), 0)
        num_waiting += tl.sum(lacks.to(tl.int32), 0)

    steps += (count > 0).to(tl.int32)
    is_over = (steps >= most_steps) | (ended > most_ended) | (num_waiting > 0) | (num_going == 0)
    tl.store(progress_ptr, steps)
    tl.store(progress_ptr + 1, ended)
    tl.store(progress_ptr + 2, given)
    tl.store(progress_ptr + 3, is_over.to(tl.int32))
    tl.store(progress_ptr + 4, failed, mask=has_failed)


class Outcome(NamedTuple):
    """What a run recorded; column b of `tokens` and the numbers is valid for steps [0, counts[b]).

    Attributes:
        run: as `DecodeStep.run` returns it.
        columns: int32, the column of the page table of each page given.
        counts: int32 [B], tokens sampled for each branch.
        tokens: int32 [steps, B].
        logprob, logprob_raw, entropy: float32 [steps, B].
    """

    run: DecodeRun
    columns: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    logprob: npt.NDArray[np.float32]
    logprob_raw: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]


class RunRows:
    """The rows of up to `size` branches at fixed addresses, for runs of up to `most_steps` captured decode steps.

    Before a run the host fills `host` and calls `begin`; each step reads `there` and ends with `advance`; after the run
    the host reads `outcome`. Arrays of `host` and `there`, one entry a branch:

        token, pos, address: int64, the row: its token, position and slot for its key and value (-1: it writes none).
        keys: int64 [size, 2], (stream, position) of the token to sample.
        temperature, top_p, min_p: float64; top_k: int64.
        lengths: int32, pos + 1; for the plan.
        limit: int32, the length at which the branch ends.
        stops: int32 [size, num_stops], padded with -1.

    Rows behind the `count` of `begin`, at first all, are unused: at position -1 they see and write nothing.
    """

    def __init__(self, size: int, num_stops: int, most_steps: int, device: torch.device) -> None:
        long, real, word = torch.int64, torch.float64, torch.int32
        named: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        named = dict.fromkeys(("token", "pos", "address", "top_k"), (long, (size,)))
        named |= dict.fromkeys(("temperature", "top_p", "min_p"), (real, (size,)))
        named |= dict.fromkeys(("lengths", "limit", "spare"), (word, (size,)))
        named |= {"keys": (long, (size, 2)), "stops": (word, (size, num_stops))}
        named |= {"limits": (word, (4,)), "progress": (word, (5,))}
        self.size = size
        self.most_steps = most_steps
        self._staging = Staging(device, **named)
        self.host, self.there = self._staging.host, self._staging.there
        self._results = torch.zeros(4 + 4 * most_steps, size, dtype=word, device=device)
        self.there["pos"].fill_(-1)
        self.there["address"].fill_(-1)

    def begin(
        self, count: int, most: int = 1, *, most_ended: int = 0, spare: npt.NDArray[np.int32] | None = None
    ) -> None:
        """Begin a run of `count` branches; arguments as `DecodeStep.run`, and what `host` holds, go to the device."""
        host, spare = self.host, np.empty(0, np.int32) if spare is None else spare[: self.size]
        for name, unused in (("pos", -1), ("address", -1), ("lengths", 0), ("temperature", 0)):
            host[name][count:] = unused
        host["limits"][:] = count, min(most, self.most_steps), most_ended, len(spare)
        host["spare"][: len(spare)] = spare
        self._staging.send()

    def advance(self, drawn: tuple[Tensor, Tensor, Tensor, Tensor], plan: DecodePlan) -> None:
        """Record what `sample` returned for the rows, and make the next ones; `plan` has their lengths."""
        there, table = self.there, plan.page_table
        with on_device(table):
            advance[(1,)](
                *drawn, *(there[name] for name in ("token", "pos", "address", "keys", "lengths")), plan.rows,
                *(there[name] for name in ("limit", "stops", "spare", "limits", "progress")), table, self._results,
                table.shape[1], self.size, PAGE=plan.page_size, STOPS=there["stops"].shape[1],
                BLOCK=_BLOCK, **FUSED, num_warps=8, maxnreg=255,
            )  # fmt: skip

    def is_over(self) -> bool:
        """Whether another step would change nothing; waits for the device."""
        self._progress = self.there["progress"].cpu().tolist()
        return bool(self._progress[3])

    def outcome(self) -> Outcome:
        """The results of a run that is over.

        Raises:
            ValueError: a row has NaN or inf logits in the first step; nothing is recorded.
        """
        steps, _, given, _, failed = self._progress
        if steps == 0:
            raise ValueError(f"sample: row {failed} has no distribution (NaN or inf logits)")
        count = int(self.host["limits"][0])
        results: npt.NDArray[Any] = self._results[: 4 + 4 * steps].cpu().numpy()
        code, counts = results[0, :count], results[1, :count]
        ends = np.flatnonzero(code)
        ends = ends[np.argsort(counts[ends], kind="stable")]
        events = list(zip(ends.tolist(), code[ends].tolist(), strict=True))
        run = DecodeRun(steps, int(counts.sum()), events, results[2, :given].tolist())
        tokens, *numbers = results[4:, :count].reshape(steps, 4, count).swapaxes(0, 1)
        logprob, logprob_raw, entropy = (part.view(np.float32) for part in numbers)
        return Outcome(run, results[3, :given], counts, tokens, logprob, logprob_raw, entropy)
