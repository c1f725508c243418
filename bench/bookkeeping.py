"""The engine's own time in a decode step: the step's time minus that of what computes, over live branches.

.venv/bin/python bench/bookkeeping.py [--device cuda] [--steps N] [--out FOLDER]

On the CPU the built-in policy is run, which is the smallest model, and what computes is the native call; for larger
models the share is smaller. On a GPU a model of the shape of Qwen2.5-0.5B is run with captured steps; what computes is
the time from a run's first replay until the host has seen that the run is over.

Only steps in which every branch decodes are counted, including page boundaries: branches that start in the same step
after prompts of equal length begin their pages together; with prompts of `PAGE` different lengths some branch begins a
page in nearly every step. Writes bookkeeping.csv (bookkeeping_gpu.csv): seconds a step and its computing part
(medians), and the engine's share of the time of all steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_peers import random_model
from rows import RESULTS

from ibtpo.policy import built_in_policy
from ibtpo_engine import Engine, Model, Sampling
from ibtpo_engine.pages import PAGE
from ibtpo_engine.runner import MOST_STEPS
from ibtpo_kernels import DecodeStep
from ibtpo_kernels.roofline.machine import here

PROMPT, NEW = 64, 96


def model_for(device: torch.device) -> Model:
    """The model that is run on this device."""
    if device.type == "cuda":
        return random_model("Qwen2.5-0.5B").to(device)
    return built_in_policy(0, dtype=torch.float32, device=device).model


@contextmanager
def timed(engine: Engine) -> Iterator[list[float]]:
    """The seconds of each call that computes, while in the block."""
    seconds: list[float] = []
    runner, name = engine.scheduler.runner, "_replay"
    owner: Any = type(runner.graphs)
    if runner.is_native:
        owner, name = DecodeStep, "run"
    compute = getattr(owner, name)

    def call(*args: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        done = compute(*args, **more)
        seconds.append(time.perf_counter() - begin)
        return done

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, compute)


def measure(model: Model, branches: int, siblings: int, steps: int, shortest: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of its computing part, with `branches` live branches, `siblings` a prompt.

    Prompts have `shortest` to `PROMPT` tokens.
    """
    room, graphs = branches * (PROMPT + NEW + 32), model.device.type == "cuda"
    engine = Engine(model, kv_tokens=room, max_branches=branches, cuda_graphs=graphs)
    draw = np.random.default_rng(0)
    sizes = draw.integers(shortest, PROMPT + 1, branches // siblings)
    trees = [engine.tree(draw.integers(1, 14, size)) for size in sizes]
    engine._submit([node for tree in trees for node in tree.root.fork(siblings)], Sampling(max_tokens=NEW))
    while len(engine.scheduler.running) < branches:
        engine._step()
    engine._step()  # on a GPU it is captured here
    whole, computing = [], []
    with timed(engine) as seconds:
        while len(whole) < min(steps, NEW - MOST_STEPS - 3):
            begin, before = time.perf_counter(), engine.scheduler.counters.steps
            engine._step(MOST_STEPS)
            taken = engine.scheduler.counters.steps - before
            whole.extend([(time.perf_counter() - begin) / taken] * taken)
            assert len(seconds) == 1, "a step was not one call"
            computing.extend([seconds.pop() / taken] * taken)
    return whole, computing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    path = options.out / ("bookkeeping.csv" if device.type == "cpu" else "bookkeeping_gpu.csv")
    model = model_for(device)
    for branches, siblings, lengths in product((32, 128, 512, 1024), (1, 16), (1, PAGE)):
        whole, computing = measure(model, branches, siblings, options.steps, PROMPT + 1 - lengths)
        share = 1 - sum(computing) / sum(whole)
        row = {"branches": branches, "siblings": siblings, "prompt_lengths": lengths, "steps": len(whole)}
        row |= {
            "step_s": f"{np.median(whole):.6g}",
            "computing_s": f"{np.median(computing):.6g}",
            "share": f"{share:.4f}",
        }
        rows.append(asdict(here(device)) | row)
        print(
            f"{branches:5} branches, {siblings:2} to a prompt, {lengths:2} lengths: step {np.median(whole) * 1e6:7.0f} "
            f"us, computing {np.median(computing) * 1e6:7.0f} us, the engine's own share {share:.1%}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
