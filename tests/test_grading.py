"""Grading workers: right, and never fatal whatever a grader does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from ibtpo import rewards
from ibtpo.grading import WINDOW, Grader, GraderError
from ibtpo.latex import as_remainder, in_latex, with_modulus
from ibtpo.rewards import Graded, RewardSpec, _check_function, math_equal, parse_rewards

BAD_GRADERS = """
import ctypes, os, pathlib, signal, subprocess, sys, time

def grade(prompt, completion, answer, data):
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
    if completion == "\\x1b[2J":
        raise RuntimeError(completion)
    if completion == "memory":
        return float(len(bytearray(1 << 40)))
    if completion == "nan":
        return float("nan")
    if completion == "text":
        return "1.0"
    if completion == "two":
        return 2.0
    if completion == "torch":
        return float("torch" in sys.modules)
    if completion == "import":
        import slow_module
        return float(slow_module.LOADED)
    if completion == "stdin":
        subprocess.Popen(["cat"])
        return float(sys.stdin.read() == "")
    if completion.startswith("child"):
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path(completion[5:]).write_text(str(child.pid))
        return 1.0
    if completion == "pid":
        return os.getpid() / 1e9
    return float(answer == completion)
"""


Bad = tuple[RewardSpec, ...]


def submit(grader: Grader, answer: str, completion: str) -> Future[float]:
    return grader.submit(Graded("?", completion, answer, {}))


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RewardSpec, ...]]:
    (tmp_path / "bad_graders.py").write_text(BAD_GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield (RewardSpec("bad_graders:grade"),)


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
        ("34", "So it is done.\nAnswer:34", 1.0),
        ("-34", "**Final answer:**-34.", 1.0),
        ("34", "34\n####34", 1.0),
        ("12", "", 0.0),
        ("Paris", r"\boxed{Paris}", 1.0),
        ("Paris", r"\boxed{London}", 0.0),
        ("11", "<think>maybe \\boxed{10}. Hmm, wait, recheck.</think>\n\nThe answer is \\boxed{11}.", 1.0),
        ("11", "<think>it is \\boxed{11}</think>", 0.0),
        ("11", "\\boxed{10}\n\nWait, no.\n\n\\boxed{11}", 1.0),
        ("11", r"\boxed{10}, wait, no, \boxed{11}", 1.0),
        ("10", r"\boxed{10}. Or rather $\boxed{11}$.", 0.0),
        ("1,2", r"The roots are $\boxed{1}$ and $\boxed{2}$.", 1.0),
        ("1,2", "$x_1 = \\boxed{1}$,\n$x_2 = \\boxed{2}$", 1.0),
        ("1,2,3", r"\boxed{1}, \boxed{2}, and \boxed{3}", 1.0),
        ("2", r"The roots are $\boxed{1}$ and $\boxed{2}$.", 0.0),
        ("7", r"\boxed{5}? The final answer is $7$.", 1.0),
        ("5", r"\boxed{\boxed{5}}", 1.0),
        ("5", r"\fbox{4}, no: \fbox{5}", 1.0),
        ("5", r"I write it in \boxed form, never in \boxed{}: \boxed {5}", 1.0),
        (r"\boxed 5", r"so $\boxed 5$", 1.0),
        (r"\$18.90", r"It costs $\boxed{\$18.90}$.", 1.0),  # as the solutions of MATH write money
        (r"\$32,\!348", r"\boxed{32348}", 1.0),
        ("0.00005", r"\boxed{5\times 10^{-5}}", 1.0),
        ("42", "<think>6*7</think>\n<answer>42</answer>", 1.0),
        ("42", "<answer>17+25</answer>, no, 17+25 is <answer>42.</answer>", 1.0),
        ("B", r"\boxed{A}? <answer>B</answer>", 1.0),
        ("42", "<answer>The answer is 42.</answer>", 1.0),
        ("1,2", r"<answer>\boxed{1} and \boxed{2}</answer> where \boxed{3} is not", 1.0),
        ("72", r"\boxed{72 \pmod{100}}", 1.0),
        ("3", r"\boxed{x \equiv 3 \pmod 5}", 1.0),
        ("5", r"\boxed{x \equiv 3 \pmod 5}", 0.0),
        ("18", r"The total is \$18.", 1.0),
        ("18", r"It costs \$18 and not \$20", 0.0),
        ("C", "It is the third.\n\n**Answer:** (C)", 1.0),
        ("C", "So the answer is **C**.", 1.0),
        ("C", "The answer is not C.", 0.0),
        ("C", "Answer: C? No.\n\nAnswer: B", 0.0),
        ("C", r"\boxed{B}, if you ask for the answer: C", 0.0),
        ("1", "\\boxed{\ud800}", 0.0),  # a lone surrogate: no UTF-8, but JSON carries it
    ],
)
def test_math_answers_are_compared_by_value(math: Grader, answer: str, completion: str, reward: float) -> None:
    assert submit(math, answer, completion).result(60) == reward


def test_math_grading_keeps_up_with_sampling(math: Grader) -> None:
    submit(math, "1", "1").result(60)
    begin = time.monotonic()
    futures = [submit(math, r"\frac{3}{4}", rf"thus \boxed{{\frac{{{i}}}{{4}}}}") for i in range(100)]
    assert sum(future.result(60) for future in futures) == 1.0
    assert 100 / (time.monotonic() - begin) > 20  # hundreds a second on an idle core


def test_an_import_that_was_cut_off_begins_anew(bad: Bad, tmp_path: Path) -> None:
    """Half a module would stay in the process, and every later grading would fail with it."""
    (tmp_path / "slow_module.py").write_text(
        "import pathlib, sys, time\n"
        "if hasattr(sys, 'half_loaded'):\n    raise ImportError('cannot load twice')\n"  # as native modules do
        "sys.half_loaded = True\n"
        f"first = pathlib.Path({str(tmp_path / 'first')!r})\n"
        "if not first.exists():\n    first.touch()\n    time.sleep(600)\n"
        "LOADED = True\n"
    )
    with Grader(bad, timeout=0.5) as grader:
        assert [submit(grader, "", "import").result(60) for _ in range(3)] == [0.0, 1.0, 1.0]
        assert (grader.timeouts, grader.failures) == (1, 0)


def test_what_a_reward_starts_cannot_read_the_requests(bad: Bad) -> None:
    with Grader(bad) as grader:
        futures = [submit(grader, "4", text) for text in ["stdin", "4", "stdin", "4"]]
        assert [future.result(60) for future in futures] == [1.0] * 4


@pytest.mark.parametrize("end", ["close", "sleep", "swallow", "die"])
def test_what_a_reward_starts_ends_with_its_worker(bad: Bad, tmp_path: Path, end: str) -> None:
    with Grader(bad, timeout=0.2) as grader:
        assert submit(grader, "", f"child{tmp_path / 'pid'}").result(60) == 1.0
        child = int((tmp_path / "pid").read_text())
        assert _lives(child)
        if end == "close":
            grader.close()
        else:
            assert submit(grader, "4", end).result(60) == 0.0
        _wait_for_end(child)


@pytest.mark.parametrize("completion", ["sleep", "swallow", "hang in C"])
def test_a_hanging_grader_counts_as_timed_out_and_the_rest_survive(bad: Bad, completion: str) -> None:
    with Grader(bad, timeout=0.2) as grader:
        texts = ["4", completion, "4", "5"]
        futures = [submit(grader, "4", text) for text in texts]
        assert [future.result(60) for future in futures] == [1.0, 0.0, 1.0, 0.0]
        assert (grader.timeouts, grader.failures) == (1, 0)


def test_a_failing_grader_counts_as_wrong_and_the_rest_survive(bad: Bad) -> None:
    with Grader(bad, 2) as grader:
        texts = ["die", "4", "raise", "exit", "4", "memory", "nan", "die", "4"]
        futures = [submit(grader, "4", text) for text in texts]
        assert [future.result(60) for future in futures] == [float(text == "4") for text in texts]
        assert (grader.timeouts, grader.failures) == (0, 6)


def test_a_worker_killed_between_gradings_is_replaced_unnoticed(bad: Bad) -> None:
    with Grader(bad) as grader:
        pid = round(submit(grader, "4", "pid").result(60) * 1e9)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert submit(grader, "4", "4").result(60) == 1.0
        assert grader.failures == 0


def test_long_completions_pass_the_pipe(bad: Bad) -> None:
    with Grader(bad) as grader:
        text = "long \u2028 text\n" * 100_000
        assert submit(grader, text, text).result(60) == 1.0


def test_workers_do_not_load_torch(bad: Bad) -> None:
    with Grader(bad) as grader:
        assert submit(grader, "", "torch").result(60) == 0.0


def test_close_ends_processes_and_cancels_what_waits(bad: Bad) -> None:
    grader = Grader(bad, timeout=60.0)
    pid = round(submit(grader, "4", "pid").result(60) * 1e9)
    running, waiting = submit(grader, "4", "sleep"), submit(grader, "4", "4")
    time.sleep(0.2)
    begin = time.monotonic()
    grader.close()
    grader.close()
    assert time.monotonic() - begin < 10
    assert running.result(0) == 0.0 and waiting.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        submit(grader, "4", "4")


def test_a_grader_that_cannot_start_says_so(bad: Bad) -> None:
    with (
        Grader((RewardSpec("bad_graders:missing"),)) as grader,
        pytest.raises(GraderError, match="missing.*cannot be loaded"),
    ):
        submit(grader, "4", "4").result(60)


def test_missing_math_verify_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'math-verify.*"exact"'):
        parse_rewards(["math"])


@pytest.mark.parametrize("equal", [False, True])
def test_a_math_verify_that_does_not_tell_right_from_wrong_is_refused_with_versions(
    equal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hides errors of the packages below it, and grades everything alike."""
    fake = "def parse(text, **settings):\n    return []\ndef verify(gold, found, **settings):\n    return {}\n"
    (tmp_path / "math_verify.py").write_text(fake.format(equal))
    monkeypatch.syspath_prepend(tmp_path)
    message = rf"√8 are graded \[{float(equal)}, {float(equal)}\]; .* math-verify \S+, .*sympy \d"
    with Grader() as grader, pytest.raises(GraderError, match=message):
        grader.ready()


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("raise", "RuntimeError: xxx"),
        ("\x1b[2J", r"RuntimeError: \\x1b\[2J \("),  # what would clear the terminal is spelled out
        ("text", "TypeError"),
        ("two", "not 2.0"),
    ],
)
def test_too_many_failures_stop_the_run_and_name_the_last(bad: Bad, completion: str, error: str) -> None:
    with Grader(bad, max_failed_share=0.5) as grader:
        half = WINDOW // 2
        futures = [submit(grader, "4", text) for text in ["4"] * half + [completion] * (half + 1)]
        assert sum(future.result(60) for future in futures[:-1]) == half
        with pytest.raises(GraderError, match=f"51 of the last 100.*bad_graders:grade: .*{error}.*max_failed_share"):
            futures[-1].result(60)


