"""Progress: lines now and then where nobody watches, figures below a bar on a terminal, silence when asked."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ibtpo import progress
from ibtpo.progress import duration, step_note, track

VALUES = {"avg_rate_iid": 0.25, "eff_rate": 0.5, "tokens_per_second": 12345.6, "peak_memory": 3 * 2.0**30}


def test_a_step_s_figures_in_a_line() -> None:
    assert step_note(7, VALUES) == "step 7  reward (iid) 0.250  eff-rate 0.50  12,346 tok/s  3.0 GiB"
    assert step_note(7, {}).startswith("step 7  ") and step_note(7, {}).endswith("GiB")


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with track(Console(file=out), "Training", 100) as tracker:
        tracker.advance(20)  # done before the run was resumed: not part of the speed
        for _ in range(8):
            clock[0] += 4.0
            tracker.advance(10, "step 1")
    lines = out.getvalue().splitlines()
    assert lines == ["Training:  50%  step 1  20 s left", "Training:  80%  step 1  8 s left", "Training: 100%  step 1"]


def test_no_work_at_all_is_done() -> None:
    out = io.StringIO()
    with track(Console(file=out), "Study", 0) as tracker:
        tracker.advance(0)
    assert out.getvalue().startswith("Study: 100%")


def test_a_terminal_gets_a_bar_with_the_figures() -> None:
    out = io.StringIO()
    with track(Console(file=out, force_terminal=True, width=100), "Training", 10) as tracker:
        tracker.advance(5, step_note(3, VALUES))
    assert "50%" in out.getvalue() and "step 3  reward (iid) 0.250" in out.getvalue()
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"50% 0:00:00 (-:--:--|0:00:0\d) left", words)  # what passed; what is left, and so named


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with track(Console(quiet=True), "Training", 1) as tracker:
        tracker.advance(1, "note")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (185, "3:05"), (7800, "2:10:00")])
def test_durations_for_reading(seconds: float, text: str) -> None:
    assert duration(seconds) == text
