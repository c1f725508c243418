"""Training adapters: the base never moves, the KL reference is the model without them, checkpoints are PEFT's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from safetensors.torch import load_file
from test_train import TINY_MODEL, _last, _rows, _run, _signal_after_step, _steps, _untimed
from test_update import _config, _flat, _model, _trees, _updater

from ibtpo.checkpoints import CHECKSUMS, checkpoints, damage
from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, LoRAConfig, LossConfig
from ibtpo.model_card import CARD
from ibtpo.policy import load_policy
from ibtpo.run_format import CONFIG
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
    card = (_last(tmp_path / "second") / CARD).read_text()
    assert "library_name: peft" in card and f"| base model | {base.resolve()} |" in card
    assert f"| adapters it began with | {_last(tmp_path / 'first')} |" in card


@pytest.fixture(scope="module")
def lora_run(adder: tuple[list[object], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters that is over; whoever changes it takes a copy."""
    arguments, base = adder
    run = tmp_path_factory.mktemp("lora") / "run"
    assert _run("--model", base, *arguments, *LORA, "--sampled-tokens", "100", "--out", run) == 0
    return run


@pytest.mark.parametrize("named", ["nowhere", None, ""])
def test_an_adapter_whose_base_is_gone(lora_run: Path, tmp_path: Path, named: str | None) -> None:
    """Outside of a run the adapter alone can say where its base is."""
    folder = shutil.copytree(_last(lora_run), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: base_model_name_or_path = .*correct it"):
        load_policy(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def moved(lora_run: Path, adder: tuple[list[object], Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """(a run of adapters, where its configuration and its adapters say the base is, where it lies now)."""
    run, before, after = shutil.copytree(lora_run, tmp_path / "run"), tmp_path / "before", tmp_path / "after"
    shutil.copytree(adder[1], before)
    config = (run / CONFIG).read_text().replace(str(adder[1]), str(before))
    (run / CONFIG).write_text(config.replace("sampled_tokens: 100", "sampled_tokens: 200"))
    for checkpoint in checkpoints(run):  # as if the run had been made with the base there
        path = checkpoint.path / "adapter_config.json"
        path.write_text(path.read_text().replace(str(adder[1]), str(before)))
        sums = json.loads((checkpoint.path / CHECKSUMS).read_text())
        sums[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        (checkpoint.path / CHECKSUMS).write_text(json.dumps(sums))
        assert damage(checkpoint) is None
    return run, before, before.rename(after)


def test_a_base_that_moved_is_named_once(moved: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """By --model of the resume; the run remembers it, and its older checkpoints are found on it too."""
    run, before, after = moved
    for command in (["train", "--resume", run], ["eval", "--model", run, "--eval.prompts", "2"]):
        assert main([*map(str, command)]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert f"their base model is not there: {before}. Give its new folder by" in message
        assert f"--resume {run} --model FOLDER, or in the field model of {run}/config.yaml" in message
    assert _run("--resume", run, "--model", after) == 0
    assert f"model {before} -> {after}" in " ".join(capsys.readouterr().out.split())
    assert sum(row["tokens_sampled"] for row in _steps(run)) >= 200
    for checkpoint in checkpoints(run):
        assert damage(checkpoint) is None
        policy = load_policy(checkpoint.path, dtype=torch.float32, device=torch.device("cpu"))
        assert policy.base == str(after)
    assert _last(run).parent == run / "checkpoints"
    assert json.loads((_last(run) / "adapter_config.json").read_text())["base_model_name_or_path"] == str(after)
    assert main(["eval", "--model", str(run), "--eval.prompts", "2", "--out", str(run.parent / "eval")]) == 0


def test_a_base_that_moved_may_be_named_in_the_configuration(moved: tuple[Path, Path, Path]) -> None:
    run, before, after = moved
    (run / CONFIG).write_text((run / CONFIG).read_text().replace(str(before), str(after)))
    assert main(["eval", "--model", str(run), "--eval.prompts", "2"]) == 0
    assert _run("--resume", run) == 0


def test_a_model_that_did_not_move_cannot_be_exchanged(
    lora_run: Path, adder: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = shutil.copytree(lora_run, tmp_path / "run"), shutil.copytree(adder[1], tmp_path / "other")
    assert _run("--resume", run, "--model", other) == 2
    assert f"resume: model cannot change from {adder[1]} to {other}" in " ".join(capsys.readouterr().err.split())
    (run / CONFIG).write_text((run / CONFIG).read_text().replace(str(adder[1]), str(tmp_path / "gone")))
    assert _run("--resume", run, "--model", run) == 2, "its own checkpoint is not what the run began with"
    assert "model cannot change" in " ".join(capsys.readouterr().err.split())


def test_a_run_says_what_it_needs_the_model_for_that_is_gone(
    adder: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights trained: it is the reference alone, without which the run goes on."""
    arguments, base = adder
    model, run = shutil.copytree(base, tmp_path / "model"), tmp_path / "run"
    short = [*arguments, "--sampled-tokens", "60"]
    assert _run("--model", model, *short, "--loss.kl-coef", "0.1", "--out", run) == 0
    model.rename(tmp_path / "elsewhere")
    longer = ["--resume", run, "--sampled-tokens", "120"]
    assert _run(*longer) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{model}, which {run} began with, is not there, and the run needs it as the reference policy" in message
    assert "--model FOLDER, or in the field model of" in message
    assert "--loss.kl-coef 0 --advantage.pi-ref sampling" in message
    assert _run(*longer, "--model", tmp_path / "elsewhere") == 0
    (tmp_path / "elsewhere").rename(model)
    assert _run("--resume", run, "--sampled-tokens", "180", "--loss.kl-coef", "0") == 0


def test_parity_of_adapters_is_refused_before_the_folder_is_made(
    lora_run: Path, adder: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, base = adder
    bitwise = [*arguments, "--parity", "bitwise", "--out", tmp_path / "run"]
    for model, named in (
        (["--model", base, "--lora.rank", "4"], "lora.rank: 4 trains adapters"),
        (["--model", _last(lora_run)], "model: it is an adapter"),
        (["--model", lora_run], "not LoRALinear"),
    ):
        assert _run(*model, *bitwise) == 2
        assert named in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()


def test_what_does_not_go_together_is_refused(
    adder: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, base = adder
    assert _run("--lora.rank", "4", "--out", tmp_path / "built-in") == 2
    assert "lora.rank: the built-in policy has no adapters" in " ".join(capsys.readouterr().err.split())
    assert _run("--model", base, *arguments, *LORA, "--out", tmp_path / "run") == 0
    other = ["--model", _last(tmp_path / "run"), *arguments, "--lora.rank", "8"]
    assert _run(*other, "--out", tmp_path / "other") == 2
    assert "lora.rank" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"lora\.rank"):
        LoRAConfig(rank=-1)
