"""Grading workers: right, and never fatal whatever a grader does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibtpo import grading
from ibtpo.grading import Grader, GraderError

BAD_GRADERS = """
import ctypes, os, signal, sys, time

def grade(answer, completion):
    print("noise on standard output")
    if completion == "sleep":
        time.sleep(600)
    if completion == "swallow":
        while True:
            try:
                time.sleep(600)
            except Exception:
                pass
    if completion == "hang in C":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        ctypes.PyDLL(None).sleep(600)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "exit":
        sys.exit(0)
    if completion == "raise":
        raise RuntimeError("x" * 100_000)
    if completion == "memory":
        return float(len(bytearray(1 << 40)))
    if completion == "nan":
        return float("nan")
    if completion == "torch":
        return float("torch" in sys.modules)
    if completion == "pid":
        return os.getpid() / 1e9
    return float(answer == completion)
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "bad_graders.py").write_text(BAD_GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "bad_graders:grade"


@pytest.fixture(scope="module")
def math() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("4", r"The sum is \boxed{4}.", 1.0),
        ("4", r"The sum is \boxed{5}.", 0.0),
        (r"\frac{1}{2}", "The answer is $0.5$", 1.0),
        ("1/2", r"\boxed{\frac12}", 1.0),
        ("$x^2+1$", r"\boxed{1+x^2}", 1.0),
        (r"\boxed{3}", "first $2$, finally $3$", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("(1,2)", r"\boxed{(2, 1)}", 0.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        ("12", "thinking\n\nfinal answer: 12", 1.0),
        ("12", "", 0.0),
        ("Paris", r"\boxed{Paris}", 1.0),
        ("Paris", r"\boxed{London}", 0.0),
        ("1", "\\boxed{\ud800}", 0.0),  # a lone surrogate: no UTF-8, but JSON carries it
    ],
)
def test_math_answers_are_compared_by_value(math: Grader, answer: str, completion: str, reward: float) -> None:
    assert math.submit(answer, completion).result(60) == reward


def test_math_grading_keeps_up_with_sampling(math: Grader) -> None:
    math.submit("1", "1").result(60)
    begin = time.monotonic()
    futures = [math.submit(r"\frac{3}{4}", rf"thus \boxed{{\frac{{{i}}}{{4}}}}") for i in range(100)]
    assert sum(future.result(60) for future in futures) == 1.0
    assert 100 / (time.monotonic() - begin) > 20  # hundreds a second on an idle core


@pytest.mark.parametrize("completion", ["sleep", "swallow", "hang in C"])
def test_a_hanging_grader_counts_as_timed_out_and_the_rest_survive(bad: str, completion: str) -> None:
    with Grader(1, timeout=0.2, function=bad) as grader:
        texts = ["4", completion, "4", "5"]
        futures = [grader.submit("4", text) for text in texts]
        assert [future.result(60) for future in futures] == [1.0, 0.0, 1.0, 0.0]
        assert (grader.timeouts, grader.failures) == (1, 0)


def test_a_failing_grader_counts_as_wrong_and_the_rest_survive(bad: str) -> None:
    with Grader(2, timeout=5.0, function=bad) as grader:
        texts = ["die", "4", "raise", "exit", "4", "memory", "nan", "die", "4"]
        futures = [grader.submit("4", text) for text in texts]
        assert [future.result(60) for future in futures] == [float(text == "4") for text in texts]
        assert (grader.timeouts, grader.failures) == (0, 6)


def test_a_worker_killed_between_gradings_is_replaced_unnoticed(bad: str) -> None:
    with Grader(1, function=bad) as grader:
        pid = round(grader.submit("4", "pid").result(60) * 1e9)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert grader.submit("4", "4").result(60) == 1.0
        assert grader.failures == 0


def test_long_completions_pass_the_pipe(bad: str) -> None:
    with Grader(1, function=bad) as grader:
        text = "long \u2028 text\n" * 100_000
        assert grader.submit(text, text).result(60) == 1.0


def test_workers_do_not_load_torch(bad: str) -> None:
    with Grader(1, function=bad) as grader:
        assert grader.submit("", "torch").result(60) == 0.0


def test_close_ends_processes_and_cancels_what_waits(bad: str) -> None:
    grader = Grader(1, timeout=60.0, function=bad)
    pid = round(grader.submit("4", "pid").result(60) * 1e9)
    running, waiting = grader.submit("4", "sleep"), grader.submit("4", "4")
    time.sleep(0.2)
    begin = time.monotonic()
    grader.close()
    grader.close()
    assert time.monotonic() - begin < 10
    assert running.result(0) == 0.0 and waiting.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        grader.submit("4", "4")


def test_a_grader_that_cannot_start_says_so(bad: str) -> None:
    with Grader(1, function="bad_graders:missing") as grader, pytest.raises(GraderError, match="3 attempts"):
        grader.submit("4", "4").result(60)


def test_missing_math_verify_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'math-verify.*"exact"'):
        Grader()


def test_workers_end_when_the_trainer_is_killed(bad: str, tmp_path: Path) -> None:
    script = (
        f"from ibtpo.grading import Grader; g = Grader(1, 0.3, {bad!r})\n"
        "print(round(g.submit('', 'pid').result() * 1e9), flush=True); g.submit('', 'hang in C').result()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"worker {pid} outlived its parent")
