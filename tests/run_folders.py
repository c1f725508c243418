"""Run folders made by hand, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ibtpo.config import TrainConfig
from ibtpo.metrics import evaluation_metrics
from ibtpo.runlog import METRICS, RunFolder

HOSTILE = (
    "</script><script>window.hacked = 1; alert(1)</script><img src=x onerror='alert(2)'>\"&amp;{{ 7*7 }}\u2028"
    "\x1b[31m\u202egnp\u2066 @@script@@ \ud800"
)


def node(parent: int | None, text: str, turn: int | None = 0, **more: Any) -> dict[str, Any]:
    sampled = parent is not None
    half = max(1, len(text) // 2)
    return {
        "parent": parent, "text": text, "pieces": [text[:half], text[half:]], "round": turn, "reward": None, "finish": None,  # noqa: E501
        "logprob": [0.0, -5.0] if sampled else [], "entropy": [0.5, 1.0] if sampled else [],
    } | more  # fmt: skip


def leaf(parent: int, text: str, turn: int, reward: float, finish: str = "stop") -> dict[str, Any]:
    return node(parent, text, turn, reward=reward, finish=finish, value=reward, eta1=-0.2, eta2=0.9, score=None)


def small_tree(text: str = "7*8=6\n", prompt: str = "7*8-5=?\n") -> list[dict[str, Any]]:
    """Depth first: prompt; a with leaves b (right), f (wrong, round 2); c with leaf d (cut off); e (partly right)."""
    return [
        node(None, prompt, None, value=0.6, score=-0.7),
        node(0, text, 0, value=0.5, score=-1.04, eta1=0.1, eta2=0.8),
        leaf(1, "6-5=1\n", 0, 1.0),
        leaf(1, "6-5=2\n", 2, 0.0),
        node(0, "7*8=5\n", 0, value=0.0, score=-1.2),
        leaf(4, "5-5=0\n", 0, 0.0, "length"),
        leaf(0, "56-5", 1, 0.6),
    ]


def add_tree(
    folder: RunFolder, step: int, index: int = 0, *, prompt: str = "7*8-5=?\n", text: str = "7*8=6\n", answer: str = "1"
) -> None:
    nodes = small_tree(text, prompt)
    folder.add_tree(step, {"answer": answer, "index": index, "branched": [[2, 1, -1.04]], "nodes": nodes})


def step_values(step: int) -> dict[str, float]:
    return {
        "reward": 0.5, "avg_rate": 0.5, "avg_rate_iid": 0.4, "eff_rate": 1 / step, "cov_eta1_eta2": 0.02, "loss": -0.1 * step,  # noqa: E501
        "trajectories": 24, "tokens_sampled": 1000, "tokens_computed": 1250, "sampling_efficiency": 1.6,
        "sampling_seconds": 2, "reward_seconds": 0.5, "training_seconds": 1,
    }  # fmt: skip


def log_steps(folder: RunFolder, steps: Iterable[int], *, events: bool = True) -> None:
    """Metrics of these steps; without TensorBoard events where there are many."""
    if events:
        for step in steps:
            folder.log(step, step_values(step))
        return
    with (folder.path / METRICS).open("a") as file:
        file.writelines(json.dumps({"step": step, **step_values(step)}) + "\n" for step in steps)


def make_run(path: Path, *, steps: int, trees: int, model: str = "built-in") -> Path:
    """A finished run: evaluated before and after, with one tree a step in its last steps."""
    with RunFolder.create(path, TrainConfig(model=model)) as folder:
        folder.log(0, evaluation_metrics([[1, 0], [0, 0]], [1, 0]))
        log_steps(folder, range(1, steps + 1))
        for index in range(trees):
            add_tree(folder, max(1, steps - index), index)
        folder.log(steps, evaluation_metrics([[1, 1], [1, 0]], [1, 1]))
    return path
