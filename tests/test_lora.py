"""Adapters: the same as merged weights, in training and in sampling; off, the model they started from; PEFT's files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import path_logits, prompt_of, randomise, same, save_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

from ibtpo_engine import (
    CheckpointError,
    Engine,
    LoRA,
    Model,
    Node,
    Sampling,
    StaleWeights,
    load_adapter,
    load_model,
    save_adapter,
    save_model,
)
from ibtpo_engine.adapter_folder import is_adapter_folder
from ibtpo_engine.lora import TARGETS, LoRALinear, is_adapter

PROMPT = prompt_of(40)
SAMPLING = Sampling(max_tokens=30, temperature=0.9, top_p=0.95)


def adapted(dtype: torch.dtype = torch.float32, **fields: object) -> Model:
    """A tiny model whose adapters are far from zero."""
    model = tiny_model(dtype=dtype)
    model.add_adapters(LoRA(**({"rank": 3, "alpha": 5.0} | fields)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def merged(model: Model) -> Model:
    """A model without adapters whose weights hold them: W + alpha / rank B A."""
    plain = tiny_model(dtype=model.dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not is_adapter(name)}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] += 5.0 / 3 * module.lora_B.weight.detach() @ module.lora_A.weight.detach()
            count += 1
    assert count > 0
    plain.load_state_dict(state)
    return plain


def siblings(engine: Engine) -> list[Node]:
    with engine.tree(PROMPT, key=0) as tree:
        return engine.extend(tree.root.fork(3), SAMPLING)


def grown(model: Model) -> list[Node]:
    """Siblings, the first of them forked."""
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(PROMPT, key=0) as tree:
        first, *rest = engine.extend(tree.root.fork(3), SAMPLING)
        return [first, *rest, *engine.extend(first.fork(2, at=9), SAMPLING)]


def test_the_model_is_the_same_until_b_moves_and_only_adapters_are_trained() -> None:
    model, plain = tiny_model(), tiny_model()
    before = dict(model.named_parameters())
    model.add_adapters(LoRA(rank=4))
    assert torch.equal(path_logits(model, PROMPT), path_logits(plain, PROMPT))
    names = dict(model.named_parameters())
    assert all(names[name] is parameter for name, parameter in before.items()), "identity and names are kept"
    assert {name for name, p in names.items() if p.requires_grad} == names.keys() - before.keys()
    assert len(names) - len(before) == 2 * 2 * len(TARGETS)
    with pytest.raises(ValueError, match="adapters already"):
        model.add_adapters(LoRA())


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)], ids=len)
def test_logits_equal_those_of_merged_weights(targets: tuple[str, ...]) -> None:
    """float64, so that equal means to 1e-12."""
    model = adapted(torch.float64, targets=targets)
    logits = path_logits(model, PROMPT)
    assert (logits - path_logits(merged(model), PROMPT)).abs().max() < 1e-12
    assert (logits - path_logits(tiny_model(dtype=torch.float64), PROMPT)).abs().max() > 0.1


def test_gradients_are_those_through_the_merged_weights() -> None:
    """dA = s B^T dW and dB = s dW A^T, float64, every adapter; frozen weights get none."""
    model = adapted(torch.float64)
    plain = merged(model).requires_grad_(True)
    tokens, n = torch.tensor(PROMPT), len(PROMPT)
    end = torch.full((n,), n, dtype=torch.int32)
    for one in (model, plain):
        (one.packed(tokens, torch.arange(n), end) @ one.head.T).log_softmax(-1)[:, 7].sum().backward()
    dense = {name: p.grad for name, p in plain.named_parameters()}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b, w = module.lora_A.weight, module.lora_B.weight, dense[f"{name}.weight"]
            torch.testing.assert_close(a.grad, 5.0 / 3 * b.detach().T @ w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(b.grad, 5.0 / 3 * w @ a.detach().T, rtol=1e-9, atol=1e-11)
            assert a.grad.abs().max() > 1e-4
            assert module.weight.grad is None
            count += 1
    assert count == 2 * len(TARGETS)


def test_an_engine_samples_with_the_adapters_like_one_on_merged_weights() -> None:
    """float64: the same tokens, log-probs within float32's rounding of what is recorded."""
    model = adapted(torch.float64)
    ours = grown(model)
    same(ours, grown(merged(model)), atol=1e-6)
    assert ours[0].tokens.tolist() != grown(tiny_model(dtype=torch.float64))[0].tokens.tolist()


