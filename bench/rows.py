"""Rows of engine measurements: timed in turns, labelled with machine and commit, written to bench/results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ibtpo_kernels.roofline.machine import here
from ibtpo_kernels.roofline.timing import Timing, WallClock, interleave

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        case: the workload; x: the value of the varied quantity, if there is one.
        who: the contender.
        tokens: number of tokens sampled in one call.
        timing: of the calls, None if it could not be measured.
        note: a remark on the contender, or why it was not measured.
    """

    case: str
    x: float | int
    who: str
    tokens: int
    timing: Timing | None
    note: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.timing.median if self.timing else float("nan")

    def cells(self) -> dict[str, object]:
        """The row by CSV column."""
        t = self.timing
        seconds = {} if t is None else {"median_s": t.median, "p20_s": t.p20, "p80_s": t.p80}
        numbers = {name: f"{value:.6g}" for name, value in seconds.items()}
        return {
            "case": self.case,
            "x": self.x,
            "who": self.who,
            "tokens": self.tokens,
            "median_s": numbers.get("median_s", ""),
            "p20_s": numbers.get("p20_s", ""),
            "p80_s": numbers.get("p80_s", ""),
            "repetitions": 0 if t is None else t.repetitions,
            "tokens_per_s": "" if t is None else f"{self.tokens_per_second:.5g}",
            "note": self.note,
        }


Call = Callable[[], int]
"""Does the work once and returns the number of tokens sampled."""


def compare(
    case: str,
    x: float | int,
    contenders: dict[str, Call],
    repetitions: int,
    *,
    settle: float = 0.0,
    device: torch.device = CPU,
) -> list[Row]:
    """Time contenders in turns, A B A B, after a call of each; one that fails gets a row with the reason and no times.

    `settle`: seconds to wait before each call, as in `interleave`. `device`: synchronised after each call.
    """
    rows, ready = [], {}
    for who, call in contenders.items():
        try:
            tokens = call()
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:160]
            rows.append(Row(case, x, who, 0, None, reason))
        else:
            ready[who] = call, tokens
    calls = [[call] for call, _ in ready.values()]
    seconds = interleave(WallClock(device), calls, [repetitions] * len(ready), settle=settle)
    rows += [
        Row(case, x, who, tokens, Timing.of(found))
        for (who, (_, tokens)), found in zip(ready.items(), seconds, strict=True)
    ]
    for row in rows:
        print(f"{row.case:28} {row.x:>9} {row.who:28} {row.tokens_per_second:12,.0f} tokens/s  {row.note}", flush=True)
    return rows


def write(path: Path, rows: list[Row], device: torch.device = CPU) -> None:
    """Replace the rows of the same cases, keep the others; `device` is the one they were measured on."""
    stamp = asdict(here(device))
    fresh = [stamp | row.cells() for row in rows]
    cases = {row.case for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [old for old in csv.DictReader(file) if old["case"] not in cases]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(fresh[0]))
        writer.writeheader()
        writer.writerows([*kept, *fresh])
    part.replace(path)


def append(path: Path, values: Mapping[str, object]) -> None:
    """Add one line to a CSV, with a header if the file is new; print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(values))
        if new:
            writer.writeheader()
        writer.writerow(values)
    print(values)
