"""What a run lives through, and what it refuses: NaN, full disks, killed graders, closed pipes, resumes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from endings import assert_complete, assert_same_end, last_checkpoint, step_rows
from safetensors.torch import load_file, save_file

import ibtpo.update
from ibtpo.checkpoints import CHECKSUMS, Checkpoint, _sum, damage
from ibtpo.cli import main
from ibtpo.config import JsonlConfig, TrainConfig
from ibtpo.grading import Grader, GraderError
from ibtpo.optim import MasterAdamW
from ibtpo.policy import built_in_policy
from ibtpo.resume import FIXED
from ibtpo.rewards import Graded
from ibtpo.tasks import RewardGrades
from ibtpo.trainer import Trainer
from ibtpo_engine import OutOfPages

RUN = [
    "--sampled-tokens", "400", "--prompts-per-step", "4", "--search.rounds", "3", "--sampling.max-tokens", "6",
    "--eval.prompts", "2", "--eval.samples", "1", "--optim.lr", "1e-3", "--checkpoint-every", "2",
]  # fmt: skip


def _train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Arguments for a model that answers additions with some digit."""
    folder = tmp_path_factory.mktemp("adder")
    model, data = save_checkpoint(folder / "model", teach=40), save_additions(folder / "rows.jsonl")
    return ["--model", model, "--data", data, "--jsonl.grade", "exact", *RUN]


