"""doctor, config and completion: what they print, and what doctor says of what is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ibtpo_kernels
from ibtpo import config_reference, diagnosis
from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.config_io import dump_yaml, merge
from ibtpo.diagnosis import EXTRAS, Finding, examine
from ibtpo_kernels import cpu, dispatch, has_compiled
from ibtpo_kernels.self_check import self_check, triton_lacks

compiled = pytest.mark.skipif(not has_compiled(), reason="needs the compiled module")


def find(name: str, *, kernels: bool = False) -> Finding:
    [finding] = [finding for finding in examine(kernels=kernels) if finding.name == name]
    return finding


# ---- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_broken_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-kernels"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["group"] for row in found} == {"packages", "hardware", "backends", "space"}
    [version] = [row["text"] for row in found if row["name"] == "torch"]
    assert torch.__version__.startswith(version)  # wheels of torch may call themselves 2.14.1, and torch 2.14.1+cu130
    assert main(["doctor", "--no-kernels"]) == 0
    assert "nothing is broken" in capsys.readouterr().out


@compiled
def test_self_check_covers_every_op_that_a_backend_implements() -> None:
    """And each is within its tolerance, far from the error a wrong op would have."""
    checks = list(self_check("cpu", "cpu"))
    assert [check for check in checks if not check.is_ok] == []
    ops = {name for name in vars(ibtpo_kernels.ops) if name in ibtpo_kernels.__all__ and name != "DecodePlan"}
    ops |= {"tree_attention_by_depth", "sampled_logprob", "linear_sampled_logprob"}
    assert {check.op for check in checks} == ops
    assert {(check.op, check.dtype) for check in checks} >= {
        ("tree_attention", "bfloat16"),
        ("tree_decode", "bfloat16"),
    }


@compiled
def test_a_wrong_kernel_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original, product = cpu.silu_mul, cpu.batch_invariant_linear
    monkeypatch.setattr(cpu, "direct", None)
    monkeypatch.setattr(cpu, "batch_invariant_linear", lambda x, *rest: product(x, *rest) * (1 + 1e-7 * (len(x) == 7)))
    monkeypatch.setattr(cpu, "silu_mul", lambda gate, up: original(gate, up) * 1.001)
    monkeypatch.setattr(cpu, "rope", lambda *arguments: 1 / 0)
    assert main(["doctor", "--json"]) == 1
    found = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "broken"]
    assert {row["name"] for row in found} == {"silu_mul", "rope", "batch_invariant_linear"}
    assert any("bits of float32" in row["text"] and "the bits differ" in row["text"] for row in found)
    assert any(row["name"] == "rope" and "failed: division by zero" in row["text"] for row in found)
    assert any(
        row["name"] == "silu_mul" and "float32, cpu: error 1.0e-03 (at most 1e-05)" in row["text"] for row in found
    )


@pytest.fixture
def without_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "direct", None)


@pytest.mark.usefixtures("without_compiled")
def test_without_the_compiled_module_it_says_so_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    assert main(["doctor", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["compiled kernels"]["status"] == "slow"
    assert "C++17 compiler" in found["compiled kernels"]["text"]
    assert found["cpu"]["status"] == "note"
    assert found["on cpu"] == {
        "group": "backends",
        "name": "on cpu",
        "status": "slow",
        "text": "reference runs the ops",
    }
    assert "nothing to compare" in found["all"]["text"]


@pytest.mark.usefixtures("without_compiled")
def test_a_compiled_module_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def load(name: str, *rest: Any) -> Any:
        if name == "ibtpo_kernels._cpu":
            raise ImportError("undefined symbol: _Znwm")
        return original(name, *rest)

    monkeypatch.setattr(diagnosis, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", load)
    finding = find("compiled kernels")
    assert finding.status == "broken"
    assert "undefined symbol: _Znwm" in finding.text


def test_every_extra_for_users_is_looked_at() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev", "bench"}


def test_packages_missing_old_or_damaged_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    version, load = importlib.metadata.version, importlib.import_module

    def versions(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else version(name)

    def fail(name: str, *rest: Any) -> Any:
        if name == "safetensors":
            raise OSError("libc.so.7: cannot open")
        return load(name, *rest)

    monkeypatch.setattr(importlib.metadata, "version", versions)
    monkeypatch.setattr(importlib, "import_module", fail)
    broken = {finding.name: finding.text for finding in examine(kernels=False) if finding.status == "broken"}
    assert set(broken) == {"rich", "transformers", "safetensors"}
    assert broken["rich"] == "not installed; pip install 'rich>=13.8'"
    assert broken["transformers"].startswith("4.57.0, but >=5 is needed")
    assert "cannot be imported (libc.so.7: cannot open)" in broken["safetensors"]


def test_it_runs_where_other_commands_cannot(tmp_path: Path) -> None:
    """It says what is wrong with transformers, which they import."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('half an upgrade')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "ibtpo", "doctor", "--json", "--no-kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["transformers"]["status"] == "broken"
    assert "half an upgrade" in found["transformers"]["text"]
    assert found["torch"]["status"] == found["reference"]["status"] == "ok"


def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = find("gpu")
    assert finding.status == "slow"
    assert "install the CUDA build of torch" in finding.text

    def init() -> None:
        raise RuntimeError("driver too old (found version 11040)")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "cannot use it: driver too old (found version 11040)" in find("gpu").text


