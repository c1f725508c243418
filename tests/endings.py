"""How training runs ended: what their folders hold, and whether two are the same to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ibtpo.checkpoints import latest_checkpoint

Tensors = dict[str, torch.Tensor]


def log_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in log_rows(folder) if "tokens_sampled" in row]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "per_second", "memory", "planned")
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in rows]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in log_rows(folder) if "eval_avg" in row]


def last_checkpoint(folder: Path) -> Path:
    found = latest_checkpoint(folder)
    assert found is not None
    return found.path


def saved(folder: Path) -> tuple[Tensors, Tensors, dict[str, int]]:
    path = last_checkpoint(folder)
    state = json.loads((path / "state.json").read_text())
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state


def assert_same_end(left: Path, right: Path) -> None:
    """Weights, optimizer, counters and metrics of two runs are the same, to the last bit."""
    (model, optimizer, state), (other_model, other_optimizer, other_state) = saved(left), saved(right)
    assert state == other_state
    for mine, other in ((model, other_model), (optimizer, other_optimizer)):
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert untimed(step_rows(left)) == untimed(step_rows(right))
    assert untimed(evaluations(left))[-1] == untimed(evaluations(right))[-1]


def assert_complete(folder: Path, budget: int) -> None:
    """Steps count up without a gap, tokens add up to the budget, and nothing half-written lies about."""
    steps = step_rows(folder)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    sampled = [row["tokens_sampled"] for row in steps]
    assert sum(sampled[:-1]) < budget <= sum(sampled)
    state = saved(folder)[2]
    assert state["step"] == len(steps)
    assert state["sampled_tokens"] == sum(sampled)
    assert state["next_problem"] == sum(row["prompts"] for row in steps)
    assert evaluations(folder)[0]["step"] == 0
    assert evaluations(folder)[-1]["step"] == len(steps)
    assert list(folder.rglob("*.tmp")) == []
    assert "</html>" in (folder / "report.html").read_text()
