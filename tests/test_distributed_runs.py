"""Runs in several processes: they log, save and end as one process does, and go on in any number of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adder_runs import assert_same, difference, rows, saved, train, wait_for_steps, write_adder
from processes import end, run, started, time_limit
from transformers import AutoModelForCausalLM

from ibtpo import train as runs
from ibtpo.checkpoints import latest_checkpoint
from ibtpo.distributed import Group
from ibtpo.policy import load_policy
from ibtpo.stopping import StopRequest
from ibtpo.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    with time_limit(180):
        yield


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return write_adder(tmp_path_factory.mktemp("adder"))


def test_a_run_goes_on_in_any_number_of_processes(adder: list[object], tmp_path: Path) -> None:
    """1, then 2 and 4 with shares, then 2 with copies, then 1: it ends where a run in one process does."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*adder, "--out", whole, "--sampled-tokens", 500) == 0
    assert train(*adder, "--out", parts, "--sampled-tokens", 100) == 0
    counts = [len(rows(parts))]
    for size, mode, tokens in ((2, "fsdp", 200), (4, "fsdp", 300), (2, "ddp", 400)):
        logs = tmp_path / f"logs-{tokens}"
        run(size, train, "--resume", parts, "--sampled-tokens", tokens, "--distributed", mode, logs=logs)
        assert f"{size} processes, {mode}" in (logs / "0.txt").read_text()
        printed = "".join((logs / f"{rank}.txt").read_text() for rank in range(1, size))
        assert [line for line in printed.splitlines() if not line.startswith("[Gloo] Rank")] == []  # torch 2.10's
        counts.append(len(rows(parts)))
    assert train("--resume", parts, "--sampled-tokens", 500) == 0
    counts.append(len(rows(parts)))
    assert sorted(set(counts)) == counts
    assert_same(parts, whole, within=1e-3, every=False)
    assert saved(parts, "optimizer").keys() == saved(whole, "optimizer").keys()
    assert difference(saved(parts, "optimizer"), saved(whole, "optimizer")) < 0.02
    assert sum(row["optimizer_steps"] for row in rows(parts)) > 2
    assert len(json.loads((parts / "environment.json").read_text())) == len(list(parts.glob("events.out.*"))) == 5
    last = latest_checkpoint(parts)
    assert last is not None
    assert "avg@2" in (last.path / "README.md").read_text()


@pytest.mark.parametrize(("preset", "mode"), [
    ("ib-tpo", "ddp"), ("grpo", "fsdp"), ("dapo", "fsdp"), ("treepo", "ddp"), ("vineppo", "fsdp"), ("tree-grpo", "ddp"),
])  # fmt: skip
def test_a_preset_is_the_same_in_two_processes(preset: str, mode: str, adder: list[object], tmp_path: Path) -> None:
    how = [*adder, "--preset", preset, "--sampled-tokens", 250, "--eval.every", 2, "--distributed", mode]
    how += ["--search.segment-tokens", 2] if preset == "treepo" else []
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(*how, "--out", one) == 0
    run(2, train, *how, "--out", two, logs=tmp_path / "logs")
    assert_same(two, one, within=1e-3)
    last, other = latest_checkpoint(two), latest_checkpoint(one)
    assert last is not None
    assert other is not None
    state = json.loads((last.path / "state.json").read_text())
    assert state == json.loads((other.path / "state.json").read_text())
    assert sum(row["optimizer_steps"] for row in rows(two)) > 0
    if preset == "dapo":
        assert state["next_problem"] > 4 * state["step"]  # it did draw again


