"""The command line: help, sample, eval, and what it does not refuse."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DIGITS, SHORT, SMALL, Refusal

import ibtpo.cli
from ibtpo.checkpoints import latest_checkpoint
from ibtpo.cli import main
from ibtpo.commands.arguments import UNUSED_BY_EVAL, UNUSED_BY_SAMPLE
from ibtpo.config import TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.outline import outcome
from ibtpo.policy import built_in_policy
from ibtpo.runlog import RunFolder


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in policy before any training."""
    folder = tmp_path_factory.mktemp("built-in")
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    return folder


# ---- help ------------------------------------------------------------------------------------------------------


def _flags(config: Any, prefix: str = "--") -> list[str]:
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        found += _flags(value, f"{name}.") if is_dataclass(value) else [name]
    return found


def _field(flag: str) -> str:
    return flag.removeprefix("--").partition(".")[0].replace("-", "_")


@pytest.mark.parametrize(("command", "unused"), [("train", ()), ("eval", UNUSED_BY_EVAL), ("sample", UNUSED_BY_SAMPLE)])
def test_help_lists_every_field_that_the_command_uses_with_a_sentence(
    command: str, unused: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # narrow enough for one column
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    listed = set(re.findall(r"--[a-z][a-z0-9.-]*", text))
    used = {flag for flag in _flags(TrainConfig()) if _field(flag) not in unused}
    assert {flag for flag in _flags(TrainConfig()) if flag in listed} == used
    plain = " ".join(text.replace("│", " ").split())
    assert ("Weight of the KL penalty (k3 estimator) to the frozen starting policy" in plain) == (command == "train")
    assert "Text that ends a step; the token that completes it belongs to that step." in plain


@pytest.mark.parametrize(("command", "unused"), [("eval", UNUSED_BY_EVAL), ("sample", UNUSED_BY_SAMPLE)])
def test_flags_of_training_are_refused_by_name(command: str, unused: tuple[str, ...], refused: Refusal) -> None:
    for flag in (flag for flag in _flags(TrainConfig()) if _field(flag) in unused and flag != "--resume"):
        assert f"{flag}: `ibtpo {command}` does not use it; leave it out" in refused(flag, "1", command=command)
    assert "--no-gradient-checkpointing: `ibtpo" in refused("--no-gradient-checkpointing", command=command)
    assert f"--resume: `ibtpo {command}` does not use it; name the run with --model" in refused(
        "--resume=run", command=command
    )


@pytest.mark.parametrize("command", ["train", "eval", "view", "study"])
def test_help_is_as_narrow_as_the_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 60 and not line.startswith("usage: ")] == []
    assert text.count("\n\n\n") == 0


def test_help_shows_a_newline_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--data", "rows.jsonl", "--help"])
    assert r"A newline in the shell: $'\n'. (default: '\n\n')" in " ".join(
        capsys.readouterr().out.replace("│", "").split()
    )