def test_a_small_fp32_model_with_adapters_is_left_to_the_module_path() -> None:
    """The native step knows no adapters."""
    model = adapted()
    assert not Engine(model, kv_tokens=64).scheduler.runner.is_native
    same(grown(model), grown(merged(model)), atol=1e-4)


def test_off_the_model_is_its_base_bit_by_bit_and_an_engine_must_be_told() -> None:
    model = adapted()
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(PROMPT, key=0) as tree:
        engine.extend(tree.root.fork(), SAMPLING)
        with model.adapters_off():
            assert torch.equal(path_logits(model, PROMPT), path_logits(tiny_model(), PROMPT))
            with pytest.raises(StaleWeights, match="adapters switched"):
                engine.extend(tree.root.fork(), SAMPLING)
            engine.weights_changed()
            with model.adapters_off():  # nests
                off = siblings(engine)
        with pytest.raises(StaleWeights):
            engine.extend(tree.root.fork(), SAMPLING)
        engine.weights_changed()
    same(off, siblings(Engine(tiny_model(), kv_tokens=1024)), atol=1e-4)
    with pytest.raises(RuntimeError, match="within"), model.adapters_off():
        raise RuntimeError("within")
    assert model.adapters is not None
    assert model.adapters.on
    with tiny_model().adapters_off():
        pass


def test_another_weight_of_the_adapters_is_seen() -> None:
    model = adapted()
    engine = Engine(model, kv_tokens=1024)
    before = siblings(engine)
    assert model.adapters is not None
    model.adapters.config = replace(model.adapters.config, alpha=2 * model.adapters.config.alpha)
    with pytest.raises(StaleWeights):
        siblings(engine)
    engine.weights_changed()
    after = siblings(engine)
    same(after, siblings(Engine(model, kv_tokens=1024)), atol=1e-4)
    assert not np.array_equal(before[0].logprob, after[0].logprob)


