"""Training adapters: the base never moves, the KL reference is the model without them, checkpoints are PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from safetensors.torch import load_file
from test_train import TINY_MODEL, _last, _rows, _run, _signal_after_step, _steps, _untimed
from test_update import _config, _flat, _model, _trees, _updater

from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, LoRAConfig, LossConfig
from ibtpo.policy import load_policy
from ibtpo.update import frozen_copy
from ibtpo_engine import CheckpointError, LoRA
from ibtpo_engine.lora import is_adapter

LORA = ["--lora.rank", "4", "--optim.lr", "1e-2", "--loss.kl-coef", "0.1"]


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    folder = tmp_path_factory.mktemp("adder")
    model = save_checkpoint(folder / "model", teach=40)
    data = save_additions(folder / "rows.jsonl")
    return ["--data", data, "--jsonl.grade", "exact", *TINY_MODEL, "--sampled-tokens", "600"], model


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(_last(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("config", [
    _config(loss=LossConfig(kl_coef=0.3)),
    _config(advantage=AdvantageConfig(pi_ref="reference", ib_weight=0.3)),
], ids=["KL", "pi_ref"])  # fmt: skip
def test_adapters_off_are_as_good_a_reference_as_a_frozen_copy(config: Any) -> None:
    """The same metrics and the same update, to the last bit, and another one than without the penalty."""
    ends, metrics = [], []
    for separate in (True, False):
        model = _model()
        base = frozen_copy(model)
        model.add_adapters(LoRA(rank=3, alpha=6.0), seed=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        updater = _updater(model, config, base if separate else model)
        metrics.append(updater.update(_trees(model)))
        ends.append(model)
    assert metrics[0] == metrics[1]
    assert metrics[0]["optimizer_steps"] == 1
    assert torch.equal(_flat(ends[0]), _flat(ends[1]))
    frozen = dict(_model().named_parameters())
    moved = 0
    for name, parameter in ends[0].named_parameters():
        if is_adapter(name):
            moved += 1
        else:
            assert torch.equal(parameter, frozen[name]), name
    assert moved > 20


def test_a_run_trains_the_adapter_resumes_and_is_evaluated(adder: tuple[list[object], Path], tmp_path: Path) -> None:
    arguments, base = adder
    settings = ["--model", base, *arguments, *LORA]
    before = load_file(base / "model.safetensors")
    assert _run(*settings, "--out", tmp_path / "whole") == 0
    last = _last(tmp_path / "whole")
    config = json.loads((last / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32.0, str(base.resolve()))
    assert not (last / "model.safetensors").exists()
    adapter = _adapter(tmp_path / "whole")
    assert sum(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name) == 14
    assert all(torch.equal(load_file(base / "model.safetensors")[name], tensor) for name, tensor in before.items())
    assert max(row["kl_ref_k3"] for row in _steps(tmp_path / "whole") if row["optimizer_steps"]) > 0
    with pytest.MonkeyPatch.context() as patch:
        _signal_after_step(patch, 3, 2)
        assert _run(*settings, "--out", tmp_path / "run") == 130
    assert _run("--resume", tmp_path / "run") == 0
    resumed = _adapter(tmp_path / "run")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in adapter.items())
    assert _untimed(_steps(tmp_path / "run")) == _untimed(_steps(tmp_path / "whole"))
    data = arguments[:4]
    assert main(["eval", "--model", *map(str, [tmp_path / "run", *data]), "--eval.prompts", "4"]) == 0


def test_an_adapter_is_trained_further_from_where_it_is(adder: tuple[list[object], Path], tmp_path: Path) -> None:
    """Its own start, not the base, is the reference: the first step's KL is zero."""
    arguments, base = adder
    assert _run("--model", base, *arguments, *LORA, "--out", tmp_path / "first") == 0
    second = ["--model", _last(tmp_path / "first"), *arguments, "--loss.kl-coef", "0.1", "--mini-batches", "1"]
    assert _run(*second, "--out", tmp_path / "second") == 0
    updated = [row for row in _steps(tmp_path / "second") if row["optimizer_steps"]]
    assert abs(updated[0]["kl_ref_k3"]) < 1e-6
    adapter, other = _adapter(tmp_path / "first"), _adapter(tmp_path / "second")
    assert adapter.keys() == other.keys()
    assert any(not torch.equal(adapter[name], other[name]) for name in adapter)
    assert any("eval_avg" in row for row in _rows(tmp_path / "second"))


@pytest.mark.parametrize("named", ["nowhere", None, ""])
def test_an_adapter_whose_base_is_gone(adder: tuple[list[object], Path], tmp_path: Path, named: str | None) -> None:
    arguments, base = adder
    assert _run("--model", base, *arguments, *LORA, "--out", tmp_path / "run") == 0
    path = _last(tmp_path / "run") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: base_model_name_or_path = .*correct it"):
        load_policy(path.parent, dtype=torch.float32, device=torch.device("cpu"))


def test_what_does_not_go_together_is_refused(
    adder: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, base = adder
    assert _run("--lora.rank", "4", "--out", tmp_path / "built-in") == 2
    assert "lora.rank: the built-in policy is small" in " ".join(capsys.readouterr().err.split())
    assert _run("--model", base, *arguments, *LORA, "--out", tmp_path / "run") == 0
    other = ["--model", _last(tmp_path / "run"), *arguments, "--lora.rank", "8"]
    assert _run(*other, "--out", tmp_path / "other") == 2
    assert "lora.rank" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"lora\.rank"):
        LoRAConfig(rank=-1)
