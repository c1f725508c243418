"""Evaluation: the statistics against brute force, completions one by one, and a folder that survives kill -9."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from engine_helpers import work
from rich.console import Console

from ibtpo.cli import main
from ibtpo.config import EvalConfig, JsonlConfig, SamplingConfig, TrainConfig
from ibtpo.config_io import dump_yaml
from ibtpo.disk import RunFolderError
from ibtpo.evaluation import Completion, Evaluation, sample_completions
from ibtpo.evaluation.folder import EvaluationFolder
from ibtpo.evaluation.sampling import _Collector
from ibtpo.evaluation.statistics import MOST_SAMPLES, ks_up_to, majority_at
from ibtpo.metrics import pass_rates
from ibtpo.policy import built_in_policy
from ibtpo.stopping import StopRequest
from ibtpo.tasks import Problem
from ibtpo_engine import Tree

FLAGS = ["--digits.min-ops", "1", "--digits.max-ops", "2", "--sampling.max-tokens", "14"]


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built-in")
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    return folder


# ---- statistics ------------------------------------------------------------------------------------------------


def brute_majority(answers: Sequence[str | None], rewards: Sequence[float], k: int) -> float:
    """The definition: every ordered choice of k samples votes; a tie goes to the answer seen first."""
    total, number = 0.0, 0
    for chosen in permutations(range(len(answers)), k):
        votes = Counter(answers[i] for i in chosen if answers[i] is not None)  # in the order first seen
        if votes:
            winner = max(votes, key=lambda answer: votes[answer])  # the first of the largest
            total += next(rewards[i] for i in chosen if answers[i] == winner)
        number += 1
    return total / number


def test_majority_is_the_mean_over_all_ordered_choices() -> None:
    draw = random.Random(0)
    cases = [(["a", "a", "b", "b", "c", None], [1, 0.5, 0, 0.25, 1, 1])]
    for size in (1, 2, 3, 4, 5, 6):
        for _ in range(12):
            answers = [draw.choice(["a", "b", "c", None]) for _ in range(size)]
            cases.append((answers, [draw.choice([0.0, 0.3, 1.0]) for _ in answers]))
    for answers, rewards in cases:
        ks = range(1, len(answers) + 1)
        expected = [brute_majority(answers, rewards, k) for k in ks]
        assert majority_at(answers, rewards, ks) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "rewards", "k", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 3, 1.0),  # the majority is right
        (["7", "8", "8"], [1, 0, 0], 3, 0.0),  # and here it is wrong
        (["7", "8"], [1, 0], 2, 0.5),  # a tie: either may come first
        (["7", None, None], [1, 0, 0], 3, 1.0),  # the unreadable do not vote
        ([None, None], [1, 1], 2, 0.0),  # nobody votes
        (["7", "8", "8"], [1, 0, 0], 1, 1 / 3),  # one sample: its mean reward
        (["7", "7", "8"], [1, 1, 0], 2, 2 / 3),  # {7,7} right, {7,8} twice a tie
    ],
)
def test_majority_by_hand(answers: list[str | None], rewards: list[float], k: int, expected: float) -> None:
    assert majority_at(answers, rewards, [k]) == [pytest.approx(expected)]


def test_majority_of_many_samples_is_exact_and_quick() -> None:
    begin = time.perf_counter()
    half = majority_at(["7"] * 128 + ["8"] * 128, [1.0] * 128 + [0.0] * 128, [1, 2, 255, 256])
    assert half == pytest.approx([0.5] * 4)
    assert majority_at([str(i) for i in range(256)], [1.0] + [0.0] * 255, [1, 256]) == pytest.approx([1 / 256] * 2)
    assert time.perf_counter() - begin < 10
    begin = time.perf_counter()  # an answer that most samples give is the usual case
    usual = majority_at(["7"] * 780 + ["8"] * 220, [1.0] * 780 + [0.0] * 220, [1, 2, MOST_SAMPLES])
    assert usual == pytest.approx([0.78, 0.78, 1.0])
    assert time.perf_counter() - begin < 5
    with pytest.raises(ValueError, match=r"eval\.samples: 1001 lies outside"):
        EvalConfig(samples=MOST_SAMPLES + 1)
    with pytest.raises(ValueError, match="need 1 <= k <= n <= 1000"):
        majority_at(["7"], [1.0], [2])


def test_accuracies_of_a_small_evaluation_by_hand() -> None:
    rows = [  # prompt, sample, reward, answer
        (0, 0, 1.0, "4"), (0, 1, 1.0, "4"), (0, 2, 0.0, "5"), (0, None, 1.0, "4"),
        (1, 0, 0.0, "9"), (1, 1, 0.0, "9"), (1, 2, 1.0, "8"), (1, None, 0.0, None),
    ]  # fmt: skip
    completions = [Completion(p, s, "", r, a, "stop" if a else "length", 5 if s else 8) for p, s, r, a in rows]
    random.Random(1).shuffle(completions)
    evaluation = Evaluation(2, 3)
    for completion in completions:
        evaluation.add(completion)
    means = {name: found.value for name, found in evaluation.accuracies.items()}
    assert means == pytest.approx(
        {
            "avg@3": 0.5,
            "pass@1": 0.5,
            "pass@2": (1 + 2 / 3) / 2,
            "pass@3": 1.0,
            "maj@1": 0.5,
            "maj@2": (2 / 3 + 1 / 3) / 2,
            "maj@3": 0.5,
            "greedy": 0.5,
        }
    )
    metrics = evaluation.metrics()
    assert (metrics["eval_maj"], metrics["eval_maj_low"], metrics["eval_maj_high"]) == (0.5, 0.0, 1.0)
    assert (metrics["eval_truncated_share"], metrics["eval_response_length"]) == (0.0, 6.0)


def test_ks_are_powers_of_two_and_all() -> None:
    assert [ks_up_to(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
    assert pass_rates([[1, 0, 0, 0], [0, 0, 0, 0]], 2) == [0.5, 0.0]


# ---- the command -----------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "speed"}


def test_a_folder_holds_every_completion_and_the_summary(
    built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("--model", built_in, *FLAGS, "--out", out, "--samples", 4, "--limit", 6)
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "6 prompts, 4 samples each" in printed
    assert all(word in printed for word in ("avg@4", "greedy", "pass@k", "maj@k", "truncated", "tokens/s"))
    rows = read(out)
    assert sorted((row["prompt"], -1 if row["sample"] is None else row["sample"]) for row in rows) == [
        (prompt, sample) for prompt in range(6) for sample in range(-1, 4)
    ]
    truncated = [row for row in rows if row["finish"] != "stop"]
    assert truncated and all(row["reward"] == 0 and row["answer"] is None for row in truncated)
    first = numbers(out)
    assert first["accuracies"]["avg@4"]["mean"] == first["eval_avg"]
    assert run(*command) == 0  # nothing is left to do
    assert "30 completions are there already" in capsys.readouterr().out
    assert read(out) == rows
    assert numbers(out) == first


def test_an_evaluation_holds_no_texts_and_computes_majorities_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that come nor those of an earlier process."""
    seen: list[Sequence[str | None]] = []

    def counted(answers: Sequence[str | None], *more: Any) -> list[float]:
        seen.append(answers)
        return majority_at(answers, *more)

    monkeypatch.setattr("ibtpo.evaluation.statistics.majority_at", counted)
    prompts, samples = 100, 7
    tracemalloc.start()
    try:
        for begun in (0, prompts // 2):
            evaluation = Evaluation(prompts, samples)
            with EvaluationFolder(tmp_path / "out", {}, evaluation) as folder:
                assert len(evaluation) == begun * (1 + samples)
                for prompt, sample in product(range(begun, begun + prompts // 2), (None, *range(samples))):
                    completion = Completion(prompt, sample, f"{prompt} {sample} ".ljust(4000), 1.0, "7", "stop", 9)
                    folder.add(completion)
                    evaluation.add(completion)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 400 * prompts * (1 + samples)
    assert evaluation.accuracies["maj@4"].value == evaluation.summary()["eval_maj"] == 1.0
    assert seen == [["7"] * samples] * prompts


def test_a_part_of_the_completions_is_sampled_again_as_it_was(built_in: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--model", built_in, *FLAGS, "--out", out, "--samples", 5, "--limit", 4)
    assert run(*command) == 0
    before, whole = numbers(out), sorted(map(json.dumps, read(out)))
    kept = (out / "completions.jsonl").read_bytes().splitlines(keepends=True)[::3]
    (out / "completions.jsonl").write_bytes(b"".join(kept) + b'{"prompt": 3, "sam')
    assert run(*command) == 0
    assert (sorted(map(json.dumps, read(out))), numbers(out)) == (whole, before)


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    """Closing the file fails once more, with what could not be written before."""
    told = r"no space left .*kept: all completions before; free some space, then give the same command again"
    with pytest.raises(RunFolderError, match=told), EvaluationFolder(tmp_path / "out", {}, Evaluation(1, 1)) as folder:
        folder._file.close()
        folder._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")
        folder.add(Completion(0, None, "text", 1.0, None, "stop", 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sampling.temperature", 0.5), "sampling.temperature was 1.0, is 0.5"),
        (("--samples", 3), "samples was 2, is 3"),
        (("--limit", 2), "prompts was 3, is 2"),
        (("--seed", 1), "seed was 0, is 1"),
        (("--digits.grade", "last"), "digits.grade was 'strict', is 'last'"),
        (("--digits.min-ops", 2), "prompts and answers was"),
    ],
)
def test_other_settings_are_refused(
    built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[object, ...], message: str
) -> None:
    command = ("--model", built_in, *FLAGS, "--out", tmp_path / "out", "--samples", 2, "--limit", 3)
    assert run(*command) == 0
    before = (tmp_path / "out" / "completions.jsonl").read_bytes()
    assert run(*command, *change) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another folder with --out" in error
    assert (tmp_path / "out" / "completions.jsonl").read_bytes() == before


def test_another_model_is_refused_and_a_moved_one_is_not(
    built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, moved = tmp_path / "other", tmp_path / "moved"
    built_in_policy(1, dtype=torch.float32, device=torch.device("cpu")).save(other)
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(moved)
    rest = (*FLAGS, "--out", tmp_path / "out", "--samples", 1, "--limit", 1)
    assert [run("--model", model, *rest) for model in (built_in, other, moved)] == [0, 2, 0]
    assert "weights was" in capsys.readouterr().err


def test_folders_that_are_something_else_are_refused(
    built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for name, message in (("run", "is a run folder; choose another, such as"), ("other", "already holds other files")):
        assert run("--model", built_in, *FLAGS, "--out", tmp_path / name) == 2
        assert message in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    for name in (".settings.json.tmp", ".ibtpo.json.tmp", "ibtpo.json", "completions.jsonl"):
        (out / name).touch()  # of an evaluation that was killed before it had written its settings
    (out / "ibtpo.json").unlink()
    command = ("--model", built_in, *FLAGS, "--out", out, "--samples", 1, "--limit", 1)
    assert run(*command) == 0
    (out / "completions.jsonl").write_text('{"prompt": 0}\n')
    assert run(*command) == 2
    assert "completions.jsonl, line 1: not a completion" in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_alone_gets_the_result(built_in: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ibtpo",
        "eval",
        "--model",
        str(built_in),
        *FLAGS,
        "--samples",
        "1",
        "--limit",
        "2",
    ]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "größe")], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rb"greedy .* \d\.\d{3} \? \d\.\d{3}", done.stdout)
    assert len(read(tmp_path / "größe")) == 4


def test_a_killed_evaluation_goes_on_and_gives_the_same_numbers(built_in: Path, tmp_path: Path) -> None:
    rest = [*FLAGS, "--samples", "6", "--limit", "60", "--engine.max-branches", "6", "--digits.grade", "last"]
    assert run("--model", built_in, *rest, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "ibtpo", "eval", "--model", str(built_in), *rest, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "completions.jsonl").exists() or len(read_raw(out)) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = len(read_raw(out))
    assert 20 <= found < 420
    assert not (out / "summary.json").exists()
    assert run("--model", built_in, *rest, "--out", out) == 0
    assert sorted(map(json.dumps, read(out))) == sorted(map(json.dumps, read(tmp_path / "whole")))
    assert numbers(out) == numbers(tmp_path / "whole")
    assert len(read(out)) == 420 and 0 < numbers(out)["eval_avg"] < 1


@pytest.mark.parametrize(("signals", "code"), [
    ([signal.SIGINT], 130), ([signal.SIGTERM], 0), ([signal.SIGHUP], 0), ([signal.SIGTERM, signal.SIGINT], 130),
], ids=["Ctrl-C", "SIGTERM", "SIGHUP", "at once"])  # fmt: skip
def test_a_signal_keeps_what_was_graded_and_says_how_to_go_on(
    signals: list[int],
    code: int,
    built_in: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("--model", built_in, *FLAGS, "--samples", 3, "--limit", 3)
    out = tmp_path / "out"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def signalled(*arguments: Any, **more: Any) -> None:
        keep = arguments[4]

        def keep_some(completion: Completion) -> None:
            keep(completion)
            if completion.prompt == 1:
                for number in signals:
                    os.kill(os.getpid(), number)

        sample_completions(*arguments[:4], keep_some, *arguments[5:], **more)

    with monkeypatch.context() as patch:
        patch.setattr("ibtpo.evaluation.run.sample_completions", signalled)
        assert run(*command, "--out", out, "--json", tmp_path / "values.json") == code
        kept = len(read_raw(out))
        assert 0 < kept < 12
        message = f"stopped; {kept} completions are kept in {out}, the same command continues"
        assert message in capsys.readouterr().err
        assert not (out / "summary.json").exists() and not (tmp_path / "values.json").exists()
        assert run(*command) == code
        assert "stopped; nothing is kept without --out" in capsys.readouterr().err
    assert {number: signal.getsignal(number) for number in before} == before
    assert run(*command, "--out", out) == 0
    assert run(*command, "--out", tmp_path / "whole") == 0
    assert sorted(map(json.dumps, read(out))) == sorted(map(json.dumps, read(tmp_path / "whole")))


def test_a_closed_pipe_stops_an_evaluation_as_sigterm_does(built_in: Path, tmp_path: Path) -> None:
    """`ibtpo eval --out DIR | head -n 1`, where every completion prints."""
    out = tmp_path / "out"
    script = (
        "import sys, ibtpo.progress as p; p.SECONDS_BETWEEN_LINES = 0.0; from ibtpo.cli import main; sys.exit(main())"
    )
    flags = [*FLAGS, "--samples", "20", "--limit", "200", "--engine.max-branches", "20", "--out", str(out)]
    command = [sys.executable, "-c", script, "eval", "--model", str(built_in), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    while (line := process.stdout.readline()) and "Evaluating:" not in line:
        pass
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait(60) == 0, message
    kept = len(read_raw(out))
    assert 0 < kept < 4200
    assert f"stopped; {kept:,} completions are kept in {out}" in message and "Traceback" not in message


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As nohup leaves it; the others are noted, the first Ctrl-C too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.on_signals(Console(quiet=True)):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested() and stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def read_raw(folder: Path) -> list[bytes]:
    return (folder / "completions.jsonl").read_bytes().splitlines()


# ---- whole files -----------------------------------------------------------------------------------------------


def test_whole_evaluates_every_row_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(tmp_path / "model", context=64, teach=10)
    data = save_additions(tmp_path / "rows.jsonl", 20)
    rest = ("--model", model, "--data", data, "--jsonl.grade", "exact", "--samples", 2, "--sampling.max-tokens", 4)
    assert run(*rest, "--whole", "--out", tmp_path / "out") == 0
    asked = {row["where"] for row in read(tmp_path / "out")}
    assert asked == {f"{data}, line {i + 1}" for i in range(20)}
    assert run(*rest) == 0
    assert "2 prompts, 2 samples each" in capsys.readouterr().out
    assert run("--model", model, "--whole") == 2
    assert "whole: --whole needs a data file" in capsys.readouterr().err


def test_answers_are_read_in_grading_processes(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", context=64, teach=40)
    data = save_additions(tmp_path / "rows.jsonl", 6)
    flags = ("--model", model, "--data", data, "--reward", r"regex=(\d)", "--samples", 3, "--sampling.max-tokens", 4)
    assert run(*flags, "--whole", "--out", tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    voted = [row for row in rows if row["answer"] is not None]
    assert voted and all(row["answer"].isdigit() and row["answer"] in row["text"] for row in voted)
    assert all(row["finish"] == "stop" for row in voted)


def trained(tmp_path: Path, **settings: Any) -> Path:
    """A checkpoint in the folder of a run with these settings."""
    config = TrainConfig(task="jsonl", sampling=SamplingConfig(max_tokens=4), **settings)
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001", context=512)
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(config))
    return checkpoint


def test_whole_takes_the_rows_that_the_filters_of_the_run_left_out(tmp_path: Path) -> None:
    data, test = save_additions(tmp_path / "rows.jsonl", 20), save_additions(tmp_path / "test.jsonl", 9)
    filters = JsonlConfig(grade="exact", pass_rate_field="rate", max_pass_rate=0.8, max_prompt_tokens=1)
    model = trained(tmp_path, data=data, jsonl=filters)
    for flags, number in (((), 9), (("--jsonl.max-prompt-tokens", 1), None), (("--limit", 4), 4)):
        out = tmp_path / f"out-{number}"
        code = run("--model", model, "--data", test, "--whole", "--samples", 1, "--out", out, *flags)
        assert code == (2 if number is None else 0)  # a filter that is given is heeded: no prompt is so short
        assert number is None or {row["prompt"] for row in read(out)} == set(range(number))


def test_another_file_is_not_passed_over_for_the_held_out_file_of_the_run(tmp_path: Path) -> None:
    data, held_out, test = (
        save_additions(tmp_path / f"{name}.jsonl", n) for name, n in (("a", 9), ("b", 5), ("c", 30))
    )
    model = trained(tmp_path, data=data, jsonl=JsonlConfig(grade="exact", eval_data=held_out, eval_fraction=0.1))
    for flags, number in (((), 5), (("--data", data), 5), (("--data", test), 3)):
        out = tmp_path / f"out-{len(flags)}-{number}"
        assert run("--model", model, "--samples", 1, "--out", out, *flags) == 0
        assert {row["prompt"] for row in read(out)} == set(range(number))


def test_a_file_of_settings_may_name_model_data_and_out(tmp_path: Path) -> None:
    data, held_out, test = (
        save_additions(tmp_path / f"{name}.jsonl", n) for name, n in (("a", 9), ("b", 5), ("c", 30))
    )
    model = trained(tmp_path, data=data, jsonl=JsonlConfig(grade="exact", eval_data=held_out, eval_fraction=0.1))
    for content, number in ((f"model: {model}\n", 5), (f"model: {model}\ndata: {test}\n", 3)):
        out = tmp_path / f"out-{number}"
        (tmp_path / "eval.yaml").write_text(f"{content}out: {out}\n")
        assert run("--config", tmp_path / "eval.yaml", "--samples", 1) == 0
        assert {row["prompt"] for row in read(out)} == set(range(number))
        assert json.loads((out / "settings.json").read_text())["sampling.max_tokens"] == 4  # as the run was trained
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("out: null", f"out: {tmp_path / 'run'}"))
    before = sorted((tmp_path / "run").iterdir())
    for flags in (("--model", model), ("--model", model, "--config", settings)):  # the run's folder is not for this
        assert run(*flags, "--samples", 1) == 0
    assert sorted((tmp_path / "run").iterdir()) == before


def test_a_task_that_is_named_is_measured_in_place_of_the_runs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(tmp_path, data=save_additions(tmp_path / "rows.jsonl", 9), jsonl=JsonlConfig(grade="exact"))
    (tmp_path / "eval.yaml").write_text("task: digit-chain\n")
    given = (("--task", "digit-chain"), ("--config", tmp_path / "eval.yaml"))
    for flags in given:
        assert run("--model", model, *flags, *FLAGS, "--samples", 1, "--limit", 2, "--json", tmp_path / "n.json") == 0
        found = json.loads((tmp_path / "n.json").read_text())
        assert (found["task"], found["data"], found["eval_prompts"]) == ("digit-chain", None, 2)
    capsys.readouterr()
    assert run("--model", model, *given[0], "--whole") == 2
    assert "whole: --whole needs a data file" in capsys.readouterr().err


def test_gradings_that_failed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_reward.py").write_text(
        "def grade(prompt, completion, answer, data):\n    return 1.0 if '1' in answer else float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = save_checkpoint(tmp_path / "model", context=64, teach=40)
    data = save_additions(tmp_path / "rows.jsonl", 12)
    flags = ("--model", model, "--data", data, "--reward", "half_reward:grade", "--samples", 2, "--whole")
    assert run(*flags, "--sampling.max-tokens", 4, "--out", tmp_path / "out") == 0
    rows, summary = read(tmp_path / "out"), numbers(tmp_path / "out")
    failed = sum(row["finish"] == "stop" and row["reward"] == 0 for row in rows)
    assert 0 < failed == summary["reward_failures"] and summary["reward_timeouts"] == 0
    assert f"gradings that failed and count as 0: {failed}" in " ".join(capsys.readouterr().out.split())


def test_another_file_than_the_runs_is_read_in_its_own_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = tmp_path / "gsm.jsonl", tmp_path / "math.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(3)))
    test.write_text(json.dumps({"problem": "1+1", "solution": r"\boxed{2}"}) + "\n")
    model = trained(tmp_path, data=data, layout="gsm8k", jsonl=JsonlConfig(grade="exact"))
    command = ("--model", model, "--whole", "--samples", 1)
    assert run(*command, "--data", test) == 0
    assert "layout math, read from its fields" in capsys.readouterr().out.replace("\n", " ")
    assert run(*command) == run(*command, "--data", data) == 0
    assert "layout" not in capsys.readouterr().out
    assert run(*command, "--data", test, "--layout", "gsm8k") == 2
    assert 'field "question" is missing' in capsys.readouterr().err


def test_a_completion_costs_the_same_however_many_wait_for_their_reward() -> None:
    """Also one whose grading ends last of all; each is handed on once."""
    task: Any = type("Task", (), {"extract": lambda self, problem, text: None})()

    def each(count: int) -> float:
        tree, kept, rewards = Tree([3], key=-1), [], [Future[float]() for _ in range(count)]
        collector = _Collector(task, [Problem("1+1", "2")], range(count), kept.append)
        leaves = tree.root.fork(count)
        spent = work(lambda: [collector(tree, leaf, "2", reward) for leaf, reward in zip(leaves, rewards, strict=True)])
        for reward in reversed(rewards):
            reward.set_result(1.0)
            spent += work(collector.hand_on)
        assert [completion.sample for completion in kept] == [*reversed(range(count))]
        return spent / count

    assert each(128) < 1.2 * each(16)


def test_an_evaluation_holds_only_the_problems_that_are_being_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Problem]] = []
    most = 0

    def made(*fields: Any) -> Problem:
        nonlocal most
        problem = Problem(*fields)
        alive[:] = [other for other in alive if other() is not None] + [weakref.ref(problem)]
        most = max(most, len(alive))
        return problem

    monkeypatch.setattr("ibtpo.tasks.data.Problem", made)
    data = save_additions(tmp_path / "rows.jsonl", 30)
    model = trained(tmp_path, data=data, jsonl=JsonlConfig(grade="exact"))
    out = tmp_path / "out"
    assert run("--model", model, "--whole", "--samples", 2, "--engine.max-branches", 4, "--out", out) == 0
    assert {row["prompt"] for row in read(out)} == set(range(30)) and {row["where"] for row in read(out)} == {
        f"{data}, line {line}" for line in range(1, 31)
    }
    assert most < 10
