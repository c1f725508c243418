"""A checkpoint folder describes itself and loads in transformers as its card says; a run remembers what it ran with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save_additions, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import ibtpo.environment
from ibtpo.checkpoints import checkpoints, damage
from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, DigitChainConfig, JsonlConfig, SearchConfig, TrainConfig
from ibtpo.environment import ENVIRONMENT
from ibtpo.metrics import evaluation_metrics
from ibtpo.model_card import CARD, method, model_card
from ibtpo.runlog import METRICS, read_rows
from ibtpo_engine import load_tokenizer, stop_tokens

FLAGS = [
    "--jsonl.grade", "exact", "--sampled-tokens", "120", "--prompts-per-step", "4", "--search.rounds", "2",
    "--sampling.max-tokens", "8", "--eval.prompts", "3", "--eval.samples", "2", "--checkpoint-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a random checkpoint of transformers."""
    folder = tmp_path_factory.mktemp("card")
    model, data = save_checkpoint(folder / "model", context=64), save_additions(folder / "rows.jsonl")
    flags = ["--model", model, "--data", data, "--out", folder / "run", *FLAGS]
    assert main(["train", "--quiet", *map(str, flags)]) == 0
    return folder / "run"


def test_every_checkpoint_has_a_card_with_what_was_measured_by_then(run: Path) -> None:
    first, *_, last = checkpoints(run)
    for checkpoint in (first, last):
        front, body = (checkpoint.path / CARD).read_text("utf-8").removeprefix("---\n").split("\n---\n", 1)
        header = yaml.safe_load(front)
        assert header["library_name"] == "transformers"
        assert "ib-tpo" in header["tags"]
        assert "preset ib-tpo" in body
        assert f"| training steps | {checkpoint.step} |" in body
        rows = [row for row in read_rows(run / METRICS) if "eval_avg" in row and row["step"] <= checkpoint.step]
        for row in rows:
            assert f"| {row['step']} | {row['eval_avg']:.3f} ({row['eval_avg_low']:.3f}" in body
        assert body.count("%") == 1  # no interval of a later step
        assert sum(bool(re.match(r"\| \d+ \| \d\.\d", line)) for line in body.splitlines()) == len(rows)
        assert damage(checkpoint) is None  # the card was renewed after the last evaluation
    assert last.step > 0
    assert len(rows) == 2


def test_what_was_measured_otherwise_is_marked() -> None:
    rows = [{"step": step, **evaluation_metrics([[1, 0][:k]], [1])} for step, k in ((0, 1), (5, 2))]
    card = model_card(TrainConfig(), step=5, sampled_tokens=0, rows=rows)
    assert "1 held-out prompts, 2 independent samples each" in card and "| step | avg@2 | pass@2 |" in card
    assert "\n| 0 (1 prompts, k = 1) | 1.000 (" in card and "\n| 5 | 0.500 (" in card


def test_the_card_shows_the_options_of_the_chat_template() -> None:
    config = TrainConfig(jsonl=JsonlConfig(chat_template_options=("enable_thinking=false",)))
    card = model_card(config, step=0, sampled_tokens=0, rows=[], chat=True)
    assert "add_generation_prompt=True, tokenize=False, enable_thinking=False)" in card


@pytest.mark.parametrize(("min_ops", "prompt"), [(8, "7*8-5+3*9+4-2*6+8=?"), (2, "7*8-5=?")])
def test_the_built_in_policy_is_asked_what_it_has_learned(min_ops: int, prompt: str) -> None:
    card = model_card(TrainConfig(digits=DigitChainConfig(min_ops=min_ops)), step=0, sampled_tokens=0, rows=[])
    assert f'tokenizer("{prompt}\\n"' in card


def test_the_card_says_how_the_folder_loads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints(run)[-1].path
    [code] = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text("utf-8"), flags=re.DOTALL)
    capsys.readouterr()
    exec(
        code.replace('folder = "."', f"folder = {str(folder)!r}").replace("max_new_tokens=256", "max_new_tokens=2"), {}
    )
    assert capsys.readouterr().out.startswith("<|im_start|>user")


def test_generation_config_has_the_stop_tokens_and_the_sampling(run: Path) -> None:
    folder = checkpoints(run)[-1].path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    assert tuple(config.eos_token_id) == stop_tokens(folder, load_tokenizer(folder)) == (tokenizer.eos_token_id,)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.7, 0.95, 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == config.eos_token_id
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert 4 <= out.shape[1] <= 7


def test_adapters_are_loaded_with_peft(tmp_path: Path) -> None:
    config = TrainConfig(model=str(tmp_path))
    card = model_card(config, step=3, sampled_tokens=10, rows=[], adapters=True)
    assert "library_name: peft" in card
    assert "AutoPeftModelForCausalLM" in card
    assert "Not measured yet." in card


def test_the_base_model_is_named_as_on_the_hub_where_the_folder_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_name_or_path": "Qwen/Qwen3-0.6B"}')
    assert "\nbase_model: Qwen/Qwen3-0.6B\n" in model_card(
        TrainConfig(model=str(tmp_path)), step=0, sampled_tokens=0, rows=[]
    )
    (tmp_path / "config.json").write_text('{"_name_or_path": "/data/qwen"}')
    card = model_card(TrainConfig(model=str(tmp_path)), step=0, sampled_tokens=0, rows=[])
    assert "base_model:" not in card
    assert f"| base model | {tmp_path} |" in card


def test_a_pattern_stays_in_its_cell() -> None:
    card = model_card(TrainConfig(reward=("regex=a|b\n(c)",)), step=0, sampled_tokens=0, rows=[])
    assert "| rewards | regex=a\\|b (c) |\n" in card


def test_settings_that_are_no_preset_claim_none() -> None:
    assert method(TrainConfig()).endswith("(preset ib-tpo)")
    grpo = TrainConfig(search=SearchConfig(method="independent"), advantage=AdvantageConfig(kind="grpo"))
    assert method(grpo) == "grpo advantages on independent samples (preset grpo)"
    mixed = TrainConfig(search=SearchConfig(method="tree-grpo"))
    assert method(mixed) == "ib-tpo advantages on tree-grpo samples"


def test_a_resume_by_another_version_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [first] = json.loads((run / ENVIRONMENT).read_text("utf-8"))
    assert torch.__version__.startswith(first["torch"])  # PyPI's package is 2.13.0, and its torch 2.13.0+cu130
    assert first["ibtpo"] and first["python"] and first["command"]
    assert main(["train", "--resume", str(run)]) == 0
    assert "other versions" not in capsys.readouterr().out
    monkeypatch.setattr(ibtpo.environment, "package_version", lambda name: "9.9.9" if name == "torch" else first[name])
    assert main(["train", "--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"continues with other versions: torch {first['torch']} -> 9.9.9" in out
    assert [entry["torch"] for entry in json.loads((run / ENVIRONMENT).read_text("utf-8"))][-1] == "9.9.9"


def test_the_commit_is_that_of_the_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository around an installed package says nothing about the package."""

    def git(folder: Path, *arguments: str) -> str:
        raise ibtpo.environment.subprocess.CalledProcessError(1, "git")

    monkeypatch.setattr(ibtpo.environment, "_git", git)
    assert ibtpo.environment.environment()["commit"] is None
    monkeypatch.setattr(ibtpo.environment, "_git", lambda folder, *arguments: "0123abc-dirty")
    assert ibtpo.environment.environment()["commit"] == "0123abc-dirty"