def test_what_triton_lacks_on_this_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compiles what launches a kernel, at run time."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in str(triton_lacks())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    assert "install python3-dev" in str(triton_lacks())
    (tmp_path / "Python.h").touch()
    assert triton_lacks() is None


def test_a_backend_that_crashes_is_broken_and_the_report_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise OSError("libtriton.so: wrong ELF class")

    monkeypatch.setattr(dispatch, "triton_kernels", crash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {finding.name: finding for finding in examine(kernels=False)}
    assert found["triton"].status == "broken"
    assert "wrong ELF class" in found["triton"].text
    assert found["memory"].group == "space"


def test_a_full_disk_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**7))
    finding = find("disk, here")
    assert finding.status == "slow"
    assert "0.0 of 10.0 GB free; free some" in finding.text


# ---- config ------------------------------------------------------------------------------------------------------


def names(config: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        found += names(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return found


def test_the_documentation_is_the_configuration() -> None:
    """docs/configuration.md is what `python -m ibtpo.config_reference` prints; no field lacks its sentence."""
    document = Path(__file__).parents[1] / "docs" / "configuration.md"
    assert document.read_text("utf-8").rstrip() == config_reference.documentation()
    found = [field for section in config_reference.sections() for field in section.fields]
    assert sorted(field.name for field in found) == sorted(names(TrainConfig()))
    assert all(field.meaning for field in found)
    allowed = {field.name: field.allowed for field in found}
    assert allowed["search.rounds"] == "integer in [1, inf)"
    assert allowed["search.step_tokens"] == "integer in [1, inf), or null"
    assert allowed["sampling.top_p"] == "number in (0.0, 1.0]"
    assert allowed["search.method"].startswith("ibtree, independent")
    assert allowed["lora.targets"] == "all, attention, mlp"


def test_config_prints_yaml_that_gives_the_same_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("search: {rounds: 3}\njsonl: {system_prompt: 'Sei höflich: «ja»'}\n", "utf-8")
    flags = [
        "--preset",
        "grpo",
        "--config",
        str(file),
        "--optim.lr",
        "3e-5",
        "--data",
        "rows.jsonl",
        "--reward",
        "math",
    ]
    assert main(["config", *flags]) == 0
    printed = capsys.readouterr().out
    changes = yaml.safe_load(printed)
    assert changes["advantage"]["kind"] == "grpo"
    assert (changes["task"], changes["data"], changes["reward"]) == ("jsonl", "rows.jsonl", ["math"])
    assert (changes["search"]["rounds"], changes["optim"]["lr"]) == (3, 3e-5)
    assert dump_yaml(merge(TrainConfig(), changes, source="printed")) == printed
    assert '\n  separator: "\\n\\n"\n' in printed
    file.write_text(printed, "utf-8")
    assert main(["config", "--config", str(file)]) == 0
    assert capsys.readouterr().out == printed


def test_config_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "ib.beta = 5.0\n    number in (0.0, inf)\n    Weight of" in out
    assert [name for name in names(TrainConfig()) if f"\n{name} = " not in out] == []


# ---- completion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    commands = ("train", "eval", "sample", "study", "view", "config", "doctor", "completion")
    assert all(command in script for command in commands)
    assert "search.rounds" in script
    assert len(script.encode()) < 128 << 10, "fish and zsh hand it to Python as one argument: Linux takes no longer one"
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=60)
        assert checked.stderr == ""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "ibtpo.bash"
    script.write_text(capsys.readouterr().out, "utf-8")
    for words, expected in [
        (("ibtpo", "tra"), {"train"}),
        (("ibtpo", "train", "--search.rou"), {"--search.rounds"}),
        (("ibtpo", "train", "--dtype", "bfl"), {"bfloat16"}),
        (("ibtpo", "sample", "--preset", "vine"), {"vineppo"}),
        (("ibtpo", "view", "--exp"), {"--export"}),
        (("ibtpo", "study", "ma"), {"main"}),
        (("ibtpo", "study", "main", "--see"), {"--seeds"}),
        (("ibtpo", "study", "own.yaml", "--see"), {"--seeds"}),
        (("ibtpo", "study", "--seeds", "3", "sam"), {"samplers"}),
        (("ibtpo", "study", "--na"), set()),
        (("ibtpo", "completion", "fi"), {"fish"}),
    ]:
        listed = " ".join(f"'{word}'" for word in words)
        line = (
            f"source {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _tyro_ibtpo; echo ${{COMPREPLY[@]}}"
        )
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env={"PATH": path})
        assert {word.strip() for word in done.stdout.split()} == expected, done.stderr
    registered = subprocess.run(["bash", "-c", f"source {script}; complete -p ibtpo"], capture_output=True, text=True)
    assert registered.stdout == "complete -o default -F _tyro_ibtpo ibtpo\n"  # paths where the script knows nothing


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script = tmp_path / "ibtpo.fish"
    script.write_text(capsys.readouterr().out, "utf-8")
    lines = ["ibtpo tra", "ibtpo train --search.rou", "ibtpo study ma", "ibtpo study main --see"]
    asked = "; ".join(f"complete -C '{line}'" for line in lines)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "-c", f"source {script}; {asked}"], capture_output=True, text=True, timeout=60, env=environment
    )
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == ["train", "--search.rounds", "main", "--seeds"], done.stderr


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "fish" in capsys.readouterr().err