@pytest.mark.parametrize("folder", ["commands", "sections"])
def test_help_texts_do_not_break_in_the_middle_of_a_sentence(folder: str) -> None:
    """tyro keeps the line breaks of a field's text, and in a class's text those before what is no letter."""
    for file in Path(ibtpo.cli.__file__).with_name(folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                text = ast.get_docstring(node) or ""
                for paragraph in text.split("\n\n"):
                    assert all(line[0].isalpha() for line in paragraph.splitlines()[1:]), paragraph
                for item in node.body[1:]:
                    if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                        assert "\n" not in str(item.value.value), item.value.value


def test_help_shows_the_defaults_that_apply_to_a_data_file(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, rate in (([], "0.0002"), (["--data", "rows.jsonl"], "1e-06")):
        with pytest.raises(SystemExit):
            main(["train", *arguments, "--help"])
        assert f"Learning rate after the warm-up. (default: {rate})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage_names_the_commands(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("train", "eval", "sample", "presets"))


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert 'is not a command; did you mean "train"?' in capsys.readouterr().err


def test_runs_as_a_module_and_ends_quietly_when_the_pipe_is_closed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = f"{sys.executable} -m ibtpo train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: ibtpo train")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", [["ibtpo", "presets"], ["ibtpo", "doctor", "--no-kernels"]])
def test_a_reader_that_has_left_changes_neither_work_nor_exit_code(module: list[str]) -> None:
    """rich would exit with 1: what is done after the last line, such as the file of `eval --json`, was not done."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", *module], env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """Help of every command, completion, presets, config: their time is that of the imports."""
    script = (
        "import sys\n"
        "from ibtpo.cli import COMMANDS, main\n"
        "lines = [['--help'], ['presets'], ['config'], ['completion', 'bash']]\n"
        "lines += [[name, '--help'] for name in COMMANDS]\n"
        "for line in lines:\n"
        "    try:\n"
        "        assert main(line) == 0\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "import ibtpo.viewer, ibtpo.studies.command\n"
        "print(len(lines), {'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "13 set()\n")


@pytest.mark.parametrize("module", ["ibtpo.cli", "torch"])
def test_ctrl_c_while_it_is_loaded_ends_it_without_a_traceback(module: str) -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == '{module}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from ibtpo.__main__ import main\n"
        "sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "ibtpo: stopped at once; nothing had begun\n")


def test_presets_are_explained_in_a_narrow_window(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert "trees branched" in out and "grpo-clip-higher" in out and "…" not in out
    assert max(map(len, out.splitlines())) <= 60


# ---- sample and eval -------------------------------------------------------------------------------------------


def test_sample_prints_a_tree_of_the_built_in_task(built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", r"7*8-5=?\n", "--search.rounds", "3", "--sampling.max-tokens", "9"]
    assert main(["sample", "--model", str(built_in), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7*8-5=?  value 0.00")
    assert lines[-1].startswith("trajectories: 6, 0 right; tokens: ")
    leaves = [line for line in lines if line.endswith("wrong")]
    assert len(leaves) == 6
    assert all("round" in line and "pi 0." in line and "value 0.00" in line for line in leaves)
    assert {"round 0", "round 1", "round 2"} <= {f"round {line.split('round ')[1][0]}" for line in leaves}


def test_only_branches_of_a_sampled_tree_are_indented(built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However many steps a trajectory has."""
    flags = ["--preset", "grpo", "--search.step-tokens", "1", "--sampling.max-tokens", "40"]
    assert main(["sample", "--model", str(built_in), *flags]) == 0
    steps = [line for line in capsys.readouterr().out.splitlines() if "round 0" in line]
    assert len(steps) > 40
    assert {len(line) - len(line.lstrip("│├└─ ")) for line in steps} == {4}


@pytest.mark.parametrize(
    ("rewards", "text"),
    [
        ([0.3] * 12, "0 right (mean reward 0.3)"),
        ([1.0, 0.0, 0.6], "2 right (mean reward 0.533)"),
        ([1.0, 0], "1 right"),
    ],
)
def test_rewards_are_not_counted_as_right_answers(rewards: list[float], text: str) -> None:
    assert outcome(rewards) == text


def test_sample_takes_a_problem_by_index_and_repeats_itself(built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for index in (3, 3, 4):
        flags = ["--index", index, "--search.rounds", 2, "--sampling.max-tokens", 9]
        assert main(["sample", "--model", str(built_in), *map(str, flags)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sample_answers_a_prompt_of_ones_own(
    model_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", rows_file, "--prompt", "1+1", "--answer", "2", *SHORT, "--preset", "grpo"]
    assert main(["sample", "--model", *map(str, [model_folder, *flags])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1+1  value")
    assert "trajectories: 8" in out


def test_eval_prints_and_writes_the_accuracies(
    built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", tmp_path / "values.json", "--eval.prompts", 5, "--eval.samples", 3, *DIGITS[:4]]
    assert main(["eval", "--model", *map(str, [built_in, *flags])]) == 0
    out = capsys.readouterr().out
    assert "5 prompts, 3 samples each" in out
    assert all(name in out for name in ("avg@3", "pass@k", "maj@k", "greedy"))
    values = json.loads((tmp_path / "values.json").read_text())
    assert (values["eval_prompts"], values["eval_samples"]) == (5, 3)
    assert "Evaluating" in out
    assert main(["eval", "--quiet", "--model", *map(str, [built_in, *flags])]) == 0
    assert "Evaluating" not in (quiet := capsys.readouterr().out) and "greedy" in quiet
    for name in ("eval_avg", "eval_pass", "eval_maj", "eval_greedy"):
        assert 0 <= values[f"{name}_low"] <= values[name] <= values[f"{name}_high"] <= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "values.json"]


def test_train_ends_with_the_table_and_eval_and_sample_take_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *DIGITS, *SMALL]) == 0
    out = capsys.readouterr().out
    words = ("held-out accuracy", "before", "after", "Trajectories", "Tokens sampled", "Tokens computed",
             "Tokens trained", "Eff-Rate", "Cov(η₁, η₂)", "Seconds", "is not accuracy")  # fmt: skip
    assert [word for word in words if word not in out] == []
    assert out.splitlines()[-1] == f"report: {run / 'report.html'}"
    [checkpoint] = [line.removeprefix("checkpoint: ") for line in out.splitlines() if line.startswith("checkpoint: ")]
    for folder in (run, checkpoint):
        assert main(["eval", "--model", str(folder), *DIGITS[:4], *SHORT, "--eval.samples", "2"]) == 0
        assert "prompts, 2 samples each" in capsys.readouterr().out
        assert main(["sample", "--model", str(folder), *DIGITS[:4], *SHORT, "--search.rounds", "2"]) == 0
        assert "trajectories" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "said"), [("ib-tpo", True), ("ibtree-grpo", True), ("grpo", False), ("treerl", False)]
)
def test_only_trees_branched_by_ib_score_come_with_the_remark_on_their_reward(
    preset: str, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", preset, "--out", str(tmp_path / "run"), *DIGITS, *SMALL]) == 0
    assert ("guided tree is not accuracy" in capsys.readouterr().out) == said


def test_eval_of_a_run_agrees_with_what_the_run_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same held-out prompts, the same random numbers, so the same numbers."""
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *DIGITS, *SMALL]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    flags = ["--config", str(run / "config.yaml"), "--json", str(tmp_path / "values.json")]
    assert main(["eval", "--model", str(run), *flags]) == 0
    values = json.loads((tmp_path / "values.json").read_text())
    same = [name for name in logged if name.startswith("eval_")]
    assert "eval_maj_high" in same
    assert {name: values[name] for name in same} == {name: logged[name] for name in same}


def test_eval_looks_for_a_place_to_write_before_it_begins(built_in: Path, tmp_path: Path, refused: Refusal) -> None:
    message = refused("--model", built_in, "--json", tmp_path / "no" / "values.json", command="eval")
    assert f"json: {tmp_path / 'no'} is not a folder" in message
    assert f"json: {tmp_path} is a folder" in refused("--model", built_in, "--json", tmp_path, command="eval")


def test_eval_tries_to_write_before_it_begins(
    built_in: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "values.json", Path.open

    def open_file(file: Path, *arguments: Any, **options: Any) -> Any:
        if file == path:
            raise OSError(errno.EROFS, "Read-only file system")
        return original(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("ibtpo.evaluation.run.run_evaluation", lambda *arguments: pytest.fail("it began"))
        patch.setattr(Path, "open", open_file)
        message = refused("--model", built_in, "--json", path, command="eval")
    assert (
        f"{path} cannot be written (Read-only file system); make the folder writable, or name another file" in message
    )
    flags = [*map(str, ["--model", built_in, "--json", "/dev/full", *DIGITS[:4]]), "--limit", "2", "--samples", "1"]
    assert "/dev/full cannot be written (No space left on device)" in refused(*flags, command="eval")


def test_a_page_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    RunFolder.create(tmp_path / "run", TrainConfig()).close()
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["view", str(tmp_path / "run"), "--export", str(tmp_path / "page.html")]) == 2
    assert f"{tmp_path / 'page.html'} cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_eval_and_sample_need_a_model(command: str, tmp_path: Path, refused: Refusal) -> None:
    assert "model: a checkpoint or run folder is needed" in refused(command=command)
    with RunFolder.create(tmp_path / "run", TrainConfig()):
        assert "run is a run folder that has no checkpoint yet" in refused("--model", tmp_path / "run", command=command)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hello", 'is not of the form "7*8-5=?": a digit, operations with operands 2 to 9'),
        ("7*1=?", "is not of the form"),
        ("", "is not of the form"),
    ],
)
def test_sample_refuses_prompts_the_built_in_policy_cannot_read(
    built_in: Path, refused: Refusal, prompt: str, message: str
) -> None:
    assert message in refused("--model", built_in, "--prompt", prompt, command="sample")


def test_sample_refuses_an_index_below_0(built_in: Path, refused: Refusal) -> None:
    assert "index: -1 lies outside [0, inf)" in refused("--model", built_in, "--index", -1, command="sample")


def test_sample_needs_the_right_answer_of_a_text_prompt(model_folder: Path, rows_file: Path, refused: Refusal) -> None:
    message = refused("--model", model_folder, "--data", rows_file, "--prompt", "1+1", command="sample")
    assert "give it with --answer" in message


# ---- what is no error --------------------------------------------------------------------------------------------


def test_more_tokens_than_the_context_holds_are_fine(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    flags = [
        "--model",
        model_folder,
        "--data",
        rows_file,
        "--jsonl.grade",
        "exact",
        *SMALL,
        "--sampling.max-tokens",
        10_000,
    ]
    assert main(["train", "--out", str(tmp_path / "out"), *map(str, flags), "--sampled-tokens", "500"]) == 0


def test_cli_keeps_no_state_between_calls(refused: Refusal) -> None:
    assert "search.rounds" in refused("--search.rounds", "0")
    assert main(["train", "--out", str(refused.out), *DIGITS, *SMALL]) == 0


def test_eval_of_a_run_measures_the_task_it_was_trained_on(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the run's own configuration, eval would grade digit chains and print a meaningless number."""
    run = tmp_path / "run"
    flags = ["--model", model_folder, "--data", rows_file, "--jsonl.grade", "exact", "--out", run, *SMALL]
    assert main(["train", *map(str, flags)]) == 0
    held_out = load_yaml(run / "config.yaml")["jsonl"]["eval_fraction"]
    capsys.readouterr()
    last = latest_checkpoint(run)
    assert last is not None
    for folder in (run, last.path):
        assert main(["eval", "--model", str(folder), "--eval.samples", "2"]) == 0
        num_rows = len(rows_file.read_text().splitlines())
        assert f"{max(1, round(held_out * num_rows))} prompts, 2 samples each" in capsys.readouterr().out


def test_sample_grades_a_text_prompt_without_a_data_file(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "1+1", "--answer", "2", "--search.rounds", "2", "--sampling.max-tokens", "4"]
    assert main(["sample", "--model", *map(str, [model_folder, *flags])]) == 0
    assert "trajectories: 5" in capsys.readouterr().out
