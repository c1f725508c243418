"""Whole training runs with parity="bitwise": the trainer's log-probs are the sampler's, the gap is exactly 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from test_update import _config, _flat, _trees, _updater
from test_update import _model as _policy

import ibtpo_kernels as K
from ibtpo.cli import main
from ibtpo.config import LossConfig, TrainConfig
from ibtpo.update import full_logprobs
from ibtpo_engine import native

pytestmark = pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")

TINY = [
    "--sampled-tokens", "300", "--prompts-per-step", "4", "--search.rounds", "5", "--sampling.max-tokens", "8",
    "--eval.prompts", "2", "--eval.samples", "1", "--optim.lr", "1e-3", "--optim.warmup-steps", "1",
    "--jsonl.grade", "exact", "--device", "cpu",
]  # fmt: skip
PLAIN = ["--sampling.temperature", "0.7", "--sampling.top-p", "1.0"]  # what is sampled from is what is trained
GAPS = ("logprob_gap", "logprob_gap_max")


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Arguments for a model that answers additions with some digit."""
    folder = tmp_path_factory.mktemp("adder")
    return [
        "--model", save_checkpoint(folder / "model", teach=40), "--data", save_additions(folder / "rows.jsonl"), *TINY
    ]  # fmt: skip


def _train(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """The steps that had something to train on."""
    assert main(["train", "--out", str(out), *map(str, arguments)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("optimizer_steps")]
    assert len(steps) > 1, "a gap of no step proves nothing"
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [PLAIN, ["--sampling.top-p", "0.9"]], ids=["sampler", "recomputed"])
@pytest.mark.parametrize("runs", ["native", "module"])
def test_sampler_and_trainer_agree_to_the_bit_in_every_step(
    adder: list[object], runs: str, how: list[str], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change from step to step, and the two agree again; where top-p cuts, on what both can say."""
    if runs == "module":
        monkeypatch.setattr(native, "MOST_BYTES", 0)
    steps = _train(tmp_path / "run", *adder, *how, "--dtype", dtype, "--parity", "bitwise")
    assert [row[name] for row in steps for name in GAPS] == [0.0] * (2 * len(steps))
    assert len({row["grad_norm"] for row in steps}) == len(steps), "nothing was learned"


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.5)])
def test_fast_reports_a_gap_of_rounding(adder: list[object], dtype: str, most: float, tmp_path: Path) -> None:
    steps = _train(tmp_path / "run", *adder, *PLAIN, "--dtype", dtype)
    assert all(0 < row["logprob_gap"] <= row["logprob_gap_max"] < most for row in steps)


def test_the_step_is_that_of_fast_to_rounding() -> None:
    """The same trees, of a third policy so that ratios are clipped, with a KL penalty: loss and weights agree."""
    ended = []
    for parity in ("fast", "bitwise"):
        model, reference = _policy(), _policy(seed=1)
        config = _config(loss=LossConfig(kl_coef=0.3), parity=parity)
        values = _updater(model, config, reference).update(_trees(_policy(seed=2)))
        ended.append((values, _flat(model) - _flat(_policy())))
    (fast, moved), (bitwise, also_moved) = ended
    assert fast["clip_fraction"] > 0
    assert moved.abs().max() > 1e-5
    torch.testing.assert_close(also_moved, moved, atol=1e-7, rtol=1e-3)
    for name in ("loss", "kl_ref_k3", "clip_fraction", "entropy", "grad_norm"):
        assert bitwise[name] == pytest.approx(fast[name], rel=1e-4, abs=1e-7), name


def test_the_penalty_begins_at_exactly_zero() -> None:
    """Policy and reference are the same at first, and so are their numbers."""
    model, reference = _policy(), _policy()
    updater = _updater(model, _config(loss=LossConfig(kl_coef=0.3), parity="bitwise"), reference)
    trees = _trees(model)
    (batch,) = updater._pack([updater._advantage(tree) for tree in trees])
    metrics = updater._accumulate(batch)
    assert metrics["kl_ref_k1"] == metrics["kl_ref_k3"] == 0.0
    at, raw = full_logprobs(model, batch, 0.8, "bitwise")
    near, near_raw = full_logprobs(model, batch, 0.8, "fast")
    torch.testing.assert_close(torch.stack([at, raw]), torch.stack([near, near_raw]), atol=1e-5, rtol=0)


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="parity"):
        TrainConfig(parity="exact")
    assert TrainConfig().parity == "fast"