@pytest.fixture(scope="module")
def whole(adder: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _train(*adder, "--out", folder) == 0
    assert sum(row["optimizer_steps"] for row in step_rows(folder)) > 3
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A finished run that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _stop_after_step(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer._finish_step

    def finish(trainer: Trainer, *arguments: Any) -> None:
        original(trainer, *arguments)
        if trainer.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Trainer, "_finish_step", finish)


def test_a_run_in_whose_texts_no_step_ends_says_so(
    adder: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(*adder, "--out", tmp_path / "chains") == 0
    assert (
        r"no trajectory of the first step has a second reasoning step, since '\n\n' (search.separator) ends none"
        in (capsys.readouterr().out)
    )
    assert _train(*adder, "--out", tmp_path / "steps", "--search.step-tokens", "1") == 0
    assert "ends none" not in capsys.readouterr().out
    assert (
        step_rows(tmp_path / "chains")[0]["response_steps"] == 1.0 < step_rows(tmp_path / "steps")[0]["response_steps"]
    )


# ---- NaN and Inf -------------------------------------------------------------------------------------------------


def _fail_steps(patch: pytest.MonkeyPatch, which: Callable[[int], bool], value: float) -> None:
    """A gradient with `value` in it at the calls of the optimizer for which `which` says so."""
    original, calls = MasterAdamW.step, iter(range(1, 10**6))

    def step(optimizer: MasterAdamW) -> float:
        if which(next(calls)):
            next(p for p in optimizer._parameters.values() if p.grad is not None).grad.view(-1)[3] = value
        return original(optimizer)

    patch.setattr(MasterAdamW, "step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_the_run_goes_on(
    value: float, adder: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_steps(monkeypatch, lambda call: call in (2, 3), value)
    assert _train(*adder, "--out", tmp_path / "run", "--safeguards.nonfinite-steps", "2") == 0
    rows = step_rows(tmp_path / "run")
    assert sum(row["optimizer_steps_skipped"] for row in rows) == 2
    assert rows[0]["reward"] == step_rows(whole)[0]["reward"]
    assert json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())["nonfinite_in_a_row"] == 0
    assert all(
        torch.isfinite(w).all() for w in load_file(last_checkpoint(tmp_path / "run") / "model.safetensors").values()
    )


def test_a_loss_that_is_not_finite_is_skipped_too(
    adder: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ibtpo.update.summarize, iter(range(10**6))

    def summarize(parts: Any) -> dict[str, float]:
        return original(parts) | ({"loss": math.nan} if next(calls) == 1 else {})

    monkeypatch.setattr(ibtpo.update, "summarize", summarize)
    assert _train(*adder, "--out", tmp_path / "run") == 0
    assert sum(row["optimizer_steps_skipped"] for row in step_rows(tmp_path / "run")) == 1


def test_too_many_skipped_steps_in_a_row_end_the_run(
    adder: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the run was resumed between them; and then it goes on from before, once the cause is gone."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        _fail_steps(patch, lambda call: call > 2, math.nan)
        assert _train(*adder, "--out", folder, "--safeguards.nonfinite-steps", "3", "--checkpoint-every", "1") == 2
    message = capsys.readouterr().err
    assert "4 optimizer steps in a row" in message and "lower optim.lr" in message
    state = json.loads((last_checkpoint(folder) / "state.json").read_text())
    assert 0 < state["nonfinite_in_a_row"] <= 3
    with pytest.MonkeyPatch.context() as patch:
        _fail_steps(patch, lambda call: True, math.inf)
        assert _train("--resume", folder) == 2
    assert "4 optimizer steps in a row" in capsys.readouterr().err
    assert _train("--resume", folder) == 0
    assert_complete(folder, 400)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_policy_with_nan_is_not_trained(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[5] = value
    policy.save(tmp_path / "model")
    assert _train("--model", tmp_path / "model", "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "model") in message and "NaN or Inf" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_nan_is_not_gone_on_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even if its checksums are right."""
    path = last_checkpoint(run)
    weights = load_file(path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    sums = json.loads((path / CHECKSUMS).read_text()) | {"model.safetensors": _sum(path / "model.safetensors")}
    (path / CHECKSUMS).write_text(json.dumps(sums))
    assert damage(Checkpoint(0, path)) is None
    assert _train("--resume", run, "--sampled-tokens", "900") == 2
    assert str(path) in (message := capsys.readouterr().err) and "NaN or Inf" in message


def test_weights_that_became_nan_are_not_saved(
    adder: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer._finish_step

    def finish(trainer: Trainer, *arguments: Any) -> None:
        if trainer.state.step == 3:
            next(trainer.policy.model.parameters()).data.view(-1)[0] = math.nan
        original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_finish_step", finish)
    assert _train(*adder, "--out", tmp_path / "run") == 2
    assert "at step 4; nothing was saved" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "run").name == "step-000002"


def test_a_card_whose_renewal_was_killed_is_renewed_by_a_resume(run: Path) -> None:
    """The last evaluation was logged, its card half written; and an older checkpoint keeps no such leftover either."""
    last = last_checkpoint(run)
    whole = (last / "README.md").read_text()
    (last / "README.md").write_text("without the last evaluation")
    leftovers = [path / ".README.md.tmp" for path in (run / "checkpoints").glob("step-*")]
    assert len(leftovers) > 1
    for leftover in leftovers:
        leftover.write_text(whole[:40])
    assert _train("--resume", run) == 0
    assert (last / "README.md").read_text() == whole
    assert not any(leftover.exists() for leftover in leftovers)
    assert_complete(run, 400)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [GraderError("too many failed"), OutOfPages("raise kv_tokens"), OSError("no file")])
def test_an_error_while_sampling_loses_no_step(
    error: Exception, adder: list[object], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, original = tmp_path / "run", RewardGrades.grade

    def grade(*arguments: Any) -> Any:
        if (folder / "metrics.jsonl").exists() and len(step_rows(folder)) == 3:
            failing.append(1)
        if len(failing) > 5:  # in the midst of the fourth step
            raise error
        return original(*arguments)

    failing: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardGrades, "grade", grade)
        assert _train(*adder, "--out", folder) == 2
    last = last_checkpoint(folder)
    assert last.name == "step-000003" and len(step_rows(folder)) == 3
    message = f"{error}; saved {last}; continue with: ibtpo train --resume {folder}"
    larger = " and a larger --engine.kv-tokens" * isinstance(error, OutOfPages)
    assert f"ibtpo: error: {message}{larger}\n" == capsys.readouterr().err
    assert _train("--resume", folder) == 0
    assert_same_end(folder, whole)


def test_an_error_while_updating_saves_nothing_half_done(
    adder: list[object],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, original = tmp_path / "run", Trainer._keep_trees

    def keep(trainer: Trainer, *arguments: Any) -> None:
        if trainer.state.step == 3:
            raise OSError("no file")
        original(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep_trees", keep)
        assert _train(*adder, "--out", folder) == 2
    last = folder / "checkpoints" / "step-000002"
    assert last_checkpoint(folder) == last
    assert f"no file; saved before: {last}; continue with: ibtpo train --resume {folder}" in capsys.readouterr().err
    assert _train("--resume", folder) == 0
    assert_same_end(folder, whole)


# ---- what a resumed run may change -------------------------------------------------------------------------------

FREE = {"jsonl.grade_workers", "jsonl.grade_timeout", "jsonl.max_failed_share"}


def _names(config: Any, prefix: str = "") -> set[str]:
    names = set()
    for field in fields(config):
        value = getattr(config, field.name)
        names |= _names(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return names


def test_every_data_field_is_fixed_or_known_to_be_free() -> None:
    names = _names(TrainConfig())
    assert {name for name in FIXED if name not in names} == {"digits", "lora", "warm_start"}  # whole sections
    assert _names(JsonlConfig(), "jsonl.") - set(FIXED) == FREE


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"], ["--dtype", "bfloat16"], ["--layout", "gsm8k"], ["--reward", "math"], ["--lora.rank", "2"],
        ["--jsonl.template", "{prompt}!"], ["--jsonl.system-prompt", "x"], ["--jsonl.eval-count", "3"],
        ["--jsonl.no-chat-template"], ["--jsonl.grade", "math"], ["--jsonl.duplicates", "keep"],
        ["--jsonl.unanswered", "drop"],
        ["--jsonl.max-prompt-tokens", "9"], ["--jsonl.max-pass-rate", "0.5"], ["--data", "other.jsonl"],
        ["--optim.state", "8bit"], ["--out", "elsewhere"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_makes_it_another_run_is_refused(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    assert _train("--resume", run, *flags) == 2
    name = flags[0].removeprefix("--").replace("no-", "").replace("-", "_")
    message = capsys.readouterr().err
    assert f"resume: {name} cannot change from " in message and "begin a new run with --out" in message
    assert before == ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes())


def test_a_preset_for_a_run_that_has_its_settings_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_bytes()
    for command in (["train", "--resume"], ["config", "--resume"], ["sample", "--model"]):
        assert main([*command, str(run), "--preset", "grpo"]) == 2
        assert f"preset: grpo would be ignored, since {run} has its own settings" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def _sign(path: Path) -> None:
    """Let a checkpoint's file, as it is now, be what was written."""
    sums = json.loads((path.parent / CHECKSUMS).read_text()) | {path.name: _sum(path)}
    (path.parent / CHECKSUMS).write_text(json.dumps(sums))


def _rename_moments(path: Path) -> None:
    state = load_file(path)
    save_file({name.replace("exp_avg.", "state1."): value for name, value in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state.json", lambda path: path.write_text('{"field_of_the_future": 1}'), "are not of this version"),
        ("optimizer.safetensors", _rename_moments, "resume: optim.state: the optimizer was saved as 8bit, not float32"),
    ],
)
def test_a_resume_that_fails_changes_no_setting(
    name: str, change: Callable[[Path], object], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = last_checkpoint(run) / name
    right, before = file.read_bytes(), (run / "config.yaml").read_bytes()
    change(file)
    _sign(file)
    assert _train("--resume", run, "--optim.lr", "1e-4", "--sampled-tokens", "700") == 2
    assert message in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    file.write_bytes(right)
    _sign(file)
    assert _train("--resume", run) == 0
    assert "other settings" not in capsys.readouterr().out


def test_a_data_file_that_has_changed_is_refused(
    adder: list[object], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one that was moved; and checkpoints from before its fingerprint was kept are gone on from."""
    data, config, state = tmp_path / "moved.jsonl", run / "config.yaml", last_checkpoint(run) / "state.json"
    rows = Path(str(adder[3])).read_text().splitlines(keepends=True)
    config.write_text(config.read_text().replace(str(adder[3]), str(data)))
    changed = json.loads(rows[0])
    changed["answer"] += "0"
    for content in (rows[:-3], rows[::-1], [json.dumps(changed) + "\n", *rows[1:]]):
        data.write_text("".join(content))
        assert _train("--resume", run, "--sampled-tokens", "700") == 2
        message = capsys.readouterr().err
        assert f"resume: {data}, jsonl.eval_data or jsonl.few_shot has changed (before: {len(rows)} rows, " in message
        assert f"now: {len(content)} rows, " in message
    data.write_text("".join(rows))
    assert _train("--resume", run) == 0
    values = json.loads(state.read_text())
    del values["problems"]
    state.write_text(json.dumps(values))
    _sign(state)
    data.write_text("".join(rows[:-3]))
    assert _train("--resume", run, "--sampled-tokens", "450") == 0
    assert json.loads((last_checkpoint(run) / "state.json").read_text())["problems"].startswith(f"{len(rows) - 3} rows")


def test_a_run_that_has_lost_its_checkpoints_keeps_its_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert _train("--resume", run) == 2
    message = capsys.readouterr().err
    assert (
        f"{run} has logged {len(step_rows(run))} steps, but there is no checkpoint in {run / 'checkpoints'}" in message
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_rest_may_change_and_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--optim.lr", "1e-4", "--jsonl.grade-timeout", "3", "--sampled-tokens", "700", "--search.rounds", "2"]
    assert _train("--resume", run, *changes) == 0
    said = capsys.readouterr().out
    for text in ("optim.lr 0.001 -> 0.0001", "jsonl.grade_timeout 5.0 -> 3.0", "search.rounds 3 -> 2"):
        assert text in said
    assert_complete(run, 700)


def test_resume_needs_no_flag_repeated_and_finds_its_data_from_anywhere(
    adder: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in Path(str(adder[3])).read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": r["prompt"], "a": r["answer"]}) + "\n" for r in rows))
    shutil.copytree(str(adder[1]), tmp_path / "model")
    data = [
        "--data", "rows.jsonl", "--layout", "plain", "--reward", "exact:2", "format:1", "--jsonl.prompt-field", "q",
        "--jsonl.answer-field", "a", "--jsonl.template", "Q: {prompt}", "--jsonl.eval-count", "4",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    settings = ["--model", "model", *data, *RUN]
    assert _train(*settings, "--out", "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        _stop_after_step(patch, 3)
        assert _train(*settings, "--out", "run") == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert _train("--resume", tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    assert _train("--resume", "run", *data, "--model", "model") == 0  # repeated, they are the same
    settings_file = tmp_path / "run" / "config.yaml"
    settings_file.write_text(settings_file.read_text().replace(f"{tmp_path}/", ""))  # mended by hand after a move
    assert "data: rows.jsonl" in settings_file.read_text()
    assert _train("--resume", "run") == 0
    assert f"data: {tmp_path}/rows.jsonl" in settings_file.read_text()


# ---- disks -------------------------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting is not permitted here")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


@pytest.mark.parametrize("checkpoints", [0.5, 1.5])
def test_a_disk_that_is_really_full(
    checkpoints: float, disk: Disk, adder: list[object], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk.path / "run"
    disk.remount(f"size={int(checkpoints * _bytes(last_checkpoint(whole))) + 40_000}")
    assert _train(*adder, "--out", folder, "--trees-per-step", "0") == 2
    message = capsys.readouterr().err
    assert f"no space left on the disk of {folder}" in message and f"--resume {folder}" in message
    assert [path for path in folder.rglob("*") if ".tmp" in path.name] == []
    found = sorted((folder / "checkpoints").iterdir())
    assert (f"kept: {found[-1]}" if found else "no checkpoint was there before") in message
    assert [damage(Checkpoint(0, path)) for path in found] == [None] * len(found)
    disk.remount("size=64m")
    assert _train("--resume", folder) == 0
    assert_same_end(folder, whole)


def test_a_disk_that_became_read_only(disk: Disk, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(whole, disk.path / "run"))
    disk.remount("ro")
    assert _train("--resume", folder, "--sampled-tokens", "900") == 2
    assert f"{folder} cannot be written (Read-only file system); make it writable" in capsys.readouterr().err
    assert _train("--model", "built-in", "--out", disk.path / "other") == 2
    assert f"{disk.path / 'other'} cannot be created (Read-only file system)" in capsys.readouterr().err


# ---- other processes ---------------------------------------------------------------------------------------------


def test_a_second_process_on_a_running_run_is_refused_and_does_no_harm(
    adder: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original, others = tmp_path / "run", Trainer._finish_step, []

    def finish(trainer: Trainer, *arguments: Any) -> None:
        original(trainer, *arguments)
        if trainer.state.step == 3:
            command = [sys.executable, "-m", "ibtpo", "train", "--resume", str(folder)]
            others.append(subprocess.run(command, capture_output=True, text=True, check=False))

    monkeypatch.setattr(Trainer, "_finish_step", finish)
    assert _train(*adder, "--out", folder) == 0
    [other] = others
    assert other.returncode == 2
    assert f"{folder} is in use by another run" in other.stderr
    assert "--out" not in other.stderr  # which does not apply to a resumed run
    assert_same_end(folder, whole)


def test_grading_processes_that_are_killed_do_not_end_the_run(
    adder: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, killed = Grader.submit, []

    def submit(grader: Grader, graded: Graded) -> Any:
        process = grader._workers[0]._process
        if process is not None and len(killed) < 3 and process.pid not in killed:
            killed.append(process.pid)
            process.kill()
        return original(grader, graded)

    monkeypatch.setattr(Grader, "submit", submit)
    assert _train(*adder, "--out", tmp_path / "run", "--reward", "exact:2", "format:1") == 0
    assert_complete(tmp_path / "run", 400)
    assert len(set(killed)) == 3
    row = step_rows(tmp_path / "run")[-1]
    assert row["reward_failures"] <= 3 and row["reward_timeouts"] == 0


def test_a_closed_pipe_stops_the_run_with_a_checkpoint(adder: list[object], whole: Path, tmp_path: Path) -> None:
    """`ibtpo train | head -n 1`, where every step prints."""
    folder = tmp_path / "run"
    script = (
        "import sys, ibtpo.progress as p; p.SECONDS_BETWEEN_LINES = 0.0; from ibtpo.cli import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "train",
        *map(str, adder),
        "--out",
        str(folder),
        "--sampled-tokens",
        "50000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    while line and "Training:" not in line:
        line = process.stdout.readline()
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait(60) == 0, message
    assert f"--resume {folder}" in message and "Traceback" not in message
    step = json.loads((last_checkpoint(folder) / "state.json").read_text())["step"]
    assert len(step_rows(folder)) == step
    assert _train("--resume", folder, "--sampled-tokens", "400") == 0
    if step <= len(step_rows(whole)):
        assert_same_end(folder, whole)


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_closed_terminal_stops_the_run_with_a_checkpoint_unless_told_otherwise(
    ignored: bool, adder: list[object], whole: Path, tmp_path: Path
) -> None:
    folder, budget = tmp_path / "run", "400" if ignored else "1_000_000"
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    command = [sys.executable, "-m", "ibtpo", "train", *map(str, adder), "--out", str(folder)]
    process = subprocess.Popen(
        [*command, "--sampled-tokens", budget],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as `whole`: on some processors torch's sums depend on it
    )
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(step_rows(folder)) < 1:
        assert time.monotonic() < deadline and process.poll() is None, shown.decode()
        if select.select([master], [], [], 0.005)[0]:  # whoever does not read holds up the run
            shown += os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 0, shown.decode()
    step = json.loads((last_checkpoint(folder) / "state.json").read_text())["step"]
    assert len(step_rows(folder)) == step
    if ignored:
        assert_same_end(folder, whole)


# ---- names and texts that a terminal would take for commands -----------------------------------------------------


def test_names_that_look_like_markup_and_texts_with_escapes_are_shown_as_they_are(
    adder: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = adder[1], [{"question": f"{i} \x1b[2J+ 1", "answer": str(i + 1)} for i in range(9)]
    data = tmp_path / "[bold" / "].jsonl"  # "[bold/]" would be markup, and wrong
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "[b]run[" / "y]"
    flags = [*adder[4:], "--data", data]
    assert _train("--model", model, *flags, "--sampled-tokens", "40", "--out", folder) == 0
    assert main(["eval", *map(str, ["--model", folder, "--limit", "2", "--out", tmp_path / "[" / "e]"])]) == 0
    assert main(["eval", *map(str, ["--model", folder, "--limit", "2", "--out", tmp_path / "[" / "e]"])]) == 0
    assert main(["view", str(folder), "--export", str(tmp_path / "[" / "p].html")]) == 0
    assert main(["sample", *map(str, ["--model", folder])]) == 0
    shown = capsys.readouterr()
    for path in (data, folder, tmp_path / "[" / "e]", tmp_path / "[" / "p].html"):
        assert str(path) in shown.out.replace("\n", "")
    assert "\\x1b[2J" in shown.out and "\x1b[2J" not in shown.out + shown.err
