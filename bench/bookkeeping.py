"""The engine's own time in a decode step: the step's time minus the native call's, over live branches.

.venv/bin/python bench/bookkeeping.py [--steps N] [--out FOLDER]

The built-in policy is the smallest model; for larger ones the share is smaller. Only steps in which every branch
decodes are counted, including page boundaries: branches that start in the same step after prompts of equal length begin
their pages together; with prompts of `PAGE` different lengths some branch begins a page in nearly every step. Writes
bookkeeping.csv: seconds a step and its native part (medians), and the engine's share of the time of all steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import CPU, RESULTS

from ibtpo.policy import built_in_policy
from ibtpo_engine import Engine, Sampling
from ibtpo_engine.engine import MOST_STEPS
from ibtpo_engine.pages import PAGE
from ibtpo_kernels import DecodeRun, DecodeStep
from ibtpo_kernels.roofline.machine import here

PROMPT, NEW = 64, 96


def measure(branches: int, siblings: int, steps: int, shortest: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of its native part, with `branches` live branches, `siblings` a prompt.

    Prompts have `shortest` to `PROMPT` tokens.
    """
    policy = built_in_policy(0, dtype=torch.float32, device=CPU)
    engine = Engine(policy.model, kv_tokens=branches * (PROMPT + NEW + 32), max_branches=branches)
    draw = np.random.default_rng(0)
    sizes = draw.integers(shortest, PROMPT + 1, branches // siblings)
    trees = [engine.tree(draw.integers(1, 14, size)) for size in sizes]
    engine._submit([node for tree in trees for node in tree.root.fork(siblings)], Sampling(max_tokens=NEW))
    while len(engine.scheduler.running) < branches:
        engine._step()
    whole, native = [], []
    run = DecodeStep.run

    def timed(step: DecodeStep, most: int, **more: Any) -> DecodeRun:
        begin = time.perf_counter()
        done = run(step, most, **more)
        native.extend([(time.perf_counter() - begin) / done.steps] * done.steps)
        return done

    DecodeStep.run = timed  # type: ignore[method-assign]
    try:
        while len(whole) < min(steps, NEW - MOST_STEPS - 2):
            begin, before = time.perf_counter(), engine.scheduler.counters.steps
            engine._step(MOST_STEPS)
            taken = engine.scheduler.counters.steps - before
            whole.extend([(time.perf_counter() - begin) / taken] * taken)
    finally:
        DecodeStep.run = run  # type: ignore[method-assign]
    assert len(whole) == len(native), "a step was not one native call"
    return whole, native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    rows = []
    for branches, siblings, lengths in product((32, 128, 512, 1024), (1, 16), (1, PAGE)):
        whole, native = measure(branches, siblings, options.steps, PROMPT + 1 - lengths)
        share = 1 - sum(native) / sum(whole)
        row = {"branches": branches, "siblings": siblings, "prompt_lengths": lengths, "steps": len(whole)}
        row |= {"step_s": f"{np.median(whole):.6g}", "native_s": f"{np.median(native):.6g}", "share": f"{share:.4f}"}
        rows.append(asdict(here(CPU)) | row)
        print(
            f"{branches:5} branches, {siblings:2} to a prompt, {lengths:2} lengths: step {np.median(whole) * 1e6:7.0f} "
            f"us, native {np.median(native) * 1e6:7.0f} us, the engine's own share {share:.1%}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "bookkeeping.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