def test_failures_are_told_as_they_happen_and_not_between(bad: Bad, caplog: pytest.LogCaptureFixture) -> None:
    with Grader(bad) as grader:
        grader.failures = 998
        for completion in ["4", "nan", "4", "4", "nan", "4"]:
            submit(grader, "4", completion).result(60)
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == ["1,000 gradings"]


NO_REWARDS = """
weight = 0.5
async def later(prompt, completion, answer, data): return 1.0
def parts(prompt, completion, answer, data): yield 1.0
def short(completion, answer): return 1.0
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("weight", "weight is not a function, but of type float"),
        ("later", "later is async or a generator; a reward returns a number"),
        ("parts", "parts is async or a generator"),
        ("short", r"short\(completion, answer\) cannot be called with \(prompt, completion, answer, data\): too many"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_rewards.py").write_text(NO_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    message = f"no_rewards:{name} cannot be loaded: TypeError: {problem}"
    with Grader(parse_rewards([f"no_rewards:{name}"])) as grader, pytest.raises(GraderError, match=message):
        grader.ready()


def test_a_reward_may_take_whatever_it_likes_and_be_written_in_c() -> None:
    for function in (lambda *graded: 1.0, lambda prompt, completion, answer, data, scale=1.0: scale, max):
        _check_function("it", function)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("90°", "90"), ("½", "0.5"), ("3½", "3.5"), ("3 1/2", "7/2"), ("√2", r"\sqrt{2}"), ("2√(x+1)", r"2\sqrt{x+1}"),
        ("x²", "x^2"), ("10⁻³", "0.001"), ("１２", "12"), ("1.5e3", "1500"), ("1e-5", "0.00001"),
        ("[0, ∞)", r"[0, \infty)"), ("x ≤ 3", r"x \le 3"), (r"10\,000", "10000"), ("10 000.5", "10000.5"),
        (r"\{x \mid x > 1\}", "x > 1"), (r"\left\{x \in \mathbb{R} : x \ne \frac{1}{2}\right\}", r"x \ne \frac{1}{2}"),
        (r"\{(x, y) | x + y = 1\}", "x + y = 1"), ("11:00", "11"), ("34.", "34"), (r"72~\text{cm}", "72"),
        (r"\varnothing", r"\emptyset"), ("∅", r"\{\}"), (r"\text{033}", "33"),
        (r"3 \text{ hours } 20 \text{ minutes}", r"\text{3 hrs and 20 min}"),
        ("5 feet 4 inches", r"5\,\text{ft}\,4\,\text{in}"),
        (r"2 \text{ red}, 3 \text{ blue}", "3 blue and 2 red"), (r"2 \text{ cm}, 3 \text{ cm}", "2, 3"),
        (r"1, 2, \ldots, 10", r"\{1, 2, 3, \dots, 10\}"), ("1, 2, ..., 10", r"1,2,\dots,10"),
        (r"n \equiv 3 \pmod 4", r"n \equiv 3 \ (\text{mod } 4)"), (r"1 \text{ and } 2 \text{ m}", "1, 2"),
    ],
)  # fmt: skip
def test_what_people_write_is_what_latex_says(reference: str, answer: str) -> None:
    assert math_equal(reference, rf"\boxed{{{answer}}}") == math_equal(answer, rf"\boxed{{{reference}}}") == 1


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("3 1/2", "3/2"), ("x²", "2x"), ("1e3", "13"), ("√2", "2"), ("1 000/3", "1"), ("½", "12"),
        (r"3 \text{ hours } 20 \text{ minutes}", r"3 \text{ hours } 30 \text{ minutes}"), ("3 hours 20 minutes", "3"),
        (r"3 \text{ hours } 20 \text{ minutes}", r"3 \text{ minutes } 20 \text{ hours}"), ("4 dm 5 cm", "5 dm 4 cm"),
        (r"2 \text{ red}, 3 \text{ blue}", "2"), (r"2 \text{ red}, 3 \text{ blue}", r"3 \text{ red}, 2 \text{ blue}"),
        (r"3 \text{ blue}, 2 \text{ red}", r"3 \text{ black}, 2 \text{ red}"), (r"1, 2, \ldots, 10", "10"),
        (r"1, 2, \ldots, 10", r"1, 3, \ldots, 10"), (r"1, 2, 4, \ldots, 64", r"1, 2, 3, \ldots, 64"),
        (r"1, 2, \ldots, 10", r"1, 10, \ldots, 2"), (r"1 + 2 + \cdots + 10", "10"), (r"\text{033}", "3"),
        (r"n \equiv 3 \pmod 4", r"n \equiv 1 \pmod 4"), (r"3 \pmod 4", r"3 \pmod 5"), (r"72 \pmod{10}", "72"),
        (r"10\,000", "0"), ("10 00", "1000"), ("5 12 000", "512000"), ("11:00", "10:00"),
        (r"\{x \mid x > 1\}", "1"), (r"\{x \mid -1 < x < 3\}", r"\{x \mid -1 < x < 4\}"),
    ],
)  # fmt: skip
def test_and_nothing_else(reference: str, answer: str) -> None:
    assert math_equal(reference, rf"\boxed{{{answer}}}") == math_equal(answer, rf"\boxed{{{reference}}}") == 0


@pytest.mark.parametrize("piece", ["3 hours ", "3 ab, ", r"3 \text{ab ", "1, ", " ", r"\ldots,", r"5\pmod{", "{1"])
def test_long_answers_are_read_in_linear_time(piece: str) -> None:
    text = "{" + piece * (20_000 // len(piece))
    begin = time.process_time()
    with_modulus(as_remainder(in_latex(text)))
    assert time.process_time() - begin < 2  # milliseconds, unless a pattern can match in many ways


def test_several_rewards_make_their_weighted_mean_and_fail_apart(bad: Bad) -> None:
    mixed = parse_rewards(["exact", r"format:0.5", r"regex=answer:\s*(\w+)$:0.25", "bad_graders:grade:0.25"])
    assert [spec.weight for spec in mixed] == [1.0, 0.5, 0.25, 0.25]
    with Grader(mixed, timeout=0.3) as grader:
        assert submit(grader, "4", "4").result(60) == (1 + 0.25) / 2
        assert submit(grader, "4", r"\boxed{5}" + "\nanswer: 4").result(60) == (0.5 + 0.25) / 2
        assert submit(grader, "sleep", "sleep").result(60) == 1 / 2
        assert (grader.timeouts, grader.failures) == (1, 0)
        assert submit(grader, "die", "die").result(60) == 0.0  # nobody knows which of them ended the process
        assert re.match(r"exact or format or regex=\S+ or bad_graders:grade: its process died", grader.last_fault)


@pytest.mark.parametrize("name", ["my_rewards:nan", "my_rewards:inf", "reasoning-gym:infinity", "regex=a:nan b"])
def test_a_name_that_is_also_a_number_is_a_name(name: str) -> None:
    assert parse_rewards([name, f"{name}:2", f"{name}:1e-1"]) == ((name, 1.0), (name, 2.0), (name, 0.1))


@pytest.mark.parametrize(
    "text", ["maths", "regex=(", "math:0", "math:-1", "math:nan", "my_rewards:nan:inf", "regex=a:inf", "nan", ""]
)
def test_a_reward_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^reward: "):
        parse_rewards([text])


def test_a_function_named_with_a_dot_is_told_the_colon() -> None:
    with pytest.raises(ValueError, match=re.escape("'my.rewards.share' is not known; did you mean my.rewards:share?")):
        parse_rewards(["my.rewards.share"])


def test_workers_end_when_the_trainer_is_killed(bad: Bad, tmp_path: Path) -> None:
    script = (
        "from ibtpo.grading import Grader; from ibtpo.rewards import Graded, RewardSpec\n"
        "g = Grader((RewardSpec('bad_graders:grade'),), 1, 0.3)\n"
        "ask = lambda text: g.submit(Graded('', text, '', {})).result()\n"
        "print(round(ask('pid') * 1e9), flush=True); ask('hang in C')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_for_end(pid)


def test_what_a_reward_has_started_ends_when_the_trainer_is_killed(bad: Bad, tmp_path: Path) -> None:
    script = (
        "from ibtpo.grading import Grader; from ibtpo.rewards import Graded, RewardSpec; import sys, time\n"
        "g = Grader((RewardSpec('bad_graders:grade'),))\n"
        "print(g.submit(Graded('', 'child' + sys.argv[1], '', {})).result(), flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, str(tmp_path / "pid")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"1.0\n"
        parent.kill()
    _wait_for_end(int((tmp_path / "pid").read_text()))


def _lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for_end(pid: int) -> None:
    for _ in range(200):
        if not _lives(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlived its parent")
