"""The command line: help, sample, eval, and what it says of bad input: one paragraph, exit code 2, nothing written."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import byte_tokenizer, save_additions, save_checkpoint
from safetensors.torch import load_file, save_file

import ibtpo.runlog
import ibtpo.trainer
from ibtpo import cli
from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.policy import built_in_policy
from ibtpo.runlog import RunFolder, latest_checkpoint

SMALL = [
    "--sampled-tokens", "150", "--prompts-per-step", "4", "--search.rounds", "2", "--sampling.max-tokens", "14",
    "--eval.prompts", "3", "--eval.samples", "2",
]  # fmt: skip
DIGITS = [
    "--digits.min-ops",
    "1",
    "--digits.max-ops",
    "2",
    "--warm-start.max-updates",
    "2",
    "--warm-start.batch-size",
    "4",
]


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in policy before any training."""
    folder = tmp_path_factory.mktemp("built-in")
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint folder that may be damaged."""
    return save_checkpoint(tmp_path / "model", tied=False, context=64)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_additions(tmp_path / "rows.jsonl")


class Refusal:
    """Runs commands that must be refused, and checks how."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self._capsys = out, capsys

    def __call__(self, *arguments: object, command: str = "train", written: bool = False) -> str:
        """What is printed; the exit code must be 2, the text one paragraph, and nothing left behind."""
        self._capsys.readouterr()
        out = ["--out", self.out] if command == "train" and "--resume" not in arguments else []
        try:
            code = main([command, *map(str, [*arguments, *out])])
        except SystemExit as stop:  # tyro's own, on what is not a flag or not of its type
            code = stop.code
        message = self._capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert message.strip()
        assert "\n\n" not in message.strip()
        assert written or not self.out.exists()
        return " ".join(message.replace("│", " ").split())


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path / "out", capsys)


# ---- help ------------------------------------------------------------------------------------------------------


def _flags(config: Any, prefix: str = "--") -> list[str]:
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        found += _flags(value, f"{name}.") if is_dataclass(value) else [name]
    return found


@pytest.mark.parametrize("command", ["train", "eval", "sample"])
def test_help_lists_every_field_with_a_sentence(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # narrow enough for one column
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    missing = [flag for flag in _flags(TrainConfig()) if flag not in text]
    assert missing == []
    plain = " ".join(text.replace("│", " ").split())
    assert "Weight of the KL penalty (k3 estimator) to the frozen starting policy" in plain


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage_names_the_commands(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("train", "eval", "sample", "presets"))


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian' is not a command" in capsys.readouterr().err


def test_runs_as_a_module_and_ends_quietly_when_the_pipe_is_closed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = f"{sys.executable} -m ibtpo.cli train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: ibtpo train")
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_it_is_loaded_ends_it_without_a_traceback() -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'ibtpo.cli':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from ibtpo.__main__ import main\n"
        "sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
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
    assert lines[-1].startswith("6 trajectories, 0 right, ")
    leaves = [line for line in lines if line.endswith("wrong")]
    assert len(leaves) == 6
    assert all("round" in line and "pi 0." in line and "value 0.00" in line for line in leaves)
    assert {"round 0", "round 1", "round 2"} <= {f"round {line.split('round ')[1][0]}" for line in leaves}


@pytest.mark.parametrize(
    ("rewards", "text"),
    [
        ([0.3] * 12, "0 right (mean reward 0.3)"),
        ([1.0, 0.0, 0.6], "2 right (mean reward 0.533)"),
        ([1.0, 0], "1 right"),
    ],
)
def test_rewards_are_not_counted_as_right_answers(rewards: list[float], text: str) -> None:
    assert cli._outcome(rewards) == text


