"""Short runs on a task of additions, in one process or several, and whether two of them are the same."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from safetensors.torch import load_file

from ibtpo.checkpoints import latest_checkpoint
from ibtpo.cli import main

TINY = [
    "--jsonl.grade", "exact", "--prompts-per-step", "4", "--search.rounds", "5", "--sampling.max-tokens", "6",
    "--eval.prompts", "4", "--eval.samples", "2", "--checkpoint-every", "2", "--distributed-timeout", "60",
    "--optim.lr", "1e-3", "--optim.warmup-steps", "1", "--optim.eps", "1e-3",
]  # fmt: skip


def write_adder(folder: Path) -> list[object]:
    """A model that knows a little of the task and its rows, in files; returns the flags of a short run on them."""
    return [
        "--model", save_checkpoint(folder / "model", teach=40), "--data", save_additions(folder / "rows.jsonl"), *TINY,
    ]  # fmt: skip


def train(*arguments: object) -> int:
    """`ibtpo train`; a process other than rank 0 that writes into a folder of a test ends at once."""
    if int(os.environ.get("RANK", "0")) > 0:
        sys.addaudithook(_forbid_writing)
    return main(["train", *map(str, arguments)])


def _forbid_writing(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends a process other than rank 0 that changes a file of a test."""
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
    changes |= event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR) != 0
    if changes and "pytest-" in os.fsdecode(arguments[0]) if changes and not isinstance(arguments[0], int) else False:
        print(f"a follower writes: {event} {arguments}", flush=True)
        os._exit(9)


def rows(folder: Path, *, every: bool = False) -> list[dict[str, Any]]:
    """What was logged of training steps, or everything."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in logged if every or "tokens_sampled" in row]


def saved(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """The tensors of a file of the last checkpoint."""
    last = latest_checkpoint(folder)
    assert last is not None
    return load_file(last.path / f"{name}.safetensors")


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to its own largest entry."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).abs().max() / theirs[n].double().abs().max().clamp(min=1e-12))
        for n in ours
    )


def assert_same(ours: Path, theirs: Path, within: float, *, every: bool = True) -> None:
    """The two runs sampled, rewarded and evaluated the same, and ended with the same weights."""
    machine = {"tokens_trained", "training_efficiency", "peak_memory", "memory_planned", "tokens_per_second"}
    for mine, other in zip(rows(ours, every=every), rows(theirs, every=every), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - machine:
            if not name.endswith("_seconds"):
                assert mine[name] == pytest.approx(other[name], rel=5e-3, abs=1e-4), name
    assert difference(saved(ours), saved(theirs)) < within


def wait_for_steps(folder: Path, steps: int) -> None:
    """Until the run has logged so many training steps."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)
