"""The roofline command: turns, rows, what it does when a contender fails, and bench/gpu.sh."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ibtpo_kernels import cpu, torch_is_slow
from ibtpo_kernels.roofline import (
    catalog,
    cli,
    rows,
    runner,
)
from ibtpo_kernels.roofline import roofs as roofs_module
from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.machine import here
from ibtpo_kernels.roofline.problem import Contender, Inputs, Outputs, Problem, Unavailable, in_pass, ours
from ibtpo_kernels.roofline.roofs import Roof, Roofs
from ibtpo_kernels.roofline.timing import Budget, Timing, interleave

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
SLOW = ("torch.compile", "FlexAttention")  # need a compiler at run time, and many seconds


# Timing


class Recorder:
    """A clock that says what was called, and in which order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def seconds(self, call: Callable[[], object]) -> float:
        self.calls.append(call())
        return float(len(self.calls))


def test_contenders_take_turns_and_rotate_their_buffers() -> None:
    clock = Recorder()
    contenders = [[lambda: "a0", lambda: "a1"], [lambda: "b0", lambda: "b1"], [lambda: "c0", lambda: "c1"]]
    seconds = interleave(clock, contenders, [4, 4, 2])
    assert clock.calls == ["a0", "b0", "a1", "b1", "c0", "a0", "b0", "a1", "b1", "c1"]
    assert seconds == [[1, 3, 6, 8], [2, 4, 7, 9], [5, 10]]


def test_repetitions_follow_the_budget() -> None:
    budget = Budget(1.0, fewest=5, most=200)
    assert [budget.repetitions(x) for x in (1e-6, 0.02, 10.0, 0.0)] == [200, 50, 5, 200]


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == Timing(2.5, 1.0, 4.0, 6)


def test_enough_sets_to_leave_the_cache() -> None:
    assert runner.num_sets(1 << 20, 0) == 2
    for size in (1 << 20, 3 << 20, 100 << 20):
        assert (runner.num_sets(size, 10 << 20) - 1) * size >= 20 << 20
    assert runner.num_sets(1, 50 << 20) == 64


# Running a problem


def doubled(inputs: Inputs) -> Outputs:
    return (2 * inputs.leaves[0],)


def problem_with(*contenders: Contender) -> Problem:
    return Problem(
        op="double",
        shape="16",
        dtype=FP32,
        which="forward",
        work=Work(16, 128),
        draw=lambda device, generator: Inputs((torch.randn(16, device=device, generator=generator),)),
        contenders=(ours(doubled, "forward"), *contenders),
        working_set=128,
    )


def broken() -> Any:
    raise RuntimeError("out of\nluck")


def missing() -> Any:
    raise Unavailable("nowhere to be found")


FAILING = (
    Contender("right", lambda: in_pass(doubled, "forward")),
    Contender("wrong", lambda: in_pass(lambda x: (3 * x.leaves[0],), "forward")),
    Contender("missing", missing),
    Contender("broken", lambda: lambda inputs: broken),
    Contender("half", lambda: in_pass(lambda x: (x.leaves[0],), "forward"), kind="bound", is_checked=False),
)


def test_whoever_fails_is_reported_and_stops_nobody() -> None:
    results = {r.contender.who: r for r in runner.run(problem_with(*FAILING), CPU, Budget(0.001, most=5))}
    assert {who for who, r in results.items() if r.timing} == {"ibtpo", "right", "half"}
    assert all(r.timing.repetitions == 5 for r in results.values() if r.timing)
    assert results["wrong"].reason == "differs from ours by 0.5 of the norm"
    assert results["missing"].reason == "nowhere to be found"
    assert results["broken"].reason == "RuntimeError: out of"


def test_whoever_fails_only_while_timed_is_dropped_with_the_reason() -> None:
    calls = []

    def fails_late(_: Inputs) -> Outputs:
        calls.append(1)
        if len(calls) > 8:
            raise MemoryError("no room")
        return doubled(_)

    late = Contender("late", lambda: in_pass(fails_late, "forward"))
    results = {r.contender.who: r for r in runner.run(problem_with(late), CPU, Budget(0.001, most=5))}
    assert results["ibtpo"].timing and results["late"].timing is None
    assert results["late"].reason == "MemoryError: no room"


