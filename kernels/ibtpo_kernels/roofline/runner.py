"""One problem: contenders are loaded, checked against ours, and timed against each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ibtpo_kernels.roofline.machine import cache_bytes
from ibtpo_kernels.roofline.problem import Contender, Inputs, Prepare, Problem, Run, Unavailable, verify
from ibtpo_kernels.roofline.timing import Budget, Clock, Timing, clock_for, estimate, interleave

_MOST_SETS = 64
_MOST_BYTES = 8 << 30  # of all sets of inputs together


@dataclass(frozen=True)
class Result:
    """The result of one contender: a timing, or the reason why there is none."""

    contender: Contender
    timing: Timing | None
    reason: str = ""


@dataclass(frozen=True)
class _Ready:
    """A contender that passed the check, prepared on every set of inputs."""

    contender: Contender
    runs: list[Run]
    repetitions: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a device lost to a stray kernel; `results` are of the contenders that were ready by then."""

    def __init__(self, results: list[Result]) -> None:
        super().__init__()
        self.results = results


def num_sets(working_set: int, cache: int) -> int:
    """Sets of inputs to rotate through, at least two, so that none is still in the cache when its turn comes."""
    needed = -(-3 * cache // max(working_set, 1)) + 1
    affordable = _MOST_BYTES // max(working_set, 1)
    return max(2, min(needed, affordable, _MOST_SETS))


def run(
    problem: Problem, device: torch.device, budget: Budget, clock: Clock | None = None, *, until: float = math.inf
) -> list[Result]:
    """Measure a problem. An error of one contender does not stop the others; its result holds the reason.

    Making one ready may compile for minutes: after `until`, of `time.monotonic`, no further one is begun, and those
    ready are timed. Contenders without a result were not reached.

    Raises:
        Interrupted: by Ctrl-C, after those ready were timed; or the device answers every call with an error.
    """
    clock = clock or clock_for(device, host_work=problem.which == "plan")
    try:
        sets = _draw(problem, device)
    except Exception as error:  # out of memory
        return [Result(contender, None, _reason(error)) for contender in problem.contenders]
    found: list[_Ready | Result] = []
    timed: dict[str, Result] = {}
    stop: BaseException | None = None
    with problem.context():
        try:
            for contender in _make_ready(problem, sets, budget, clock, until):
                found.append(contender)
        except (KeyboardInterrupt, RuntimeError) as error:
            stop = error
        try:
            if not isinstance(stop, RuntimeError):
                timed = _time([x for x in found if isinstance(x, _Ready)], clock)
        except RuntimeError as error:  # from the clock, not from a contender
            stop = error
    lost = "the device was lost"
    results = [
        timed.get(x.contender.who, Result(x.contender, None, lost)) if isinstance(x, _Ready) else x for x in found
    ]
    if stop:
        raise Interrupted(results) from stop
    del sets, found
    _free(device)
    return results


def _draw(problem: Problem, device: torch.device) -> list[Inputs]:
    count = num_sets(problem.working_set, cache_bytes(device))
    return [problem.draw(device, torch.Generator(device).manual_seed(seed)) for seed in range(count)]


def _free(device: torch.device) -> None:
    """Free a GPU's cached memory, since the next contender may need it in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _make_ready(
    problem: Problem, sets: Sequence[Inputs], budget: Budget, clock: Clock, until: float
) -> Iterator[_Ready | Result]:
    loaded = [(contender, _load(contender)) for contender in problem.contenders]
    reference = next((prepare for c, prepare in loaded if c.kind == "ours" and not isinstance(prepare, Result)), None)
    for contender, prepare in loaded:
        if time.monotonic() > until:
            return
        if isinstance(prepare, Result):
            yield prepare
            continue
        found: _Ready | Result
        try:
            found = _ready(problem, contender, prepare, reference, sets, budget, clock)
        except Exception as error:  # a peer may raise anything
            found = Result(contender, None, _reason(error))
        yield found
        if isinstance(found, Result) and sets[0].leaves:  # not in the handler, where the error keeps tensors alive
            _free(sets[0].leaves[0].device)


def _load(contender: Contender) -> Prepare | Result:
    try:
        return contender.load()
    except Exception as error:  # a peer's import may raise anything
        return Result(contender, None, _reason(error))


def _ready(
    problem: Problem,
    contender: Contender,
    prepare: Prepare,
    reference: Prepare | None,
    sets: Sequence[Inputs],
    budget: Budget,
    clock: Clock,
) -> _Ready:
    runs = [prepare(inputs) for inputs in sets]
    if reference is None:
        if contender.is_checked:
            raise Unavailable("ours did not run, so there is nothing to check against")
    elif problem.which != "plan":
        verify(problem, contender, runs[0], reference, sets[0])
    return _Ready(contender, runs, budget.repetitions(estimate(clock, runs)))


def _time(ready: list[_Ready], clock: Clock) -> dict[str, Result]:
    """Results by contender. One that fails now, for example for lack of memory, is dropped with its reason."""
    failures: dict[str, str] = {}

    def guarded(who: str, run: Run) -> Callable[[], object]:
        def call() -> object:
            try:
                return run()
            except Exception as error:
                return failures.setdefault(who, _reason(error))

        return call

    calls = [[guarded(x.contender.who, run) for run in x.runs] for x in ready]
    seconds = interleave(clock, calls, [x.repetitions for x in ready])
    found = {}
    for x, of_x in zip(ready, seconds, strict=True):
        reason = failures.get(x.contender.who, "")
        found[x.contender.who] = Result(x.contender, None if reason else Timing.of(of_x), reason)
    return found


def _reason(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if not isinstance(error, (Unavailable, ValueError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else text[:157] + "..."
