"""Training from end to end: it learns, repeats exactly, stops and goes on, and takes checkpoints of `transformers`."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import save_additions, save_checkpoint
from endings import assert_complete as _assert_complete
from endings import assert_same_end as _assert_same_end
from endings import evaluations as _evaluations
from endings import last_checkpoint as _last
from endings import log_rows as _rows
from endings import saved as _saved
from endings import step_rows as _steps
from endings import untimed as _untimed
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibtpo.warmstart
from ibtpo.checkpoints import latest_checkpoint
from ibtpo.cli import main
from ibtpo.metrics import METRICS
from ibtpo.tasks import DigitChain
from ibtpo.trainer import Trainer
from ibtpo_engine import load_model

CHAIN = ["--digits.min-ops", "2", "--digits.max-ops", "3", "--digits.teacher-exponent", "3"]
QUICK = [
    *CHAIN, "--sampled-tokens", "3000", "--prompts-per-step", "6", "--search.rounds", "4",
    "--sampling.max-tokens", "32", "--eval.prompts", "4", "--eval.samples", "2", "--checkpoint-every", "2",
]  # fmt: skip
TINY_MODEL = [
    "--sampled-tokens", "250", "--prompts-per-step", "4", "--search.rounds", "5", "--sampling.max-tokens", "6",
    "--eval.prompts", "4", "--eval.samples", "2", "--optim.lr", "1e-3", "--optim.warmup-steps", "1",
]  # fmt: skip


def _run(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newcomer's run, on an easy chain: warm start, evaluation, training, evaluation."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    warm = ["--warm-start.max-updates", "300", "--warm-start.batch-size", "128"]
    scale = ["--sampled-tokens", "40_000", "--search.rounds", "5", "--eval.prompts", "96", "--eval.samples", "4"]
    assert _run("--out", folder, *CHAIN, *warm, *scale, "--sampling.max-tokens", "32") == 0
    return folder


@pytest.fixture(scope="session")
def policy(trained: Path) -> Path:
    """A checkpoint that is right now and then."""
    return _last(trained)


@pytest.fixture(scope="session")
def uninterrupted(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on it that nothing disturbs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert _run("--model", policy, "--out", folder, *QUICK) == 0
    return folder


# ---- it learns -------------------------------------------------------------------------------------------------


def test_training_improves_held_out_accuracy(trained: Path) -> None:
    before, after = _evaluations(trained)
    assert 0.1 < before["eval_avg"] < 0.7
    assert after["eval_avg"] > before["eval_avg"] + 0.06  # .10 or more seen; the warm start differs by rounding
    assert after["eval_avg_low"] > before["eval_avg"]
    assert after["eval_greedy"] > before["eval_greedy"] - 0.02
    assert before["eval_prompts"] == after["eval_prompts"] == 96
    _assert_complete(trained, 40_000)


def test_sampler_and_trainer_agree_on_every_log_prob(trained: Path) -> None:
    assert max(row["logprob_gap_max"] for row in _steps(trained)) < 1e-3
    assert all(row["tokens_computed"] > 0 and row["training_efficiency"] > 0 for row in _steps(trained))


def test_the_policy_trained_on_the_built_in_task_loads_in_transformers(policy: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    ids = tokenizer("7*8-5=?\n", return_tensors="pt", add_special_tokens=False)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0])
    assert text.startswith("7*8-5=?\n7*8=")
    assert text.endswith(".")


def test_grpo_runs_through_the_same_loop(policy: Path, tmp_path: Path) -> None:
    assert _run("--model", policy, "--out", tmp_path / "run", "--preset", "grpo", *QUICK) == 0
    _assert_complete(tmp_path / "run", 3000)
    steps = _steps(tmp_path / "run")
    assert all(row["trajectories"] == 6 * 8 for row in steps)
    assert all(row["avg_rate"] == row["avg_rate_iid"] for row in steps)
    assert all(row["tokens_sampled"] == row["trajectory_tokens"] for row in steps)
    assert sum(row["optimizer_steps"] for row in steps) > 0


def test_what_the_caller_has_frozen_stays_frozen(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `conftest` does with what was imported; a training freezes for its own time only where nothing is."""
    freeze, calls = gc.freeze, []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(freeze()))
    before = gc.get_freeze_count()
    assert before > 10_000
    assert _run("--model", policy, "--out", tmp_path / "run", *QUICK, "--sampled-tokens", "10") == 0
    assert gc.get_freeze_count() == pytest.approx(before, rel=0.01)  # what dies leaves the count
    assert not calls
    gc.unfreeze()
    try:
        assert _run("--model", policy, "--out", tmp_path / "other", *QUICK, "--sampled-tokens", "10") == 0
        assert gc.get_freeze_count() < 1000  # Python 3.12 keeps some hundred there
        assert len(calls) == 1
    finally:
        gc.collect()
        freeze()