def takes_long(seconds: float) -> Contender:
    def prepare(inputs: Inputs) -> Any:
        time.sleep(seconds)
        return lambda: doubled(inputs)

    return Contender("slow", lambda: prepare)


def test_past_the_limit_no_contender_is_begun() -> None:
    """Whoever is ready by then is timed."""
    problem = problem_with(takes_long(0.2), Contender("late", lambda: in_pass(doubled, "forward")))
    results = runner.run(problem, CPU, Budget(0.001, most=5), until=time.monotonic() + 0.2)
    assert [result.contender.who for result in results if result.timing] == ["ibtpo", "slow"]


def limits() -> Roofs:
    return Roofs(
        (
            Roof("copy", FP32, Work(0, 1000), Timing(2.0, 1.0, 2.0, 3)),
            Roof("fp32", FP32, Work(4000, 10), Timing(2.0, 1.0, 2.0, 3)),
            Roof("bf16", BF16, Work(8000, 10), Timing(2.0, 1.0, 2.0, 3)),
        )
    )


@pytest.mark.parametrize("slow", [True, False])
def test_where_torch_is_slow_in_bf16_its_limit_is_that_of_fp32(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product of 2048^3 takes minutes there."""
    timed: list[int] = []

    def at_once(device: torch.device, call: Callable[[], object]) -> Timing:
        timed.append(1)
        return Timing(2.0, 1.0, 2.0, 3)

    monkeypatch.setattr(roofs_module, "torch_is_slow", lambda x: slow)
    monkeypatch.setattr(roofs_module, "_timed", at_once)
    found = roofs_module.measure(CPU, quick=True)
    assert len(timed) == len(found.measured) == (3 if slow else 4)
    assert found.flops_per_second(BF16) == found.flops_per_second(FP32) == 2 * 512**3


def test_a_machine_names_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a virtual machine may give several processors one name."""
    for isa, name in (("v3", ", AVX2)"), ("v4amx", ", AMX)"), ("baseline", " cores)")):
        monkeypatch.setattr(cpu, "native", SimpleNamespace(isa=lambda isa=isa: isa))
        assert here(CPU).machine.endswith(name)
    monkeypatch.setattr(cpu, "native", None)
    assert here(CPU).machine.endswith(" cores)")


def test_the_binding_limit() -> None:
    roofs = limits()
    assert roofs.seconds(Work(4000, 500), FP32) == 1.0 and roofs.binding(Work(4000, 500), FP32) == "compute"
    assert roofs.seconds(Work(4000, 500), BF16) == 0.5
    assert roofs.seconds(Work(400, 500), FP32) == 0.5 and roofs.binding(Work(400, 500), FP32) == "memory"


def results_of(*medians: float | None) -> list[runner.Result]:
    contenders = problem_with(*FAILING).contenders
    return [
        runner.Result(c, None if m is None else Timing(m, m, m, 7), "" if m else "why")
        for c, m in zip(contenders, medians, strict=True)
    ]


def test_rows_and_their_csv(tmp_path: Path) -> None:
    """The schema, the arithmetic, and that measuring again replaces a problem's rows and no others."""
    path, machine, problem = tmp_path / "out" / "roofline.csv", here(CPU), problem_with(*FAILING)
    found = rows.rows_of(problem, results_of(0.5, 1.0, 2.0, None, None, 0.25), machine, limits())
    by_who = {row.who: row for row in found}
    own = by_who["ibtpo"]
    assert (own.median_us, own.repetitions, own.gflops, own.gbytes) == (5e5, 7, 16 / 0.5 / 1e9, 128 / 0.5 / 1e9)
    assert (own.roof, own.roof_share) == ("memory", 0.128 / 0.5)
    assert (own.ratio_to_best_peer, own.times_bound) == (2.0, 2.0)
    assert (by_who["right"].ratio_to_best_peer, by_who["wrong"].ratio_to_best_peer) == (1.0, 0.5)
    assert by_who["missing"].note == "not measured: why" and by_who["missing"].median_us is None
    rows.write(path, found)
    other = replace(own, op="treble")
    rows.write(path, [other])
    rows.write(path, [replace(own, median_us=7.0)])
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        written = list(reader)
    assert reader.fieldnames == rows.COLUMNS
    wanted = (
        "date commit machine device torch triton threads op shape dtype pass who median_us p20_us p80_us repetitions "
        "flops bytes gflops gbytes roof_share ratio_to_best_peer"
    )
    assert set(wanted.split()) <= set(rows.COLUMNS)
    assert [(row["op"], row["median_us"]) for row in written] == [("treble", "500000"), ("double", "7")]
    rows.write(path, [replace(other, machine="another"), replace(own, op="roof"), by_who["missing"]])
    assert rows.measured_on(path, machine) == [other, by_who["missing"]]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.write(path, found)


# The command


def run_cli(*arguments: str | Path) -> int:
    return cli.main([str(x) for x in arguments])


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are not measured, and the console is as wide as in a file."""
    monkeypatch.setattr(cli.roofs, "measure", lambda *_, **__: limits())


def test_a_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limits included, on the smallest problem: a table, a CSV and a plot."""
    assert run_cli("--device", "cpu", "--quick", "--ops", "plan_decode", "append_kv", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "append_kv  T256 H4 D64  fp32 forward" in out and "index_copy_" in out and "GFLOP/s" in out
    found = rows.read(tmp_path / "roofline_cpu.csv")
    assert {row["op"] for row in found} == {"roof", "plan_decode", "append_kv"}
    assert all(float(str(row["median_us"])) > 0 for row in found)
    is_slow = torch_is_slow(torch.empty(0, dtype=BF16))
    assert [row["dtype"] for row in found if row["op"] == "roof"].count("bfloat16") == (0 if is_slow else 1)
    assert (tmp_path / "roofline_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_failures_of_peers_and_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, briefly: None
) -> None:
    """A peer's is a line of the report; ours is the exit status too."""
    fails = replace(
        problem_with(), op="broken", contenders=(Contender("ibtpo", lambda: lambda _: broken, kind="ours"),)
    )
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [problem_with(*FAILING)])
    assert run_cli("--device", "cpu", "--seconds", "0.001", "--out", tmp_path) == 0
    assert "missing: not measured: nowhere to be found" in capsys.readouterr().out
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [fails, problem_with(*FAILING)])
    assert run_cli("--device", "cpu", "--seconds", "0.001", "--out", tmp_path) == 1
    assert "FAILED: ibtpo, broken 16 float32 forward: not measured: RuntimeError: out of" in capsys.readouterr().out
    assert {row["op"] for row in rows.read(tmp_path / "roofline_cpu.csv")} == {"roof", "broken", "double"}