def test_an_update_of_the_adapters_is_seen() -> None:
    model = adapted()
    engine = Engine(model, kv_tokens=1024)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with engine.tree(PROMPT, key=0) as tree:
        before = engine.extend(tree.root.fork(3), SAMPLING)
        path = torch.tensor(PROMPT)
        end = torch.full((40,), 40, dtype=torch.int32)
        model.packed(path, torch.arange(40), end).pow(3).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with pytest.raises(StaleWeights):
            engine.extend(tree.root.fork(), SAMPLING)
        engine.weights_changed()
    after = siblings(engine)
    same(after, siblings(Engine(model, kv_tokens=1024)), atol=1e-4)
    assert not np.array_equal(before[0].logprob, after[0].logprob)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"targets": ("lm_head",)}, "lm_head"),
        ({"targets": ()}, "targets"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
    ],
)
def test_bad_configurations_name_the_field(fields: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        LoRA(**fields)  # type: ignore[arg-type]


# ---- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "base", "qwen3", head_dim=24, tie_word_embeddings=True)
    return tmp_path / "base"


def with_adapter(base: Path, folder: Path, targets: tuple[str, ...] = TARGETS) -> Model:
    model = load_model(base)
    model.add_adapters(LoRA(rank=3, alpha=5.0, targets=targets))
    randomised = [p for p in model.parameters() if p.requires_grad]
    randomise(torch.nn.ParameterList(randomised), 2, scale=0.2)
    save_adapter(model, folder, base=str(base))
    return model


def test_what_we_save_we_load_and_saving_a_whole_model_is_refused(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, tmp_path / "adapter")
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert again.adapters is not None
    assert again.adapters.config == LoRA(rank=3, alpha=5.0)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    half = load_model(base, dtype=torch.bfloat16)
    load_adapter(half, tmp_path / "adapter")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="save_adapter"):
        save_model(model, None, tmp_path / "whole")
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(load_model(base), tmp_path / "other", base="x")


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "up_proj")], ids=len)
def test_peft_loads_what_we_save_and_we_what_it_saves(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Logits through its own adapter layers, both ways."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours = with_adapter(base, tmp_path / "ours", targets)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([PROMPT])).logits[0]
        with theirs.disable_adapter():
            off = theirs(torch.tensor([PROMPT])).logits[0]
    assert (path_logits(ours, PROMPT) - wanted).abs().max() < 1e-4
    with ours.adapters_off():
        assert (path_logits(ours, PROMPT) - off).abs().max() < 1e-4
    assert (wanted - off).abs().max() > 0.05
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(base)
    load_adapter(back, tmp_path / "theirs")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"target_modules": "all-linear"}, TARGETS),  # stored as whole paths in a model this small
        ({"target_modules": r".*\.(q|v)_proj"}, ("q_proj", "v_proj")),
        ({"target_modules": ["mlp.up_proj", "self_attn.q_proj"]}, ("q_proj", "up_proj")),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, tuple(t for t in TARGETS if t != "o_proj")),
        ({"target_modules": ["o_proj"], "init_lora_weights": "orthogonal", "lora_dropout": 0.5}, ("o_proj",)),
        ({"target_modules": ["k_proj"], "use_rslora": True}, ("k_proj",)),
    ],
    ids=["all-linear", "pattern", "paths", "all but one", "orthogonal", "rslora"],
)
def test_adapters_that_peft_makes_run_alike(
    base: Path, tmp_path: Path, settings: dict[str, Any], targets: tuple[str, ...]
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=12, **settings)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    randomise(torch.nn.ParameterList([p for p in theirs.parameters() if p.requires_grad]), 3, scale=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(base)
    load_adapter(ours, tmp_path / "theirs")
    assert ours.adapters is not None and ours.adapters.config.targets == targets
    with torch.no_grad():
        wanted = theirs(torch.tensor([PROMPT])).logits[0]
    assert (path_logits(ours, PROMPT) - wanted).abs().max() < 1e-4


def test_a_config_beside_an_adapter_makes_it_no_model(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with_adapter(base, folder)
    shutil.copy(base / "config.json", folder)
    assert is_adapter_folder(folder)
    shutil.copy(base / "model.safetensors", folder)  # as of a model merged into the folder of its adapter
    assert not is_adapter_folder(folder)


def test_an_adapter_in_a_pickle_is_named_and_not_opened(base: Path, tmp_path: Path) -> None:
    with_adapter(base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"not found. Found adapter_model.bin: convert it to safetensors"):
        load_adapter(load_model(base), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*q_proj"}, r"target_modules"),
        ({"target_modules": "("}, r"target_modules"),
        ({"target_modules": None}, r"target_modules"),
        ({"target_modules": []}, "targets"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*merge_and_unload"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": 0}, "rank=0"),
        ({"r": None}, "r and lora_alpha"),
        ({"r": 5}, "shape"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor"),
    ],
)
def test_adapter_folders_we_do_not_run(base: Path, tmp_path: Path, fields: dict[str, object], part: str) -> None:
    with_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=part) as error:
        load_adapter(load_model(base), tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapter_folders(base: Path, tmp_path: Path, name: str) -> None:
    with_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-9]), path.unlink):
        damage()
        with pytest.raises(CheckpointError, match=name):
            load_adapter(load_model(base), tmp_path / "adapter")


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    with_adapter(base, tmp_path / "adapter", ("q_proj",))
    deeper = tmp_path / "deeper"
    save_checkpoint(deeper, "qwen3", head_dim=24, num_hidden_layers=3, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"layers\.2.*is missing.*belongs to this model"):
        load_adapter(load_model(deeper), tmp_path / "adapter")