def test_state_in_8_bits_trains_in_two_processes(adder: list[object], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    how = [*adder, "--optim.state", "8bit", "--sampled-tokens", 300]
    assert train(*how, "--out", tmp_path / "one") == 0
    run(2, train, *how, "--out", tmp_path / "two", logs=tmp_path / "logs")
    assert_same(tmp_path / "two", tmp_path / "one", within=0.02)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_adapters_train_in_two_processes(mode: str, adder: list[object], tmp_path: Path) -> None:
    lora = [*adder, "--lora.rank", 4, "--loss.kl-coef", 0.1, "--sampled-tokens", 400, "--distributed", mode]
    assert train(*lora, "--out", tmp_path / "one") == 0
    run(2, train, *lora, "--out", tmp_path / "two", logs=tmp_path / "logs")
    assert f"2 processes, {mode}" in (tmp_path / "logs" / "0.txt").read_text()
    assert [row["tokens_sampled"] for row in rows(tmp_path / "two")] == [
        row["tokens_sampled"] for row in rows(tmp_path / "one")
    ]
    ours, theirs = (saved(tmp_path / name, "adapter_model") for name in ("two", "one"))
    assert difference(ours, theirs) < 1e-3


def test_adapters_go_on_in_any_number_of_processes(adder: list[object], tmp_path: Path) -> None:
    """1, then 2 and 3 with shares, then 1; then further from the adapter itself, whose start is the reference."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = [*adder, "--lora.rank", 4, "--loss.kl-coef", 0.1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*lora, "--out", whole, "--sampled-tokens", 400) == 0
    assert train(*lora, "--out", parts, "--sampled-tokens", 100) == 0
    for size, tokens in ((2, 200), (3, 300)):
        logs = tmp_path / f"logs-{tokens}"
        run(size, train, "--resume", parts, "--sampled-tokens", tokens, "--distributed", "fsdp", logs=logs)
    assert train("--resume", parts, "--sampled-tokens", 400) == 0
    assert len(rows(parts)) == len(rows(whole))
    for name, within in (("adapter_model", 1e-3), ("optimizer", 0.02)):
        assert difference(saved(parts, name), saved(whole, name)) < within
    more = ["--model", whole, *adder[2:], "--loss.kl-coef", 0.1, "--sampled-tokens", 200, "--distributed", "fsdp"]
    assert train(*more, "--out", tmp_path / "one") == 0
    run(2, train, *more, "--out", tmp_path / "two", logs=tmp_path / "logs")
    ours, theirs = (saved(tmp_path / name, "adapter_model") for name in ("two", "one"))
    assert difference(ours, theirs) < 1e-3
    last = latest_checkpoint(tmp_path / "two")
    assert last is not None
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(adder[1])
        logits = peft.PeftModel.from_pretrained(base, last.path)(torch.tensor([[1, 2, 3]])).logits
        own = load_policy(last.path, dtype=torch.float32, device=CPU).model
        tokens, pos, end = torch.tensor([1, 2, 3]), torch.arange(3), torch.full((3,), 3, dtype=torch.int32)
        assert torch.allclose(own.packed(tokens, pos, end) @ own.head.T, logits[0], atol=1e-4)


def _warm_starts_elsewhere(*arguments: object) -> int:
    """Ranks that begin with other weights: what rounds differently by a bit is as far apart after some updates."""
    begin = runs.built_in_policy
    runs.built_in_policy = lambda seed, **how: begin(seed + int(os.environ["RANK"]), **how)  # type: ignore[assignment]
    return train(*arguments)


def test_a_warm_start_ends_at_once_for_all(tmp_path: Path) -> None:
    """Whose loss falls a little later must not go on alone: rank 0's says when."""
    how = ["--distributed-timeout", 20, "--sampled-tokens", 200, "--prompts-per-step", 2, "--eval.prompts", 2]
    how += ["--eval.samples", 1, "--digits.min-ops", 1, "--digits.max-ops", 1, "--warm-start.batch-size", 8]
    how += ["--warm-start.excess", 2.5, "--warm-start.pass-share", 0, "--warm-start.decay-updates", 4]
    run(2, _warm_starts_elsewhere, *how, "--out", tmp_path / "run", logs=tmp_path / "logs")
    run(1, train, *how, "--out", tmp_path / "alone", logs=tmp_path / "logs1")
    (begun,), (alone,) = (
        [row["warm_start_updates"] for row in rows(tmp_path / name, every=True) if "warm_start_updates" in row]
        for name in ("run", "alone")
    )
    assert begun == alone > 4


def test_sigterm_to_one_stops_all_with_a_checkpoint(adder: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(2, train, *adder, "--out", folder, "--sampled-tokens", 10**7, logs=tmp_path / "logs") as ranks:
        wait_for_steps(folder, 3)
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert end(ranks) == [0, 0], (tmp_path / "logs" / "1.txt").read_text()
    steps = len(rows(folder))
    last = latest_checkpoint(folder)
    assert last is not None
    assert last.step == steps
    assert "continue with: ibtpo train --resume" in (tmp_path / "logs" / "0.txt").read_text()


def test_a_signal_that_comes_while_the_others_are_asked_is_not_forgotten() -> None:
    trainer = object.__new__(Trainer)
    trainer.stop = StopRequest()

    class Asking(Group):
        def gather(self, value: Any, what: str) -> list[Any]:
            trainer.stop.signal = signal.SIGTERM  # as the handler does
            return [value]

    trainer.group = Asking()
    assert not trainer._agree_to_stop()
    assert trainer._agree_to_stop()
    assert trainer.stop.signal == signal.SIGTERM