def test_an_interrupted_run_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, briefly: None
) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    stops = replace(problem_with(), shape="stops", contenders=(Contender("ibtpo", interrupted, kind="ours"),))
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [problem_with(), stops])
    assert run_cli("--device", "cpu", "--seconds", "0.001", "--out", tmp_path) == 130
    out = capsys.readouterr().out
    assert "not reached: double stops float32 forward" in out and "double  16  fp32 forward" in out
    assert [row["shape"] for row in rows.read(tmp_path / "roofline_cpu.csv") if row["op"] == "double"] == ["16"]
    assert (tmp_path / "roofline_cpu.png").exists()


def test_interrupted_while_a_contender_compiles_whoever_was_ready_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, briefly: None
) -> None:
    def interrupted(_: Inputs) -> Any:
        raise KeyboardInterrupt

    compiles = problem_with(FAILING[0], Contender("compiles", lambda: interrupted), FAILING[-1])
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [compiles, problem_with()])
    assert run_cli("--device", "cpu", "--seconds", "0.001", "--out", tmp_path) == 130
    out = capsys.readouterr().out
    assert all(f"not reached: double 16 float32 forward{who}" in out for who in (": compiles", ": half", "\n"))
    found = [row["who"] for row in rows.read(tmp_path / "roofline_cpu.csv") if row["op"] == "double"]
    assert found == ["ibtpo", "right"]


