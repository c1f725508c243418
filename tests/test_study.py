"""`ibtpo study` end to end in real processes: a tiny study, a failed cell, a kill -9 and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ibtpo.studies.run
from ibtpo.cli import main

TINY = """
title: Tiny
run:
  digits: {min_ops: 1, max_ops: 2}
  warm_start: {max_updates: 12, decay_updates: 2, batch_size: 8}
  sampling: {max_tokens: 16}
  prompts_per_step: 4
variants:
  grpo: {}
  ib-tpo: {}
"""
FLAGS = ["--seeds", "1", "--tokens", "1500", "--eval-prompts", "4"]


def results(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}


def test_killed_study_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 once the warm start is done: its process dies too, the next call does the rest and only that."""
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(TINY)
    arguments = ["study", str(file), "--out", str(out), "--jobs", "1", *FLAGS]
    process = subprocess.Popen([sys.executable, "-m", "ibtpo", *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("cells/train-*/spec.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = results(out)
    assert [name.split("-seed")[0] for name in before] == ["start-policy"]
    assert main(arguments) == 0
    after = results(out)
    assert len(after) == 3 and before.items() <= after.items()
    for name in ("table.csv", "table.md", "study.html", "curves-tokens.svg", "curves-seconds.png", "figure-3.svg"):
        assert (out / "tiny" / name).stat().st_size > 200, name
    page = (out / "tiny" / "study.html").read_text()
    assert (
        "ibtpo study" in page
        and "--tokens 1500" in page
        and "data:image/svg+xml" in page
        and "http" not in page.split("</style>")[1]
    )
    assert main([*arguments, "--report-only"]) == 0
    assert results(out) == after
    assert "2 cells, 2 done" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_study_that_is_told_to_stop_reports(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cells are ended, not left behind; the page says what is missing."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    cells = []

    def begin(*_: object) -> subprocess.Popen[bytes]:
        cells.append(subprocess.Popen(["sleep", "600"]))
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return cells[-1]

    monkeypatch.setattr(ibtpo.studies.run, "_begin", begin)
    arguments = ["study", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1", *FLAGS]
    assert main(arguments) == code
    assert [cell.poll() for cell in cells] == [-signal.SIGKILL]
    assert (tmp_path / "out" / "tiny" / "study.html").is_file()
    said = capsys.readouterr()
    assert "cells without a result yet: 2" in said.out and "the same command continues" in said.err


def test_a_cell_runs_on_each_core_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not on all of a machine of which a scheduler has lent a part."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    assert main(["study", "main", "--report-only", "--out", str(tmp_path / "out")]) == 0
    assert "3 at a time" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["study", "main", "--report-only", "--out", str(tmp_path / "file" / "studies")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "studies cannot be made (Not a directory); choose another folder with --out" in said


def test_seeds_are_not_for_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert main(["study", "main", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "mine.yaml: seed is the study's to set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_cell_is_recorded_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model folder that is not there fails its cells with the message; the same command tries again."""
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(f"run: {{model: {tmp_path / 'nowhere'}, task: digit-chain}}\nvariants: {{grpo: {{}}}}\n")
    arguments = ["study", str(file), "--out", str(out), "--jobs", "2", *FLAGS]
    assert main(arguments) == 1
    [error] = out.glob("cells/*/error.txt")
    assert "nowhere" in error.read_text()
    assert "failed: train-grpo-seed0" in capsys.readouterr().out
    first = error.stat().st_mtime_ns
    assert main(arguments) == 1
    assert error.stat().st_mtime_ns > first
    assert "Failed" in (out / "mine" / "study.html").read_text()


def test_bias_study_finds_the_bias_of_guided_branching(tmp_path: Path) -> None:
    """No engine needed: the i.i.d. roots are unbiased, IBTree's leaf mean is not."""
    out = tmp_path / "out"
    file = tmp_path / "bias-small.yaml"
    variants = "{independent: {preset: grpo}, ibtree: {preset: ib-tpo, ib: {zero_parent: zero}}}"
    table = "{medium: {facts: [0.95, 0.7, 0.3], depth: 4}}"
    file.write_text(f"kind: bias\ntasks: {table}\nvariants: {variants}\n")
    assert main(["study", str(file), "--out", str(out), "--seeds", "1", "--prompts", "1500"]) == 0
    rows = [line.split(",") for line in (out / "bias-small" / "table.csv").read_text().splitlines()[1:]]
    means = {(row[1], row[2]): float(row[3]) for row in rows}
    assert means["ibtree", "avg_rate"] > 0.02
    assert abs(means["ibtree", "avg_rate_iid"]) < 0.015 and abs(means["independent", "avg_rate"]) < 0.015
