"""Our one model definition against `transformers`, and its two callers against each other."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    VOCABULARY,
    expected_tokens,
    path_logits,
    prompt_of,
    randomise,
    save_checkpoint,
    tiny_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import ibtpo_kernels as K
from ibtpo_engine import Engine, LoRA, Model, ModelConfig, Sampling, initialise, load_model, load_tokenizer, save_model
from ibtpo_kernels import fastest, linear

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-head24-tied": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-head40-untied": ("qwen3", {"head_dim": 40, "tie_word_embeddings": False}),
    "qwen3-attention-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-7-to-1": ("qwen3", {"head_dim": 8, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-14-to-2-untied": (
        "qwen2",
        {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "llama-head24": ("llama", {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-head40-own": ("llama", {"head_dim": 40, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral-full-attention": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2-linear-rope": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-yarn-mscale": ("qwen3", {"head_dim": 24, "rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}),
    "llama-yarn-own-length": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.8, "truncate": False}}),
}


def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[n, V] by `transformers`."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    """Per token within fp32 rounding, past the original context where rope is stretched; the same greedy path."""
    family, fields = CASES[case]
    theirs = save_checkpoint(tmp_path, family, **fields)
    ours = load_model(tmp_path)
    prompt = prompt_of(70)
    wanted = reference_logits(theirs, prompt)
    assert wanted.std() > 0.3, "logits are too flat for the comparison to mean much"
    assert (path_logits(ours, prompt) - wanted).abs().max() < 1e-4

    engine_tokens = _greedy(Engine(ours, kv_tokens=1024), prompt, 40)
    theirs.generation_config.eos_token_id = None
    generated = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, min_new_tokens=40, pad_token_id=0
    )
    assert engine_tokens == generated[0, len(prompt) :].tolist()
    assert len(set(engine_tokens)) > 2, "a constant continuation would prove little"


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_greedy_equals_transformers_over_long_continuations(family: str, tmp_path: Path) -> None:
    """64 tokens below each of 8 prompts, decoded side by side, none at a near-tie: were the two best closer than
    the two models' logits are, either token would be right, and the test says so.
    """
    theirs = save_checkpoint(tmp_path, family, **({"head_dim": 24} if family == "qwen3" else {}))
    theirs.generation_config.eos_token_id = None
    ours = load_model(tmp_path)
    engine = Engine(ours, kv_tokens=2048)
    prompts = [prompt_of(11 + 7 * i, seed=i) for i in range(8)]
    trees = [engine.tree(prompt) for prompt in prompts]
    nodes = engine.extend([tree.root.fork()[0] for tree in trees], Sampling(temperature=0, max_tokens=64))
    for prompt, node in zip(prompts, nodes, strict=True):
        generated = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
        )[0].tolist()
        logits = reference_logits(theirs, generated)
        rounding = float((path_logits(ours, generated) - logits).abs().max())
        assert rounding < 1e-4
        top = logits[len(prompt) - 1 : -1].topk(2).values
        margin = float((top[:, 0] - top[:, 1]).min())
        assert margin > 2 * rounding, (
            f"a near-tie below the prompt of {len(prompt)} tokens: {margin}; take another seed"
        )
        assert len(node) == 64
        assert node.tokens.tolist() == generated[len(prompt) :]
    assert len({tuple(node.tokens.tolist()) for node in nodes}) == 8
    assert min(len(set(node.tokens.tolist())) for node in nodes) > 2


def _greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    with engine.tree(prompt) as tree:
        [node] = engine.extend(tree.root.fork(), Sampling(temperature=0, max_tokens=n))
        return node.tokens.tolist()


def test_sharded_and_single_files_load_the_same_parameters(tmp_path: Path) -> None:
    for folder, shard in ((tmp_path / "one", "1GB"), (tmp_path / "many", "20KB")):
        save_checkpoint(folder, "qwen3", head_dim=24, shard=shard)
    shards = list((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one, many = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("case", ["qwen3-head24-tied", "qwen3-head40-untied", "qwen2-tied", "llama3-rope"])
def test_what_we_save_transformers_loads_with_identical_logits(case: str, tmp_path: Path) -> None:
    """Also after training: the weights saved are ours, not those we loaded."""
    family, fields = CASES[case]
    theirs = save_checkpoint(tmp_path / "theirs", family, **fields)
    ours = load_model(tmp_path / "theirs")
    prompt = prompt_of(50)
    for changed in (False, True):
        if changed:
            randomise(ours, seed=9, scale=0.2)
        save_model(ours, load_tokenizer(tmp_path / "theirs"), tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        same = torch.equal(reference_logits(again, prompt), reference_logits(theirs, prompt))
        assert same is not changed
        assert (reference_logits(again, prompt) - path_logits(ours, prompt)).abs().max() < 1e-4
        reloaded = load_model(tmp_path / "ours").state_dict()
        assert all(torch.equal(reloaded[name], tensor) for name, tensor in ours.state_dict().items())
    assert load_tokenizer(tmp_path / "ours").eos_token_id == 2


def test_what_was_described_without_its_type_is_saved_with_it(tmp_path: Path) -> None:
    """`Model(ModelConfig.from_dict(...))` asks for the architecture only; `transformers` loads by the type."""
    save_checkpoint(tmp_path / "theirs", "qwen3")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del raw["model_type"]
    ours = initialise(Model(ModelConfig.from_dict(raw)), seed=1)
    save_model(ours, None, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    prompt = prompt_of(20)
    assert (reference_logits(again, prompt) - path_logits(ours, prompt)).abs().max() < 1e-4


def test_the_config_we_save_keeps_every_field_it_came_with(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "theirs", "llama", rope_parameters=LLAMA3)
    save_model(load_model(tmp_path / "theirs", dtype=torch.bfloat16), None, tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    assert ours.pop("dtype") == "bfloat16"
    assert theirs.pop("dtype") == "float32"
    assert ours == theirs


def test_bf16_weights_load_as_saved_and_run(tmp_path: Path) -> None:
    """A bf16 model's logits lie within bf16's three digits of the fp32 ones; the engine samples from it."""
    save_checkpoint(tmp_path / "fp32", "qwen3", head_dim=24)
    exact = load_model(tmp_path / "fp32")
    save_model(load_model(tmp_path / "fp32", dtype=torch.bfloat16), None, tmp_path / "bf16")
    half = load_model(tmp_path / "bf16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    widened = load_model(tmp_path / "bf16")
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor.float(), widened.state_dict()[name])
        assert torch.equal(tensor, exact.state_dict()[name].bfloat16())
    prompt = prompt_of(40)
    wanted = path_logits(exact, prompt)
    assert (path_logits(half, prompt).float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    engine = Engine(half, kv_tokens=512)
    with engine.tree(prompt) as tree:
        nodes = engine.extend(tree.root.fork(2), Sampling(max_tokens=10))
    assert [len(node) for node in nodes] == [10, 10]
    assert engine.cache.pool.keys.dtype == torch.bfloat16


@pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
def test_where_torch_is_slow_in_bf16_no_layer_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters and head included; but a layer with a hook runs as the module it is."""
    seen: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(weight.shape))
        return K.batch_invariant_linear(x, weight, bias)

    monkeypatch.setattr(linear, "_bf16_is_slow", lambda: True)
    monkeypatch.setattr(fastest, "batch_invariant_linear", counted)
    model, prompt = tiny_model(dtype=torch.bfloat16), prompt_of(40)
    layers, wanted = model.config.num_layers, path_logits(tiny_model(), prompt)
    seen.clear()
    assert (path_logits(model, prompt).float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert len(seen) == 7 * layers
    engine = Engine(model, kv_tokens=512)
    seen.clear()
    with engine.tree(prompt) as tree:
        engine.extend(tree.root.fork(), Sampling(max_tokens=2))
    assert seen.count(tuple(model.head.shape)) == 2 and len(seen) == 2 * (7 * layers + 1)

    model.add_adapters(LoRA(rank=2, alpha=4.0, targets=("q_proj", "up_proj")))
    seen.clear()
    tokens = torch.tensor(prompt)
    end = torch.full((len(prompt),), len(prompt), dtype=torch.int32)
    model.packed(tokens, torch.arange(len(prompt)), end).float().sum().backward()
    assert len(seen) == (7 + 2 * 2) * layers
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    seen.clear()
    heard: list[Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: heard.append(out))
    path_logits(model, prompt)
    assert len(heard) == 1 and len(seen) == (7 + 2 * 2) * layers - 1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3 | {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},  # Llama 3.1
        LLAMA3 | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},  # Llama 3.2
    ],
    ids=["default", "linear", "llama3.1", "llama3.2"],
)
def test_rotation_frequencies_equal_transformers(settings: dict[str, Any], head_dim: int) -> None:
    """To two roundings of fp32."""
    _compare_frequencies(settings, head_dim)


