"""What the engine itself costs in a decode step: the step less the native call in it, over live branches.

.venv/bin/python bench/bookkeeping.py [--steps N] [--out FOLDER]

The built-in policy, so the smallest model there is: for any other the share is smaller. Steps are those in which every
branch decodes, page boundaries included. Writes bookkeeping.csv: seconds a step and in the native call (medians), and
the engine's share of the time of all steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rows import CPU, RESULTS

from ibtpo.policy import built_in_policy
from ibtpo_engine import Engine, Sampling
from ibtpo_kernels import DecodeStep
from ibtpo_kernels.roofline.machine import here

PROMPT, NEW = 64, 96


def measure(branches: int, siblings: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of the native call in it, with `branches` live ones, `siblings` to a prompt."""
    policy = built_in_policy(0, dtype=torch.float32, device=CPU)
    engine = Engine(policy.model, kv_tokens=branches * (PROMPT + NEW + 32), max_branches=branches)
    prompts = np.random.default_rng(0).integers(1, 14, (branches // siblings, PROMPT))
    trees = [engine.tree(prompt) for prompt in prompts]
    engine._submit([node for tree in trees for node in tree.root.fork(siblings)], Sampling(max_tokens=NEW))
    while len(engine.scheduler.running) < branches:
        engine._step()
    whole, native = [], []
    run = DecodeStep.run

    def timed(step: DecodeStep) -> np.ndarray:
        begin = time.perf_counter()
        code = run(step)
        native.append(time.perf_counter() - begin)
        return code

    DecodeStep.run = timed  # type: ignore[method-assign]
    try:
        for _ in range(min(steps, NEW - 2)):
            begin = time.perf_counter()
            engine._step()
            whole.append(time.perf_counter() - begin)
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
    for branches in (32, 128, 512, 1024):
        for siblings in (1, 16):
            whole, native = measure(branches, siblings, options.steps)
            share = 1 - sum(native) / sum(whole)
            row = {"branches": branches, "siblings": siblings, "steps": len(whole)}
            row |= {
                "step_s": f"{np.median(whole):.6g}",
                "native_s": f"{np.median(native):.6g}",
                "share": f"{share:.4f}",
            }
            rows.append(asdict(here(CPU)) | row)
            print(
                f"{branches:5} branches, {siblings:2} to a prompt: step {np.median(whole) * 1e6:7.0f} us, native "
                f"{np.median(native) * 1e6:7.0f} us, the engine's own share {share:.1%}",
                flush=True,
            )
    with (options.out / "bookkeeping.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