def test_sample_takes_a_problem_by_index_and_repeats_itself(built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for index in (3, 3, 4):
        flags = ["--index", index, "--search.rounds", 2, "--sampling.max-tokens", 9]
        assert main(["sample", "--model", str(built_in), *map(str, flags)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sample_answers_a_prompt_of_ones_own(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", data, "--prompt", "1+1", "--answer", "2", *SMALL, "--preset", "grpo"]
    assert main(["sample", "--model", *map(str, [model, *flags])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1+1  value")
    assert "8 trajectories" in out


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
        assert main(["eval", "--model", str(folder), *DIGITS, *SMALL]) == 0
        assert "prompts, 2 samples each" in capsys.readouterr().out
        assert main(["sample", "--model", str(folder), *DIGITS, *SMALL]) == 0
        assert "trajectories" in capsys.readouterr().out


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
    assert f"json: {tmp_path / 'no'} is no folder" in message
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
        patch.setattr(cli, "run_evaluation", lambda *arguments: pytest.fail("it began"))
        patch.setattr(Path, "open", open_file)
        message = refused("--model", built_in, "--json", path, command="eval")
    assert f"{path} cannot be written (Read-only file system); free some space there, or name another file" in message
    flags = [*map(str, ["--model", built_in, "--json", "/dev/full", *DIGITS[:4]]), "--limit", "2", "--samples", "1"]
    assert "/dev/full cannot be written (No space left on device)" in refused(*flags, command="eval")


def test_a_page_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(descriptor: int) -> None:
        raise _full()

    RunFolder.create(tmp_path / "run", TrainConfig()).close()
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["view", str(tmp_path / "run"), "--export", str(tmp_path / "page.html")]) == 2
    assert f"{tmp_path / 'page.html'} cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_eval_and_sample_need_a_model(command: str, tmp_path: Path, refused: Refusal) -> None:
    assert "model: give --model a checkpoint or run folder" in refused(command=command)
    with RunFolder.create(tmp_path / "run", TrainConfig()):
        assert "run is a run folder that has no checkpoint yet" in refused("--model", tmp_path / "run", command=command)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hello", "is not a digit, operations with operands 2 to 9"),
        ("7*1=?", "is not a digit, operations"),
        ("", "is not a digit, operations"),
    ],
)
def test_sample_refuses_prompts_the_built_in_policy_cannot_read(
    built_in: Path, refused: Refusal, prompt: str, message: str
) -> None:
    assert message in refused("--model", built_in, "--prompt", prompt, command="sample")


def test_sample_needs_the_right_answer_of_a_text_prompt(model: Path, data: Path, refused: Refusal) -> None:
    message = refused("--model", model, "--data", data, "--prompt", "1+1", command="sample")
    assert "give the right --answer too" in message


# ---- bad checkpoints ---------------------------------------------------------------------------------------------


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("neither model.safetensors nor",)),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors"), ("model.safetensors: truncated or damaged",)),
    "weights of zero bytes": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors: truncated",)),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ("Found pytorch_model.bin: convert it to safetensors",),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: not found",)),
    "torn config": (lambda f: _truncate(f / "config.json"), ("config.json: not valid JSON",)),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json",)),
    "field missing": (lambda f: _json(f / "config.json", lambda c: c.pop("hidden_size")), ("'hidden_size'", "missing")),
    "unknown architecture": (
        lambda f: _json(f / "config.json", lambda c: c.update(architectures=["MambaForCausalLM"])),
        ("config.json", "'MambaForCausalLM' is not supported", "Qwen3ForCausalLM"),
    ),
    "wrong shape": (
        lambda f: _weights(f, lambda t: t.update({NORM: torch.ones(7)})),
        ("model.safetensors", NORM, "(7,)", "(32,)"),
    ),
    "tensor missing": (lambda f: _weights(f, lambda t: t.pop(NORM)), (NORM, "missing")),
    "tensor too many": (
        lambda f: _weights(f, lambda t: t.update({"model.layers.9.x": torch.ones(2)})),
        ("unexpected tensor 'model.layers.9.x'",),
    ),
    "NaN": (lambda f: _weights(f, lambda t: t[NORM].fill_(torch.nan)), ("model.safetensors", NORM, "NaN or Inf")),
    "Inf": (lambda f: _weights(f, lambda t: t[NORM][3:4].fill_(torch.inf)), (NORM, "NaN or Inf")),
    "no end token": (
        lambda f: byte_tokenizer(eos=False).save_pretrained(f),
        ("tokenizer_config.json", "field eos_token is missing"),
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ("there is no tokenizer; it needs tokenizer.json and tokenizer_config.json",),
    ),
    "torn tokenizer": (lambda f: _truncate(f / "tokenizer.json"), ("the tokenizer cannot be loaded",)),
    "torn generation config": (
        lambda f: _truncate(f / "generation_config.json"),
        ("generation_config.json: eos_token_id must be a token id", "Correct or delete the file"),
    ),
    "tokenizer of another model": (
        lambda f: (_json(f / "config.json", lambda c: c.update(vocab_size=200)),
                   _weights(f, lambda t: t.update({n: t[n][:200] for n in t if "head" in n or "embed" in n}))),
        ("rows.jsonl, line", "token", "the model's vocab_size is 200"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_by_file_field_and_remedy(
    damage: str, model: Path, data: Path, refused: Refusal
) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(model)
    message = refused("--model", model, "--data", data, *SMALL)
    assert [part for part in expected if part not in message] == [], message


def test_missing_shard_is_named(tmp_path: Path, data: Path, refused: Refusal) -> None:
    model = save_checkpoint(tmp_path / "sharded", "llama", shard_size="20KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: not found" in refused("--model", model, "--data", data, *SMALL)


def test_missing_model_folder_is_named(tmp_path: Path, data: Path, refused: Refusal) -> None:
    assert f"{tmp_path / 'nowhere'}: no such folder" in refused("--model", tmp_path / "nowhere", "--data", data)


# ---- bad data ----------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": 3}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "rows.jsonl: the file is empty; write one JSON object a line"),
        ("\n \n", "rows.jsonl: the file is empty"),
        (GOOD + "{oops}\n", "rows.jsonl, line 3: malformed JSON at column 2"),
        (GOOD + "\n[1]\n", "rows.jsonl, line 4: expected an object, found a list"),
        (GOOD + '{"prompt": "x"}\n', "line 3: field \"answer\" is missing (fields found: 'prompt'); add it, or name"),
        (GOOD + '{"answer": "x"}\n', 'line 3: field "prompt" is missing'),
        (GOOD + '{"prompt": " ", "answer": "x"}\n', 'line 3: field "prompt" is empty'),
        (GOOD + '{"prompt": 7, "answer": "x"}\n', 'line 3: field "prompt" is a number'),
        (GOOD + '{"prompt": "x", "answer": null}\n', 'line 3: field "answer" is null'),
        (GOOD + '{"prompt": "%s", "answer": "x"}\n' % ("y" * 80), "line 3: the prompt has"),
        ('{"prompt": "1+1", "answer": "2"}\n', "at least 2 different prompts are needed"),
    ],
)
def test_bad_rows_are_refused_by_line(content: str, expected: str, model: Path, data: Path, refused: Refusal) -> None:
    data.write_text(content)
    assert expected in refused("--model", model, "--data", data, *SMALL)


def test_prompt_longer_than_the_context_names_line_and_limit(model: Path, data: Path, refused: Refusal) -> None:
    data.write_text(GOOD + json.dumps({"prompt": "y" * 80, "answer": "x"}) + "\n")
    message = refused("--model", model, "--data", data, *SMALL)
    assert f"{data}, line 3: the prompt has " in message
    assert "the model's context is 64; shorten the prompt or remove it" in message


def test_pool_too_small_for_one_prompt_names_the_field(model: Path, data: Path, refused: Refusal) -> None:
    message = refused("--model", model, "--data", data, *SMALL, "--engine.kv-tokens", "16")
    assert "the KV pool holds 16; raise engine.kv_tokens" in message
    message = refused(*DIGITS, *SMALL, "--digits.max-ops", "20", "--engine.kv-tokens", "32")
    assert "raise engine.kv_tokens" in message


def test_pool_too_small_for_one_tree_ends_the_run_which_a_larger_one_continues(refused: Refusal) -> None:
    flags = [*DIGITS, *SMALL, "--sampling.max-tokens", "60", "--engine.kv-tokens", "64", "--search.rounds", "20"]
    message = refused(*flags, written=True)
    assert "pages needed" in message
    assert "raise kv_tokens (now 64)" in message
    assert main(["train", "--resume", str(refused.out), "--engine.kv-tokens", "4000"]) == 0


def test_pool_that_memory_cannot_hold_names_the_field(refused: Refusal) -> None:
    message = refused(*DIGITS, *SMALL, "--engine.kv-tokens", str(10**15))
    assert "memory plan" in message
    assert "the nearest that fits: --engine.kv-tokens" in message


def test_missing_data_file_is_named(model: Path, tmp_path: Path, refused: Refusal) -> None:
    assert f"{tmp_path / 'none.jsonl'}: no such file" in refused("--model", model, "--data", tmp_path / "none.jsonl")
    assert "jsonl needs a file of prompts and answers" in refused("--model", model, "--task", "jsonl")


def test_built_in_policy_cannot_read_text(data: Path, refused: Refusal) -> None:
    message = refused("--data", data, *SMALL)
    assert "the built-in policy" in message
    assert "--model DIR" in message


def test_chat_messages_need_a_chat_template(tmp_path: Path, data: Path, refused: Refusal) -> None:
    model = save_checkpoint(tmp_path / "plain", "llama", chat=False)
    rows = [{"prompt": [{"role": "user", "content": f"1+{i}"}], "answer": str(1 + i)} for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the tokenizer has no chat template" in refused("--model", model, "--data", data, *SMALL)


# ---- bad settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--search.rounds", "0"], "search.rounds: 0 lies outside [1, inf)"),
        (["--search.initial-branches", "0"], "search.initial_branches: 0 lies outside [1, inf)"),
        (["--search.nodes-per-round", "0"], "search.nodes_per_round: 0 lies outside [1, inf)"),
        (["--digits.min-ops", "5", "--digits.max-ops", "4"], "digits.max_ops: 4 lies outside [5, inf)"),
        (["--prompts-per-step", "2", "--mini-batches", "3"], "mini_batches: 3 lies outside [1, 2]"),
        (["--digits.max-ops", "600"], "the model's context is 1024"),
        (["--sampling.temperature", "0"], "sampling.temperature: 0 is greedy"),
        (["--sampling.top-p", "1.5"], "sampling.top_p: 1.5 lies outside (0.0, 1.0]"),
        (["--optim.lr", "nan"], "optim.lr: nan lies outside"),
        (["--serch.rounds", "3"], "--search.rounds"),
        (["--seed", "x"], "--seed"),
        (["--dtype", "float16"], "float16"),
        (["--task", "digit-chian"], 'did you mean "digit-chain"?'),
        (["--task", "reasoning-gym:no-such-thing"], "reasoning-gym"),
        (
            ["--preset", "gpro"],
            "preset: 'gpro' is not one of ib-tpo, ib-tpo+, grpo, grpo-clip-higher, ",
        ),
        (["--device", "abacus"], "device: 'abacus' is not a device"),
        (["--device", "meta"], "device: 'meta' is not supported; use auto, cpu, cuda or cuda:N"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--config"], "--config"),
    ],
)
def test_bad_settings_are_refused_by_name(flags: list[str], expected: str, refused: Refusal) -> None:
    assert expected in refused(*DIGITS, *flags)


def test_unknown_key_of_a_file_suggests_the_nearest(tmp_path: Path, refused: Refusal) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("search: {round: 3}\n")
    expected = f"{file}: unknown field search.round. Did you mean search.rounds?"
    assert expected in refused("--config", file)
    file.write_text("search: {rounds: 0}\n")
    assert f"{file}: search.rounds: 0 lies outside [1, inf)" in refused("--config", file)


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(name: str, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert f"device: '{name}', but torch sees no GPU" in refused("--device", name)


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


# ---- what is no error --------------------------------------------------------------------------------------------


def test_more_tokens_than_the_context_holds_are_fine(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--data", data, "--jsonl.grade", "exact", *SMALL, "--sampling.max-tokens", 10_000]
    assert main(["train", "--out", str(tmp_path / "out"), *map(str, flags), "--sampled-tokens", "500"]) == 0


def test_cli_keeps_no_state_between_calls(refused: Refusal) -> None:
    assert "search.rounds" in refused("--search.rounds", "0")
    assert cli.main(["train", "--out", str(refused.out), *DIGITS, *SMALL]) == 0


def test_eval_of_a_run_measures_the_task_it_was_trained_on(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the run's own configuration, eval would grade digit chains and print a meaningless number."""
    run = tmp_path / "run"
    flags = ["--model", model, "--data", data, "--jsonl.grade", "exact", "--out", run, *SMALL]
    assert main(["train", *map(str, flags)]) == 0
    held_out = load_yaml(run / "config.yaml")["jsonl"]["eval_fraction"]
    capsys.readouterr()
    last = latest_checkpoint(run)
    assert last is not None
    for folder in (run, last.path):
        assert main(["eval", "--model", str(folder), "--eval.samples", "2"]) == 0
        num_rows = len(data.read_text().splitlines())
        assert f"{max(1, round(held_out * num_rows))} prompts, 2 samples each" in capsys.readouterr().out


def test_sample_grades_a_text_prompt_without_a_data_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "1+1", "--answer", "2", "--search.rounds", "2", "--sampling.max-tokens", "4"]
    assert main(["sample", "--model", *map(str, [model, *flags])]) == 0
    assert "5 trajectories" in capsys.readouterr().out