QWEN_YARN = YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("changed", "length"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"factor": 1.0}, 1.0),
        ({"factor": 2.5, "beta_fast": 40.0, "beta_slow": 0.7}, 1 + 0.1 * math.log(2.5)),
        ({"truncate": False}, 1 + 0.1 * math.log(4)),
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 3.0}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
        ({"mscale": 2.0}, 1 + 0.1 * math.log(4)),
        ({"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}, 1 + 0.1 * math.log(4)),
        ({"original_max_position_embeddings": 16}, 1 + 0.1 * math.log(4)),  # no wave is so short that it is kept
    ],
)
def test_yarn_equals_transformers(changed: dict[str, Any], length: float, head_dim: int) -> None:
    """Frequencies to two roundings of fp32; cosines and sines far past the original context to those of the angle."""
    ours, theirs = _compare_frequencies(QWEN_YARN | changed, head_dim)
    assert math.isclose(ours.config.rope.attention_factor, length, rel_tol=1e-15)
    assert math.isclose(theirs.attention_scaling, length, rel_tol=1e-15)
    pos = torch.tensor([0, 1, 17, 32_767, 100_000])
    wanted = theirs(torch.zeros(1), pos[None])
    for part, own in zip(wanted, ours.rotation(pos), strict=True):
        torch.testing.assert_close(own, part[0, :, : head_dim // 2], rtol=0, atol=2 * 100_000 * 3e-7)
        assert own.abs().max() > 0.9 * length


def _compare_frequencies(settings: dict[str, Any], head_dim: int) -> tuple[Model, LlamaRotaryEmbedding]:
    shape = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=8, head_dim=head_dim, rope_parameters=dict(settings), **shape)
    rotary = LlamaRotaryEmbedding(config)
    theirs = rotary.inv_freq
    raw = shape | {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "rope_parameters": settings}
    ours = ModelConfig.from_dict(raw).rope.inverse_frequencies(head_dim)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    if settings.get("factor", 1.0) != 1.0:
        plain = ModelConfig.from_dict(raw | {"rope_parameters": {"rope_theta": settings["rope_theta"]}})
        assert not torch.equal(ours, plain.rope.inverse_frequencies(head_dim))
    return Model(ModelConfig.from_dict(raw)), rotary


def test_old_and_new_spelling_of_rope_give_the_same_model(tmp_path: Path) -> None:
    """`rope_theta` + `rope_scaling` (before transformers 5) and `rope_parameters` (since)."""
    save_checkpoint(tmp_path, "llama", rope_parameters=LLAMA3)
    new = ModelConfig.from_folder(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    settings = raw.pop("rope_parameters")
    raw |= {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings}
    old = ModelConfig.from_dict(raw)
    assert new.rope.kind == "llama3"
    assert old.rope == new.rope


@pytest.mark.parametrize("settings", [YARN, LLAMA3])
def test_an_original_context_beside_the_settings_counts_more_than_one_in_them(settings: dict[str, Any]) -> None:
    beside = {"original_max_position_embeddings": 24}
    theirs = LlamaConfig(vocab_size=8, head_dim=32, rope_parameters=dict(settings), **beside)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")
    raw = {name: getattr(theirs, name) for name in fields} | {"architectures": ["LlamaForCausalLM"]}
    ours = ModelConfig.from_dict(raw | beside | {"rope_parameters": settings}).rope
    assert ours.original_positions == 24
    wanted = LlamaRotaryEmbedding(theirs).inv_freq
    torch.testing.assert_close(ours.inverse_frequencies(32), wanted, rtol=3e-7, atol=0)


def test_yarn_reaches_as_far_as_it_stretches(tmp_path: Path) -> None:
    """Model cards of Qwen say to add `rope_scaling` and leave `max_position_embeddings` where it is."""
    theirs = save_checkpoint(tmp_path, "qwen2", max_position_embeddings=40, rope_parameters=YARN)
    model = load_model(tmp_path)
    assert model.config.max_positions == 4 * 32
    theirs.generation_config.eos_token_id = None
    prompt = prompt_of(60)
    wanted = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=68, pad_token_id=0)[0, 60:]
    assert Engine(model, kv_tokens=1024).scheduler.runner.is_native == K.has_compiled()
    assert _greedy(Engine(model, kv_tokens=1024), prompt, 100) == wanted.tolist()
    save_model(model, None, tmp_path / "saved")
    again = ModelConfig.from_folder(tmp_path / "saved")
    assert again.rope == model.config.rope and again.rope.kind == "yarn"


def test_packed_forward_of_a_tree_equals_the_forward_of_each_path_alone() -> None:
    """float64, so that agreement is to 1e-12: nothing leaks between branches, and positions are depths."""
    model = tiny_model(dtype=torch.float64)
    engine = Engine(model, kv_tokens=2048)
    with engine.tree(prompt_of(11)) as tree:
        first, *_ = engine.extend(tree.root.fork(3), Sampling(max_tokens=25))
        engine.extend([*first.fork(2, at=7), *first.fork(1)], Sampling(max_tokens=40))
    packed = tree.export()
    with torch.no_grad():
        hidden = model.packed(
            *(torch.from_numpy(x.copy()) for x in (packed.tokens.astype(np.int64), packed.pos, packed.end))
        )
    logits = hidden @ model.head.T
    compared = 0
    for n, node in enumerate(packed.nodes):
        alone = path_logits(model, node.prefix())[node.start :]
        rows = logits[packed.first[n] : packed.first[n] + len(node)]
        assert (rows - alone).abs().max() < 1e-12
        compared += len(rows)
    assert compared == len(packed) > 100


def test_a_block_computed_again_is_on_the_backend_it_was_on() -> None:
    """In whatever thread the backward pass runs: with tensors on a GPU not in the caller's, whose choice it was."""
    model = tiny_model().requires_grad_()
    tokens, end = torch.arange(10), torch.full((10,), 10, dtype=torch.int32)
    gradients = []
    for checkpointing in (False, True):
        with K.backend("reference"):
            loss = model.packed(tokens, tokens, end, checkpointing=checkpointing).square().sum()
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(torch.autograd.grad, loss, list(model.parameters()), allow_unused=True).result()
        gradients.append([grad for grad in found if grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])  # torch's sums depend on how many threads that thread has


def test_the_engine_draws_what_one_forward_pass_over_the_path_would() -> None:
    """In float64, where the two do not differ by rounding."""
    model, sampling = tiny_model(dtype=torch.float64), Sampling(max_tokens=60, temperature=0.8, top_p=0.9)
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(prompt_of(21)) as tree:
        nodes = engine.extend(tree.root.fork(3), sampling)
    for node in nodes:
        assert np.array_equal(node.tokens, expected_tokens(model, node, sampling))


def test_initialise_is_reproducible_and_as_documented() -> None:
    config = ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    one, two, other = (initialise(Model(config), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    for name, tensor in one.items():
        if name.endswith(".bias"):
            assert not tensor.any()
        elif tensor.ndim == 1:
            assert (tensor == 1).all()
        else:
            assert abs(tensor.std() - 0.02) < 0.002
