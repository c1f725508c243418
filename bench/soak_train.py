"""Train a tiny policy for thousands of steps and check that memory does not grow; the time of a step is recorded.

    python bench/soak_train.py                      10,000 steps
    python bench/soak_train.py --seconds 180        as many as fit

Every `--every` steps a row goes to bench/results/soak_train.csv: step, seconds so far, seconds a step since the last
row, resident memory. The exit code is 1 if the median memory of the last fifth of the rows lies more than
`--most-growth` above that of the second.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from soak_engine import resident

from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, merge
from ibtpo.stopping import Interrupted
from ibtpo.train import train

RESULTS = Path(__file__).parent / "results" / "soak_train.csv"
COLUMNS = ("step", "seconds", "seconds_a_step", "resident_mib")
TINY = {
    "sampled_tokens": 10**12,
    "prompts_per_step": 3,
    "checkpoint_every": 50,
    "trees_megabytes": 1.0,  # reached after some hundred steps, so that most of the run thins its trees
    "optim": {"lr": 1e-4},
    "sampling": {"max_tokens": 16},
    "search": {"rounds": 4},
    "digits": {"min_ops": 1, "max_ops": 1},
    "eval": {"prompts": 2, "samples": 1, "every": 500},
    "warm_start": {"max_updates": 100, "decay_updates": 30, "batch_size": 32, "pass_share": 0.0},
}


def tiny_config(out: Path) -> TrainConfig:
    """A run of the built-in task with steps of a few milliseconds."""
    config = base_config(task=None, preset="ib-tpo", file=None, run=None)
    return merge(config, {**TINY, "out": str(out)}, source="soak")


class Watch:
    """Records a row now and then, and stops the run when its time is over."""

    def __init__(self, file: IO[str], *, every: int, steps: int, seconds: float) -> None:
        self._every, self._steps, self._seconds = every, steps, seconds
        self._writer = csv.writer(file)
        self._file = file
        self._begin = self._last = time.perf_counter()
        self.rows: list[tuple[int, float, float, float]] = []
        self._writer.writerow(COLUMNS)

    def __call__(self, step: int) -> None:
        now = time.perf_counter()
        if step == 1:
            self._begin = now  # the warm start is over
        if step % self._every == 0:
            self.rows.append((step, now - self._begin, (now - self._last) / self._every, resident() / 2**20))
            self._last = now
            self._writer.writerow([step, *(f"{value:.4g}" for value in self.rows[-1][1:])])
            self._file.flush()
            print("step {:6}  {:6.0f} s  {:.4f} s a step  {:.1f} MiB".format(*self.rows[-1]), flush=True)
        if step >= self._steps or now - self._begin > self._seconds:
            os.kill(os.getpid(), signal.SIGTERM)

    def medians(self, column: int) -> tuple[float, float]:
        """Medians of a column in the second and in the last fifth of the rows."""
        fifth = max(1, len(self.rows) // 5)
        values = [row[column] for row in self.rows]
        return statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop earlier")
    parser.add_argument("--every", type=int, default=50, help="steps between rows")
    parser.add_argument("--most-growth", type=float, default=8.0, help="MiB")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, arguments.csv.open("w", newline="") as file:
        watch = Watch(file, every=arguments.every, steps=arguments.steps, seconds=arguments.seconds)
        try:
            train(tiny_config(Path(folder) / "run"), Console(quiet=True), watch)
        except Interrupted as stop:
            print(stop)
    if len(watch.rows) < 5:
        sys.exit(f"only {len(watch.rows)} rows: run longer, or lower --every")
    (early, late), (slow, slower) = watch.medians(3), watch.medians(2)
    print(f"{watch.rows[-1][0]} steps: resident {early:.1f} -> {late:.1f} MiB, a step {slow:.4f} -> {slower:.4f} s")
    if late - early > arguments.most_growth:
        sys.exit(f"memory grew by {late - early:.1f} MiB, more than {arguments.most_growth}")


if __name__ == "__main__":
    main()
