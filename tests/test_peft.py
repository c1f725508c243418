"""Models that PEFT has adapted, borrowed: its parameters and its switch, or a refusal that names what is different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import path_logits, prompt_of, randomise, same, save_checkpoint

from ibtpo_engine import CheckpointError, Engine, Node, Sampling, Shadow, StaleWeights, borrow, load_adapter, load_model
from ibtpo_engine import save_adapter as save_ours
from ibtpo_engine.lora import TARGETS
from ibtpo_engine.weights import WeightWatch

peft = pytest.importorskip("peft", reason="PEFT is not installed")

PROMPT = prompt_of(40)
GREEDY = Sampling(max_tokens=30, temperature=0)
SOME = ["q_proj", "o_proj", "down_proj"]
needs_mica = pytest.mark.skipif(
    not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"), reason="came with PEFT 0.20"
)


def with_lora(folder: Path, family: str = "qwen2", *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A PeftModel whose adapter is far from zero."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": SOME} | settings))
    model = peft.get_peft_model(save_checkpoint(folder, family).to(dtype), config)
    randomise(torch.nn.ParameterList([p for p in model.parameters() if p.requires_grad]), 1, scale=0.2)
    return model.eval()


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def greedy(engine: Engine) -> list[Node]:
    with engine.tree(PROMPT) as tree:
        return engine.extend(tree.root.fork(2), GREEDY)


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen2", torch.float32, {}),
        ("qwen2", torch.float64, {"target_modules": list(TARGETS)}),
        ("qwen3", torch.float32, {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", torch.float32, {"target_modules": r".*\.(gate|up)_proj", "lora_alpha": 7}),
        ("qwen2", torch.float32, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
        ("qwen2", torch.float32, {"lora_dropout": 0.5, "init_lora_weights": "pissa", "bias": "all"}),
    ],
    ids=["some", "all, float64", "rslora", "pattern", "all but one", "dropout, pissa, bias"],
)
def test_log_probs_and_greedy_tokens_equal_those_of_the_peft_model(
    family: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = with_lora(tmp_path, family, **settings).to(dtype)
    trained = {id(parameter): parameter.requires_grad for parameter in theirs.parameters()}
    ours = borrow(theirs)
    assert {id(parameter): parameter.requires_grad for parameter in ours.parameters()} == trained
    [node, _] = greedy(Engine(ours, kv_tokens=1024))
    theirs.generation_config.eos_token_id = None
    generated = theirs.generate(
        input_ids=torch.tensor([PROMPT]), do_sample=False, max_new_tokens=30, min_new_tokens=30, pad_token_id=0
    )
    assert node.tokens.tolist() == generated[0, 40:].tolist()
    wanted = logits_of(theirs, generated[0].tolist())
    with theirs.disable_adapter():
        assert (wanted[:40] - logits_of(theirs, PROMPT)).abs().max() > 0.05
    assert (path_logits(ours, generated[0]) - wanted).abs().max() < (1e-4 if dtype == torch.float32 else 1e-5)
    logprob = wanted.log_softmax(-1)[range(39, 69), node.tokens].numpy()
    np.testing.assert_allclose(node.logprob_raw, logprob, rtol=0, atol=1e-4)
    theirs.train()  # as TRL's trainer leaves it: dropout is never sampled with
    assert (path_logits(ours, generated[0]) - wanted).abs().max() < 1e-4


def test_an_update_is_noticed_and_sampled_with_once_it_is_announced(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    engine = Engine(borrow(theirs), kv_tokens=1024)
    before = greedy(engine)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    theirs(torch.tensor([PROMPT])).logits.pow(2).mean().backward()
    optimizer.step()
    with pytest.raises(StaleWeights, match="weights_changed"):
        greedy(engine)
    engine.weights_changed()
    after = greedy(engine)
    assert not np.array_equal(before[0].logprob_raw, after[0].logprob_raw)
    path = [*PROMPT, *after[0].tokens.tolist()]
    logprob = logits_of(theirs, path).log_softmax(-1)[range(39, 69), after[0].tokens].numpy()
    np.testing.assert_allclose(after[0].logprob_raw, logprob, rtol=0, atol=1e-4)


def test_a_packed_forward_gives_the_peft_model_its_gradients(tmp_path: Path) -> None:
    """Trees can be trained through the borrowed view: the parameters are one."""
    theirs = with_lora(tmp_path)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    tokens, n = torch.tensor(PROMPT), len(PROMPT)
    ours = borrow(theirs)
    hidden = ours.packed(tokens, torch.arange(n), torch.full((n,), n, dtype=torch.int32))
    losses = [logits.log_softmax(-1)[:, 7].sum() for logits in (hidden @ ours.head.T, theirs(tokens[None]).logits[0])]
    for own, its in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-3, atol=1e-4 * float(its.abs().max()))


def test_every_matrix_of_the_adapter_is_watched(tmp_path: Path) -> None:
    ours = borrow(with_lora(tmp_path))
    watch = WeightWatch(ours)
    for name, parameter in ours.named_parameters():
        parameter.data.mul_(1.25)
        assert not watch.is_current(), name
        watch.renew()


def test_within_disable_adapter_the_base_is_sampled_from(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    engine = Engine(borrow(theirs), kv_tokens=1024)
    on = greedy(engine)
    with theirs.disable_adapter():
        with pytest.raises(StaleWeights, match="adapters switched"):
            greedy(engine)
        engine.weights_changed()
        off = greedy(engine)
        with engine.model.adapters_off():
            same(greedy(engine), off)
    engine.weights_changed()
    same(greedy(engine), on)
    same(off, greedy(Engine(load_model(tmp_path), kv_tokens=1024)), atol=1e-4)
    with engine.model.adapters_off():
        engine.weights_changed()
        same(greedy(engine), off)
    engine.weights_changed()
    same(greedy(engine), on)
    with theirs.disable_adapter():
        late = Engine(borrow(theirs), kv_tokens=1024)
        same(greedy(late), off)
    late.weights_changed()
    same(greedy(late), on)


def test_of_several_adapters_the_active_one_is_borrowed(tmp_path: Path) -> None:
    """As TRL's trainer has it, with a second one as the reference, of other projections and another rank."""
    theirs = with_lora(tmp_path)
    theirs.add_adapter("ref", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj", "v_proj"]))
    for name, parameter in theirs.named_parameters():
        if ".ref." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for active in ("default", "ref"):
        theirs.set_adapter(active)
        model = borrow(theirs)
        assert (path_logits(model, PROMPT) - logits_of(theirs, PROMPT)).abs().max() < 1e-4
    engine = Engine(model, kv_tokens=1024)
    before = greedy(engine)
    theirs.set_adapter("default")
    for call in (greedy, Engine.weights_changed, greedy):
        with pytest.raises(StaleWeights, match=r"'ref' was merged.*another one was made.*borrow the model again"):
            call(engine)
    theirs.set_adapter("ref")
    engine.weights_changed()
    same(greedy(engine), before)


def _one_layer_off(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.down_proj.enable_adapters(False)


def _one_layer_scaled(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.down_proj.set_scale("default", 3.0)


@pytest.mark.parametrize("change", [lambda model: model.merge_adapter(), _one_layer_off, _one_layer_scaled])
def test_what_peft_would_no_longer_compute_alike_is_an_error(change: Callable[[Any], None], tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    engine = Engine(borrow(theirs), kv_tokens=1024)
    change(theirs)
    with pytest.raises(StaleWeights, match=r"'default' was merged, scaled or switched off"):
        greedy(engine)
    with pytest.raises(CheckpointError, match=r"borrow: .*'default' was merged"):
        borrow(theirs)


def test_scaled_alike_everywhere_it_is_borrowed_as_it_is(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    for module in theirs.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", 3.0)
    assert (path_logits(borrow(theirs), PROMPT) - logits_of(theirs, PROMPT)).abs().max() < 1e-4


def test_fp32_adapters_of_a_bf16_model(tmp_path: Path) -> None:
    """PEFT's default; no further from fp32 than PEFT's own, within a factor of two."""
    theirs = with_lora(tmp_path, dtype=torch.bfloat16)
    ours = borrow(theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16, torch.float32}
    assert path_logits(ours, PROMPT).dtype == torch.bfloat16
    own, its = path_logits(ours, PROMPT).float(), logits_of(theirs, PROMPT).float()
    wide = logits_of(theirs.float(), PROMPT)
    assert (own - wide).square().mean() < 4 * (its - wide).square().mean() < 0.01 * wide.square().mean()


def test_a_bf16_shadow_follows_the_switch(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    shadow = Shadow(borrow(theirs))
    with theirs.disable_adapter():
        off = path_logits(shadow.model, PROMPT)
    assert {p.dtype for p in shadow.model.parameters()} == {torch.bfloat16}
    assert (off - logits_of(theirs, PROMPT)).abs().max() > 0.05
    assert (path_logits(shadow.model, PROMPT) - logits_of(theirs, PROMPT)).abs().max() < 0.2


def test_layers_that_peft_put_into_a_plain_model(tmp_path: Path) -> None:
    """`inject_adapter_in_model`, as `model.add_adapter` of transformers does it: there is no PeftModel around."""
    model = save_checkpoint(tmp_path, "qwen2")
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=SOME, init_lora_weights=False), model)
    assert (path_logits(borrow(model), PROMPT) - logits_of(model.eval(), PROMPT)).abs().max() < 1e-4


def test_a_merged_and_unloaded_model_is_a_plain_one(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    wanted, configs = logits_of(theirs, PROMPT), theirs.peft_config
    merged = theirs.merge_and_unload()
    merged.peft_config = configs  # as PEFT 0.18 leaves them
    ours = borrow(merged)
    assert ours.adapters is None
    assert (path_logits(ours, PROMPT) - wanted).abs().max() < 1e-4


def test_a_borrowed_adapter_is_saved_and_loaded_like_any(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path / "base", use_rslora=True)
    save_ours(borrow(theirs), tmp_path / "adapter", base=str(tmp_path / "base"))
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert (path_logits(again, PROMPT) - logits_of(theirs, PROMPT)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, r"up_proj.lora_A.weight is missing.*not in every layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head has an adapter; only"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens has an adapter"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        pytest.param({"init_lora_weights": "mica"}, "MiCALinearVariant", marks=needs_mica),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_than_plain_lora_is_refused(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path, "qwen2")
    target = {"target_modules": SOME} | settings
    with pytest.raises(CheckpointError, match=f"^borrow: .*{part}.*"):
        borrow(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **target)))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (lambda: peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]), "IA3"),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
    ],
)
def test_other_methods_of_peft_are_refused(config: Callable[[], Any], part: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(save_checkpoint(tmp_path, "qwen2"), config())
    with pytest.raises(CheckpointError, match=f"borrow: PEFT's .*{part} is not supported"):
        borrow(model)


def test_two_active_adapters_are_refused(tmp_path: Path) -> None:
    theirs = with_lora(tmp_path)
    theirs.add_adapter("more", peft.LoraConfig(r=2, target_modules=SOME))
    theirs.base_model.set_adapter(["default", "more"])
    with pytest.raises(CheckpointError, match=r"2 adapters are active \['default', 'more'\]; choose one"):
        borrow(theirs)
