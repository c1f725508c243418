"""What the command line says of bad input: one paragraph, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import byte_tokenizer, save_checkpoint
from command_line import DIGITS, SMALL, Refusal
from safetensors.torch import load_file, save_file

from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.console import RunConsole
from ibtpo.disk import RunFolderError
from ibtpo.train import train

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
    damage: str, model_folder: Path, rows_file: Path, refused: Refusal
) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(model_folder)
    message = refused("--model", model_folder, "--data", rows_file, *SMALL)
    assert [part for part in expected if part not in message] == [], message


def test_missing_shard_is_named(tmp_path: Path, rows_file: Path, refused: Refusal) -> None:
    model_folder = save_checkpoint(tmp_path / "sharded", "llama", shard_size="20KB")
    shard = sorted(model_folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: not found" in refused("--model", model_folder, "--data", rows_file, *SMALL)


def test_missing_model_folder_is_named(tmp_path: Path, rows_file: Path, refused: Refusal) -> None:
    assert f"{tmp_path / 'nowhere'}: no such folder" in refused("--model", tmp_path / "nowhere", "--data", rows_file)


# ---- bad data ----------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": 3}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "rows.jsonl: the file is empty; write one JSON object per line"),
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
def test_bad_rows_are_refused_by_line(
    content: str, expected: str, model_folder: Path, rows_file: Path, refused: Refusal
) -> None:
    rows_file.write_text(content)
    assert expected in refused("--model", model_folder, "--data", rows_file, *SMALL)


def test_rows_that_are_all_held_out_are_refused_before_anything_is_evaluated(
    model_folder: Path, rows_file: Path, refused: Refusal
) -> None:
    rows_file.write_text(GOOD)
    model = ("--model", model_folder, "--data", rows_file, *SMALL)
    assert "no row is left to train on; lower jsonl.eval_fraction" in refused(*model, "--jsonl.eval-fraction", "1")
    assert "give jsonl.eval_data other prompts" in refused(*model, "--jsonl.eval-data", rows_file)


def test_prompt_longer_than_the_context_names_line_and_limit(
    model_folder: Path, rows_file: Path, refused: Refusal
) -> None:
    rows_file.write_text(GOOD + json.dumps({"prompt": "y" * 80, "answer": "x"}) + "\n")
    message = refused("--model", model_folder, "--data", rows_file, *SMALL)
    assert f"{rows_file}, line 3: the prompt has " in message
    assert "context is 64; shorten the prompt or remove it, or set jsonl.max_prompt_tokens to leave long" in message


def test_pool_too_small_for_one_prompt_names_the_field(model_folder: Path, rows_file: Path, refused: Refusal) -> None:
    message = refused("--model", model_folder, "--data", rows_file, *SMALL, "--engine.kv-tokens", "16")
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
    assert "the nearest settings that fit: --engine.kv-tokens" in message


def test_missing_data_file_is_named(
    model_folder: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[object] = []
    monkeypatch.setattr("ibtpo.train.check_memory", planned.append)
    message = refused("--model", model_folder, "--data", tmp_path / "none.jsonl")
    assert f"{tmp_path / 'none.jsonl'}: no such file" in message
    assert not planned  # it is looked for before the memory is planned and the model is loaded
    assert "jsonl needs a file of prompts and answers" in refused("--model", model_folder, "--task", "jsonl")


def test_what_must_fail_is_refused_before_the_memory_plan(
    rows_file: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibtpo.train.check_memory", lambda *_, **__: pytest.fail("planned"))
    assert "task jsonl needs a checkpoint" in refused("--data", rows_file)
    assert "lora.rank: the built-in policy has no adapters; set it to 0, or" in refused(*DIGITS, "--lora.rank", "4")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(RunFolderError, match="already holds files"):
        train(TrainConfig(out=tmp_path / "used"), RunConsole(quiet=True))


def test_a_name_on_the_hub_comes_with_the_command_that_downloads_it(refused: Refusal, rows_file: Path) -> None:
    assert "hf download Qwen/Qwen3-0.6B --local-dir" in refused("--model", "Qwen/Qwen3-0.6B", "--data", rows_file)


def test_built_in_policy_cannot_read_text(rows_file: Path, refused: Refusal) -> None:
    message = refused("--data", rows_file, *SMALL)
    assert "the built-in policy" in message
    assert "--model DIR" in message


def test_chat_messages_need_a_chat_template(tmp_path: Path, rows_file: Path, refused: Refusal) -> None:
    model_folder = save_checkpoint(tmp_path / "plain", "llama", chat=False)
    rows = [{"prompt": [{"role": "user", "content": f"1+{i}"}], "answer": str(1 + i)} for i in range(5)]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the tokenizer has no chat template" in refused("--model", model_folder, "--data", rows_file, *SMALL)


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


@pytest.mark.parametrize("command", ["train", "eval", "sample", "config", "study"])
def test_a_file_of_settings_that_cannot_be_read_is_named(command: str, tmp_path: Path, refused: Refusal) -> None:
    (file := tmp_path / "run.yaml").write_text("[]")
    what = ["main", "--out", tmp_path] if command == "study" else []
    for path, fault in [
        (tmp_path / "nope.yaml", "no such configuration file; check the path"),
        (tmp_path, "cannot be read (Is a directory); name a YAML file that can"),
        (file, "must hold fields and values, like `sampled_tokens: 100_000`"),
    ]:
        assert f"ibtpo: error: {path}: {fault}" in refused(*what, "--config", path, command=command)


@pytest.mark.parametrize(
    ("command", "flags", "field"),
    [
        ("train", ["--model", ""], "model: "),
        ("eval", ["--model", " "], "model: "),
        ("train", ["--data", ""], "Error parsing --data: "),
        ("train", ["--data="], "Error parsing --data: "),
        ("train", ["--config", ""], "Error parsing --config: "),
        ("eval", ["--out", ""], "Error parsing --out: "),
        ("study", ["main", "--out", ""], "Error parsing --out: "),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    command: str, flags: list[str], field: str, refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path)  # which the current folder could be taken for
    monkeypatch.chdir(tmp_path)
    assert f"{field}{flags[-1].rpartition('=')[2]!r} is no path; name one, or leave it out" in refused(
        *flags, command=command
    )


def test_an_empty_path_in_a_file_is_not_the_current_folder(tmp_path: Path, refused: Refusal) -> None:
    (file := tmp_path / "run.yaml").write_text("data: ''\n")
    assert f"{file}: data: '' is no path" in refused("--config", file)


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