def test_same_seed_same_run(policy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert _run("--model", policy, "--out", tmp_path / "same", *QUICK) == 0
    _assert_same_end(tmp_path / "same", uninterrupted)
    assert _run("--model", policy, "--out", tmp_path / "other", *QUICK, "--seed", "1") == 0
    assert _untimed(_steps(tmp_path / "other")) != _untimed(_steps(uninterrupted))


def test_a_run_evaluates_on_the_way_when_asked(policy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """And evaluating changes nothing about the training."""
    assert _run("--model", policy, "--out", tmp_path / "run", *QUICK, "--eval.every", "2") == 0
    assert [row["step"] for row in _evaluations(tmp_path / "run")][:3] == [0, 2, 4]
    assert _untimed(_steps(tmp_path / "run")) == _untimed(_steps(uninterrupted))


# ---- it stops and goes on ----------------------------------------------------------------------------------------


def _signal_after_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    original = Trainer._finish_step

    def finish(trainer: Trainer, *arguments: Any) -> None:
        original(trainer, *arguments)
        if trainer.state.step == step:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_finish_step", finish)


def _signal_in_grading(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    original, seen = DigitChain.grade, iter(range(10**9))

    def grade(task: DigitChain, *arguments: Any) -> float:
        if next(seen) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return original(task, *arguments)

    monkeypatch.setattr(DigitChain, "grade", grade)


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(lambda patch: _signal_after_step(patch, 3, signal.SIGINT), id="between steps"),
        pytest.param(lambda patch: _signal_in_grading(patch, 4 * 3 + 2 * 42 + 20), id="within a step"),
        pytest.param(lambda patch: _signal_in_grading(patch, 5), id="in the first evaluation"),
    ],
)
def test_ctrl_c_saves_and_resume_ends_where_the_whole_run_does(
    interrupt: Callable[[pytest.MonkeyPatch], None],
    policy: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        assert _run("--model", policy, "--out", folder, *QUICK) == 130
    message = capsys.readouterr().err
    assert f"--resume {folder}" in message
    assert message.count("\n") == 1
    stopped = _saved(folder)[2]["step"]
    assert stopped < _saved(uninterrupted)[2]["step"]
    assert f"stopped at step {stopped}" in message
    config = (folder / "config.yaml").read_bytes()
    assert _run("--resume", folder) == 0
    assert (folder / "config.yaml").read_bytes() == config
    _assert_complete(folder, 3000)
    _assert_same_end(folder, uninterrupted)


def test_ctrl_c_leaves_the_signals_as_they_were(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    _signal_after_step(monkeypatch, 1, signal.SIGINT)
    assert _run("--model", policy, "--out", tmp_path / "run", *QUICK) == 130
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_second_ctrl_c_stops_at_once(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _signal_after_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    assert _run("--model", policy, "--out", tmp_path / "run", *QUICK) == 130
    assert "at once" in capsys.readouterr().err
    assert _last(tmp_path / "run").name == "step-000002"  # nothing was saved on the way out
    assert list((tmp_path / "run").rglob("*.tmp")) == []


def test_interrupted_warm_start_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = ["--warm-start.max-updates", "6", "--warm-start.batch-size", "8"]
    settings = [*QUICK, *warm, "--sampled-tokens", "200", "--loss.kl-coef", "0.01"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert _run("--out", whole, *settings) == 0
    original, calls = ibtpo.warmstart.supervised_loss, iter(range(100))

    def loss(*arguments: Any) -> torch.Tensor:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ibtpo.warmstart, "supervised_loss", loss)
        capsys.readouterr()
        assert _run("--out", folder, *settings) == 130
    assert latest_checkpoint(folder) is None
    assert f"--resume {folder}" in capsys.readouterr().err
    assert _run("--resume", folder) == 0
    _assert_same_end(folder, whole)


def _start_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ibtpo", "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _wait_for_steps(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        log = folder / "metrics.jsonl"
        if log.exists() and log.read_text().count('"tokens_sampled"') >= steps:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no {steps} steps in time: {process.communicate()[1]}")


def test_kill_leaves_a_folder_that_resume_continues_to_the_same_end(
    policy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = _start_process("--model", policy, "--out", folder, *QUICK)
    _wait_for_steps(folder, process, 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert _saved(folder)[2]["step"] < _saved(uninterrupted)[2]["step"]
    assert _run("--resume", folder) == 0
    _assert_complete(folder, 3000)
    _assert_same_end(folder, uninterrupted)


def test_sigterm_saves_and_is_no_failure(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = _start_process("--model", policy, "--out", folder, *QUICK, "--sampled-tokens", "1_000_000")
    _wait_for_steps(folder, process, 2)
    process.terminate()
    _, message = process.communicate(timeout=30)
    assert process.returncode == 0, message
    assert f"--resume {folder}" in message
    assert _saved(folder)[2]["step"] == len(_steps(folder)) >= 2


def test_a_finished_run_can_be_given_a_larger_budget(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _run("--model", policy, "--out", folder, *QUICK, "--sampled-tokens", "800") == 0
    first = _untimed(_steps(folder))
    assert _run("--resume", folder, "--sampled-tokens", "1600") == 0
    _assert_complete(folder, 1600)
    assert _untimed(_steps(folder))[: len(first)] == first


def test_the_one_before_a_damaged_checkpoint_is_taken(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for out in (whole, folder):
        flags = [*QUICK, "--sampled-tokens", "1200", "--checkpoint-every", "1"]
        assert _run("--model", policy, "--out", out, *flags) == 0
    last = _last(folder)
    content = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert _run("--resume", folder) == 0
    assert f"{last} is damaged (optimizer.safetensors has" in capsys.readouterr().out
    _assert_complete(folder, 1200)
    _assert_same_end(folder, whole)


@pytest.mark.parametrize("preset", ["dapo", "treepo", "vineppo"])
def test_methods_that_look_beyond_one_tree_go_on_where_they_were(preset: str, policy: Path, tmp_path: Path) -> None:
    """Prompts drawn again, whitened advantages, rollouts that leave the tree: a resume repeats them."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = ["--preset", preset, *QUICK, "--sampled-tokens", "2500", "--checkpoint-every", "1"]
    assert _run("--model", policy, "--out", whole, *flags) == 0
    shutil.copytree(whole, folder)
    shutil.rmtree(_last(folder))  # as if killed just before its last checkpoint
    before = _saved(folder)[2]["step"]
    assert 0 < before < len(_steps(whole))
    if preset == "dapo":
        assert max(row["prompts"] for row in _steps(whole)) > 6, "nothing was drawn again"
    assert _run("--resume", folder) == 0
    _assert_complete(folder, 2500)
    _assert_same_end(folder, whole)


# ---- real input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `transformers` saved: tied with a chat template, sharded, plain."""
    kinds: dict[str, dict[str, Any]] = {
        "qwen3": {"tied": True, "chat": True, "dtype": torch.bfloat16},
        "qwen2": {"tied": False, "chat": False, "shard_size": "20KB"},
        "llama": {"tied": False, "chat": False},
    }
    folder = tmp_path_factory.mktemp(request.param)
    yield save_checkpoint(folder, request.param, teach=40, **kinds[request.param])


@pytest.mark.parametrize("grade", ["math", "exact"])
def test_trains_a_checkpoint_of_transformers_on_a_jsonl_file(checkpoint: Path, grade: str, tmp_path: Path) -> None:
    data, folder = save_additions(tmp_path / "rows.jsonl"), tmp_path / "run"
    assert _run("--model", checkpoint, "--data", data, "--out", folder, *TINY_MODEL, "--jsonl.grade", grade) == 0
    _assert_complete(folder, 250)
    steps = _steps(folder)
    assert sum(row["optimizer_steps"] for row in steps) > 0
    assert sum(row["reward"] for row in steps) > 0
    assert max(row["kl_ref_k3"] for row in steps if row["optimizer_steps"]) > 0  # the paper's KL weight is the default
    names = ("reward_timeouts", "reward_failures", "eval_reward_timeouts", "eval_reward_failures")
    counts = {name: row[name] for row in _rows(folder) for name in names if name in row}
    assert counts == ({} if grade == "exact" else dict.fromkeys(names, 0))
    path = _last(folder)
    theirs, ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), load_model(path)
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    assert theirs.state_dict().keys() == before.keys()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())
    tokenizer, original = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.eos_token_id == original.eos_token_id
    ids = torch.tensor(tokenizer.encode("What is 3+4?\n\n", add_special_tokens=False))
    n = len(ids)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        found = ours.packed(ids, torch.arange(n), torch.full((n,), n, dtype=torch.int32)) @ ours.head.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """Arguments for a chat model that answers additions with some digit, and its folder."""
    folder = tmp_path_factory.mktemp("adder")
    model = save_checkpoint(folder / "model", teach=40)
    data = save_additions(folder / "rows.jsonl")
    return ["--model", model, "--data", data, "--jsonl.grade", "exact", *TINY_MODEL], model


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--loss.kl-coef", "0.1"], id="KL"),
        pytest.param(["--advantage.pi-ref", "reference"], id="pi_ref"),
        pytest.param(["--search.step-tokens", "1"], id="steps of fixed length"),
        pytest.param(["--sampling.top-p", "1", "--sampling.top-k", "5"], id="top-k"),
        pytest.param(["--sampling.max-tokens", "5000"], id="more tokens than the context"),
        pytest.param(["--micro-batch-tokens", "1"], id="split trees"),
        pytest.param(["--search.method", "random-tree"], id="random tree"),
        pytest.param(["--loss.aggregation", "dr_grpo", "--loss.prefix-weight", "sqrt"], id="loss"),
        pytest.param(["--ib.value", "recursive", "--ib.duplicates", "merge", "--ib.zero-parent", "smooth"], id="ib"),
        pytest.param(["--jsonl.no-chat-template"], id="no chat template"),
        pytest.param(["--jsonl.system-prompt", "Answer with a digit."], id="system prompt"),
        pytest.param(["--report-trees", "0"], id="no trees in the report"),
    ],
)
def test_options_run_to_the_end(adder: tuple[list[object], Path], flags: list[str], tmp_path: Path) -> None:
    assert _run(*adder[0], *flags, "--out", tmp_path / "run") == 0
    _assert_complete(tmp_path / "run", 250)


def test_frozen_reference_outlives_an_interruption(adder: tuple[list[object], Path], tmp_path: Path) -> None:
    """A resumed run measures its KL against where the run began, not against where it was resumed."""
    settings = [*adder[0], "--loss.kl-coef", "0.1", "--sampled-tokens", "600"]
    assert _run(*settings, "--out", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        _signal_after_step(patch, 3, signal.SIGINT)
        assert _run(*settings, "--out", tmp_path / "run") == 130
    assert _run("--resume", tmp_path / "run") == 0
    _assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_bf16_run_keeps_fp32_masters_and_resumes(adder: tuple[list[object], Path], tmp_path: Path) -> None:
    settings = [*adder[0], "--dtype", "bfloat16", "--optim.lr", "1e-5", "--sampled-tokens", "600"]
    assert _run(*settings, "--out", tmp_path / "whole") == 0
    model, optimizer, _ = _saved(tmp_path / "whole")
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    start = load_model(adder[1], dtype=torch.bfloat16).state_dict()
    moved = 0
    for name, weight in model.items():
        master = optimizer[f"master.{name}"]
        assert master.dtype == torch.float32
        assert torch.equal(master.to(torch.bfloat16), weight)
        moved += int((master != start[name].float()).sum())
    assert moved > 1000  # most of which bf16 alone would have lost
    config = json.loads((_last(tmp_path / "whole") / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        _signal_after_step(patch, 3, signal.SIGINT)
        assert _run(*settings, "--out", tmp_path / "run") == 130
    assert _run("--resume", tmp_path / "run") == 0
    _assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_the_run_folder_holds_what_the_readme_says(uninterrupted: Path) -> None:
    names = {
        path.name.split(".")[0] if path.name.startswith("events") else path.name for path in uninterrupted.iterdir()
    }
    assert {
        "config.yaml",
        "metrics.jsonl",
        "trees.jsonl",
        "events",
        "checkpoints",
        "report.html",
    } <= names
    config = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert config["search"]["rounds"] == 4
    assert {path.name for path in _last(uninterrupted).iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "optimizer.safetensors", "state.json",
    }  # fmt: skip


def test_gradings_that_fail_in_an_evaluation_are_counted_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_reward.py").write_text("def grade(prompt, completion, answer, data):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    model, data = save_checkpoint(tmp_path / "model", teach=40), save_additions(tmp_path / "rows.jsonl")
    flags = ["--reward", "no_reward:grade", "--jsonl.max-failed-share", 1, "--eval.prompts", 4, "--eval.samples", 2]
    assert _run("--model", model, "--data", data, "--out", tmp_path / "run", *TINY_MODEL, *flags) == 0
    before, *steps, after = _rows(tmp_path / "run")
    for row in (before, after):
        graded = 8 * (1 - row["eval_truncated_share"])
        assert 0 < graded <= row["eval_reward_failures"] <= graded + 4, "the samples, and the greedy completions"
        assert row["eval_reward_timeouts"] == row["eval_avg"] == 0
    ended = sum((1 - row["truncated_share"]) * row["trajectories"] for row in steps)
    assert steps[-1]["reward_failures"] == round(ended)


def test_the_log_holds_every_metric(trained: Path) -> None:
    """But for those that only a penalty, a setting, a preset or a grader of its own has."""
    elsewhere = {
        "kl_ref_k1", "kl_ref_k3", "entropy_advantage", "reward_timeouts", "reward_failures",
        "eval_reward_timeouts", "eval_reward_failures",
    }  # fmt: skip
    assert set().union(*_rows(trained)) - {"step"} == set(METRICS) - elsewhere


def test_learning_rate_falls_linearly_with_the_tokens_spent(tmp_path: Path) -> None:
    """Step s runs at lr * (1 - (1 - final_share) * spent), spent being the share of the budget sampled before it."""
    flags = [*QUICK, "--warm-start.max-updates", "2", "--optim.final-share", "0.2", "--optim.warmup-steps", "0"]
    assert _run("--out", tmp_path / "run", *flags, "--optim.lr", "1e-3") == 0
    spent, checked = 0.0, 0
    for row in _rows(tmp_path / "run"):
        if "tokens_sampled" in row:
            assert row["lr"] == pytest.approx(1e-3 * (1 - 0.8 * spent / 3000), rel=1e-6)
            spent, checked = spent + row["tokens_sampled"], checked + 1
    assert checked >= 3