@pytest.mark.parametrize("timing", [False, True], ids=["ready", "timed"])
def test_a_lost_device_ends_the_run_and_the_report_says_who_lost_it(
    timing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, briefly: None
) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(runner, "interleave" if timing else "_free", lost)
    astray = problem_with(FAILING[0], Contender("astray", lambda: lambda _: lost), FAILING[-1])
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [astray, replace(astray, op="next")])
    assert run_cli("--device", "cpu", "--seconds", "0.001", "--out", tmp_path) != 0
    out = capsys.readouterr().out
    assert "astray: not measured: RuntimeError: CUDA error: an illegal memory access" in out
    assert "right: not measured: the device was lost" in out and "not reached: next 16" in out


def test_a_run_out_of_time_names_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, briefly: None
) -> None:
    monkeypatch.setattr(cli, "problems", lambda *_, **__: [problem_with()])
    assert run_cli("--device", "cpu", "--limit", "1e-9", "--out", tmp_path) == 0
    assert "not reached: double 16 float32 forward" in capsys.readouterr().out


def test_list_names_problems_and_contenders_and_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("--list", "--device", "cuda", "--only", "N16384 H16:8 D128 bfloat16 forward", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(catalog.GPU_TREES)
    assert all("SDPA unpacked; FlexAttention (mask kept)" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--list", "--only", "nothing like it") == 1
    assert "No problem is left" in capsys.readouterr().out
    for seconds in ("-1.0", "nan", "inf"):
        assert run_cli("--list", "--device", "cpu", "--seconds", seconds) == 1
        assert f"--seconds {seconds} must be greater than 0, and finite" in capsys.readouterr().out
    assert run_cli("--list", "--device", "gpu") == 1
    assert "--device gpu is neither cpu, nor cuda, nor cuda:N." in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert run_cli("--device", "cuda") == 1
        assert "There is no CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_cli("--ops", "nonesuch")
    assert "tree_decode" in capsys.readouterr().err


# bench/engine_peers.py


def test_rows_of_the_engine_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before a crash, which gives no notice on a GPU, is there."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    engine_peers = import_module("engine_peers")
    written = []

    def crashes(_: Any) -> Any:
        for x in (1, 2):
            yield import_module("rows").Row("case", x, "engine", 10, Timing(2.0, 1.0, 3.0, 5))
            with (tmp_path / "engine_peers.csv").open(newline="") as file:
                written.append([(row["x"], row["tokens_per_s"]) for row in csv.DictReader(file)])

    monkeypatch.setitem(engine_peers.CASES, "decode", crashes)
    monkeypatch.setattr(sys, "argv", ["engine_peers.py", "decode", "--out", str(tmp_path)])
    engine_peers.main()
    assert written == [[("1", "5")], [("1", "5"), ("2", "5")]]


# bench/gpu.sh


def gpu_script(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=variables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_gpu_script_says_that_there_is_no_device(tmp_path: Path) -> None:
    done = gpu_script(tmp_path / "out", "bench")
    assert done.returncode == 3
    assert "no CUDA device" in done.stdout and "no CUDA device" in (tmp_path / "out" / "log.txt").read_text()


def test_the_gpu_script_explains_itself(tmp_path: Path) -> None:
    for arguments in ((), (tmp_path, "nonesuch"), ("--help",)):
        done = gpu_script(*arguments)
        assert done.returncode == 2 and "bench/gpu.sh OUT_DIR [STAGE...]" in done.stderr


def test_a_stage_of_the_gpu_script_where_there_is_no_gpu(tmp_path: Path) -> None:
    """The benchmark stage alone, quick and on the CPU: its files, and its exit status."""
    done = gpu_script(tmp_path, "bench", DEVICE="cpu", BENCH_ARGS="--ops append_kv --seconds 0.01")
    assert done.returncode == 0, done.stdout
    assert {x.name for x in tmp_path.iterdir()} == {
        "environment.txt",
        "log.txt",
        "roofline_cpu.csv",
        "roofline_cpu.png",
    }
    assert "torch" in (tmp_path / "environment.txt").read_text()
    assert gpu_script(tmp_path, "bench", DEVICE="cpu", BENCH_ARGS="--ops nonesuch").returncode == 1
