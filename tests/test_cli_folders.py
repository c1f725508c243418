"""Folders that a run may not write to, and disks that are full: what was there stays."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import DIGITS, SMALL, Refusal

import ibtpo.runlog
import ibtpo.trainer
from ibtpo.cli import main

# ---- the output folder -------------------------------------------------------------------------------------------


def test_a_folder_that_holds_files_is_left_alone(refused: Refusal) -> None:
    refused.out.mkdir()
    (refused.out / "thesis.tex").write_text("years of work")
    assert f"out: {refused.out} already holds files; choose another" in refused(*DIGITS, *SMALL, written=True)
    assert [path.name for path in refused.out.iterdir()] == ["thesis.tex"]


def test_a_run_folder_is_not_overwritten_but_may_be_resumed(
    refused: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(refused.out), *DIGITS, *SMALL]) == 0
    before = {path: path.stat().st_mtime_ns for path in refused.out.rglob("*")}
    message = refused(*DIGITS, *SMALL, written=True)
    assert f"--resume {refused.out}" in message
    assert {path: path.stat().st_mtime_ns for path in refused.out.rglob("*")} == before


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert main(["train", "--out", str(tmp_path / "run"), *DIGITS, *SMALL]) == 0


def test_out_is_a_file(refused: Refusal) -> None:
    refused.out.write_text("mine")
    assert f"out: {refused.out} is a file; choose another folder" in refused(*DIGITS, *SMALL, written=True)
    assert refused.out.read_text() == "mine"


def test_parent_is_a_file(tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "file").write_text("mine")
    refused.out = tmp_path / "file" / "run"
    assert f"out: {refused.out} cannot be created" in refused(*DIGITS, *SMALL)


def test_parent_that_may_not_be_written(tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the superuser may write anywhere."""
    original = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(refused.out)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        original(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    message = refused(*DIGITS, *SMALL)
    assert f"out: {refused.out} cannot be created (Permission denied); choose another --out" in message


def test_resume_of_what_is_no_run_folder(tmp_path: Path, refused: Refusal) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        message = refused("--resume", folder)
        assert f"resume: {folder} is not a run folder (it has no config.yaml); check the path" in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_written_does_not_continue_with_other_settings(
    refused: Refusal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated: the superuser may write anywhere."""
    assert main(["train", "--out", str(refused.out), *DIGITS, *SMALL]) == 0
    resume = ["train", "--resume", str(refused.out), "--sampled-tokens", "160"]

    def take_lock(path: Path, remedy: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(ibtpo.runlog, "_take_lock", take_lock)
        capsys.readouterr()
        assert main(resume) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"resume: {refused.out} cannot be written (Read-only file system); make it writable" in output.err
    assert main(resume) == 0
    assert "continues with other settings: sampled_tokens 150 -> 160" in capsys.readouterr().out


# ---- a full disk -------------------------------------------------------------------------------------------------


def _full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def _leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".tmp" in path.name]


def test_full_disk_at_a_checkpoint_keeps_the_last_one(
    refused: Refusal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = ibtpo.trainer.save_file, iter(range(100))

    def save(tensors: Any, path: Path) -> None:
        if next(calls) == 2:
            path.write_bytes(b"half a file")
            raise _full()
        original(tensors, path)

    flags = [*DIGITS, *SMALL, "--checkpoint-every", "1", "--sampled-tokens", "600"]
    with monkeypatch.context() as patch:
        patch.setattr(ibtpo.trainer, "save_file", save)
        message = refused(*flags, written=True)
    assert f"no space left on the disk of {refused.out}" in message
    assert f"--resume {refused.out}" in message
    assert "step-000001" in message
    assert _leftovers(refused.out) == []
    assert sorted(path.name for path in (refused.out / "checkpoints").iterdir()) == ["step-000000", "step-000001"]
    assert main(["train", "--resume", str(refused.out)]) == 0


def test_full_disk_as_safetensors_puts_it(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Rust side hides errno in a message of its own."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"

    def save(tensors: Any, path: Path) -> None:
        raise ibtpo.trainer.SafetensorError(text)

    monkeypatch.setattr(ibtpo.trainer, "save_file", save)
    assert "no space left on the disk of" in refused(*DIGITS, *SMALL, written=True)
    assert list((refused.out / "checkpoints").iterdir()) == []


def test_full_disk_in_the_log_keeps_whole_lines(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    original, writes = Path.open, iter(range(1000))

    class Full(io.TextIOWrapper):
        def flush(self) -> None:
            super().flush()
            raise _full()

    def open_full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name == "metrics.jsonl" and mode == "a" and next(writes) == 3:
            return Full(builtins.open(path, "ab"), encoding="utf-8")
        return original(path, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        message = refused(*DIGITS, *SMALL, "--sampled-tokens", "600", written=True)
    assert f"no space left on the disk of {refused.out}" in message
    lines = (refused.out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all(isinstance(json.loads(line)["step"], int) for line in lines)
    assert main(["train", "--resume", str(refused.out)]) == 0


def test_full_disk_before_the_run_leaves_nothing(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise _full()

    monkeypatch.setattr(os, "fsync", fsync)
    assert f"no space left on the disk of {refused.out}" in refused(*DIGITS, *SMALL)
