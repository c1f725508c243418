"""Borrowed weights: every way of changing them is noticed, and a bf16 shadow is refreshed where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import Allocations
from engine_helpers import assert_idle, node_on, prompt_of, randomise, same, save_checkpoint, tiny_model
from torch import nn
from transformers import PreTrainedModel

from ibtpo.config import OptimConfig
from ibtpo.optim import MasterAdamW
from ibtpo_engine import (
    CheckpointError,
    Engine,
    LoRA,
    Model,
    Node,
    Sampling,
    Shadow,
    StaleWeights,
    Tree,
    borrow,
    load_model,
)
from ibtpo_engine.weights import SAMPLES, WeightWatch

PROMPT = prompt_of(70)
GREEDY = Sampling(max_tokens=30, temperature=0)


def grown(model: Model | Shadow) -> list[Node]:
    """What a new engine samples from the model."""
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(PROMPT) as tree:
        return engine.extend(tree.root.fork(2), GREEDY)


# ---- old keys, new weights ------------------------------------------------------------------------------------


def test_keys_and_values_of_old_weights_are_never_read() -> None:
    """Neither a tree's own nor those in the index: all that follows equals a fresh engine on the new weights."""
    model = tiny_model()
    engine = Engine(model, kv_tokens=4096)
    tree = engine.tree(PROMPT)
    old = engine.extend(tree.root.fork(2), Sampling(max_tokens=20))
    before = [(node.tokens.copy(), node.logprob.copy()) for node in old]
    engine.tree(prompt_of(40, seed=1)).close()
    with engine.tree(prompt_of(64, seed=2)) as closed:
        engine.extend(closed.root.fork(), Sampling(max_tokens=5))
    assert engine.cache.index.num_entries > 4, "there is something to be found"
    randomise(model, seed=77)
    engine.weights_changed()
    reused = engine.stats()["reused"]
    new = engine.extend([*old[0].fork(at=9), *old[1].fork(), *tree.root.fork()], replace(GREEDY, max_tokens=40))
    with engine.tree(prompt_of(64, seed=2)) as again:
        new += engine.extend(again.root.fork(), GREEDY)
    assert engine.stats()["reused"] == reused == 0, "nothing of the old weights was found"
    fresh = tiny_model(seed=77)
    for node in new:
        prefix = node.prefix()[: node.start].tolist()
        same([node], [node_on(fresh, prefix, replace(GREEDY, max_tokens=len(node)))])
    assert [node.version for node in new] == [1] * 4
    assert [node.version for node in [*old, old[0].parent]] == [0] * 3
    for nodes, (tokens, logprob) in zip([[old[0].parent, old[0]], [old[1]]], before, strict=True):
        assert np.array_equal(np.concatenate([node.tokens for node in nodes]), tokens)
        assert np.array_equal(np.concatenate([node.logprob for node in nodes]), logprob)
    assert set(tree.export().version.tolist()) == {0, 1}


def _in_place(model: Model) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)


def _optimizer(model: Model) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.model.norm.weight.sum().backward()
    optimizer.step()


def _load(model: Model) -> None:
    model.load_state_dict(tiny_model(seed=5).state_dict())


def _replace(model: Model) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(24))


@pytest.mark.parametrize("change", [_in_place, _optimizer, _load, _replace])
def test_changed_weights_nobody_told_of_are_an_error(change: Callable[[Model], None]) -> None:
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024)
    tree = engine.tree(PROMPT)
    engine.extend(tree.root.fork(), GREEDY)
    change(model)
    pending = tree.root.fork()
    with pytest.raises(StaleWeights, match=r"call engine\.weights_changed\(\)"):
        engine.extend(pending, GREEDY)
    with pytest.raises(StaleWeights, match=r"call engine\.weights_changed\(\)"):
        list(engine.run(lambda tree: iter([]), [PROMPT], GREEDY))
    engine.weights_changed()
    [node] = engine.extend(pending, GREEDY)
    same([node], [node_on(model, PROMPT, GREEDY)])


def test_weights_changed_between_two_trees_of_a_run_are_an_error_too() -> None:
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024, max_branches=2)

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork()

    run = engine.run(search, [prompt_of(9, seed=i) for i in range(6)], Sampling(max_tokens=45, stop_tokens=(2,)))
    next(run)
    _in_place(model)
    with pytest.raises(StaleWeights):
        next(run)
    engine.weights_changed()
    assert_idle(engine)


def test_weights_may_change_while_a_run_goes_on_if_the_engine_is_told() -> None:
    """What is under way keeps its tokens and goes on under the new weights, on keys and values of the new ones."""
    model = tiny_model()
    engine = Engine(model, kv_tokens=2048, max_branches=2)

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork()

    sampling = Sampling(max_tokens=40, temperature=0, stop_tokens=(2,))
    trees = []
    for _, tree in engine.run(search, [prompt_of(9, seed=i) for i in range(4)], sampling):
        if not trees:
            _in_place(model)
            engine.weights_changed()
        trees.append(tree)
    assert sorted({leaf.version for tree in trees for leaf in tree.leaves()}) == [0, 1]
    last = trees[-1].leaves()[0]
    same([last], [node_on(model, trees[-1].root.tokens.tolist(), sampling)])
    assert_idle(engine)


def test_weights_gone_bad_are_an_error_that_leaves_the_engine_usable() -> None:
    """NaN logits, as after a diverged update."""
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024)
    tree = engine.tree(PROMPT)
    saved = model.model.norm.weight.clone()
    for _ in range(2):
        model.model.norm.weight.fill_(float("nan"))
        engine.weights_changed()
        with pytest.raises(ValueError, match="NaN"):
            engine.extend(tree.root.fork(3), GREEDY)
        engine.check_integrity()
        assert tree.nodes() == [tree.root]
        model.model.norm.weight.copy_(saved)
        engine.weights_changed()
        same(engine.extend(tree.root.fork(), GREEDY), [node_on(model, PROMPT, GREEDY)])
        tree.root.children[0].drop()
    tree.close()
    assert_idle(engine)


# ---- what no version counter sees ----------------------------------------------------------------------------


def _data_mul(model: Model) -> None:
    model.model.norm.weight.data.mul_(1.5)


def _every_data_add(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data.add_(1e-3)


def _numpy(model: Model) -> None:
    model.model.layers[1].mlp.up_proj.weight.detach().numpy()[:] *= 2


def _to_nan(model: Model) -> None:
    model.model.norm.weight.data.fill_(float("nan"))


@pytest.mark.parametrize("change", [_data_mul, _every_data_add, _numpy, _to_nan])
def test_a_change_that_no_version_counter_sees_is_an_error(change: Callable[[Model], None]) -> None:
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024)
    tree = engine.tree(PROMPT)
    engine.extend(tree.root.fork(), GREEDY)
    versions = [parameter._version for parameter in model.parameters()]
    change(model)
    assert versions == [parameter._version for parameter in model.parameters()], "it was counted after all"
    with pytest.raises(StaleWeights, match=r"call engine\.weights_changed\(\)"):
        engine.extend(tree.root.fork(), GREEDY)
    randomise(model, 3)
    engine.weights_changed()
    same(engine.extend(tree.root.fork(2), GREEDY), grown(model))


def _another_parameter(model: Model) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def _another_layer(model: Model) -> None:
    model.model.layers[1] = deepcopy(model.model.layers[1])


def _one_layer_less(model: Model) -> None:
    del model.model.layers[1]


def _one_parameter_more(model: Model) -> None:
    model.model.layers[1].mlp.extra = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("change", [_another_parameter, _another_layer, _one_layer_less, _one_parameter_more])
def test_parameters_exchanged_added_or_removed_are_noticed(change: Callable[[Model], None]) -> None:
    model = tiny_model()
    watch = WeightWatch(model)
    assert watch.is_current()
    change(model)
    assert not watch.is_current()
    watch.renew()
    assert watch.is_current()


def _hook(model: Model) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 2)


def _hook_ahead(model: Model) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, given: given)


@pytest.mark.parametrize("change", [_hook, _hook_ahead])
def test_hooks_are_noticed_and_run_once_they_are_announced(change: Callable[[Model], None]) -> None:
    """The native decoder would not call them."""
    model, same_model = tiny_model(), tiny_model()
    engine = Engine(model, kv_tokens=1024)
    tree = engine.tree(PROMPT)
    change(model)
    with pytest.raises(StaleWeights, match="hooks added"):
        engine.extend(tree.root.fork(), GREEDY)
    engine.weights_changed()
    change(same_model)
    same(engine.extend(tree.root.fork(), GREEDY), grown(same_model)[:1])


def test_another_type_of_the_weights_needs_another_engine() -> None:
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="pool is torch.float32; make a new Engine"):
        engine.weights_changed()


def test_the_model_of_an_engine_cannot_be_exchanged() -> None:
    engine = Engine(tiny_model(), kv_tokens=1024)
    with pytest.raises(AttributeError):
        engine.model = tiny_model()


def test_a_model_of_transformers_is_borrowed_and_never_taken_as_it_is(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "qwen2")
    with pytest.raises(TypeError, match=r"Qwen2ForCausalLM is not an ibtpo_engine.Model; call load_model.*borrow"):
        Engine(theirs, kv_tokens=1024)  # type: ignore[arg-type]
    engine = Engine(borrow(theirs), kv_tokens=1024)
    same(grown(engine.model), grown(load_model(tmp_path)))
    randomise(theirs, 5)
    with pytest.raises(StaleWeights):
        engine.extend(engine.tree(PROMPT).root.fork(), GREEDY)


def test_what_is_frozen_stays_frozen_when_it_is_borrowed(tmp_path: Path) -> None:
    """A trainer that freezes a part and then lends the whole finds it as it was, gradients asked for or not."""
    theirs = save_checkpoint(tmp_path, "llama")
    theirs.requires_grad_(False)
    trained = [parameter.requires_grad_() for parameter in theirs.model.layers[1].parameters()]
    ours = dict(borrow(theirs).named_parameters())
    for name, parameter in theirs.named_parameters():
        assert ours.pop(name) is parameter
        assert parameter.requires_grad == any(parameter is one for one in trained)
    assert not ours


def _with_a_wide_norm(model: PreTrainedModel) -> nn.Module:
    model.bfloat16().model.norm.float()
    return model


def _offloaded(model: PreTrainedModel) -> nn.Module:
    model.model.norm.to("meta")
    return model


def _with_a_head_of_its_own(model: PreTrainedModel) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def _with_a_value_head(model: PreTrainedModel) -> nn.Module:
    model.add_module("v_head", nn.Linear(48, 1))
    return model


def _with_a_tensor_of_a_kind(model: PreTrainedModel) -> nn.Module:
    """As DTensor is, or a quantized weight: not in memory what its shape says."""
    model.model.layers[1].mlp.up_proj.weight.__class__ = type("DTensor", (nn.Parameter,), {})
    return model


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (torch.compile, ("OptimizedModule is not supported", "keep_torch_compile=False")),
        (nn.DataParallel, ("DataParallel is not supported", "compiled, wrapped or sharded")),
        (_with_a_wide_norm, ("model.norm.weight is a Parameter [48] of torch.float32", "bfloat16 in memory on cpu")),
        (_with_a_head_of_its_own, ("lm_head.weight is unexpected", "config.tie_word_embeddings")),
        (_with_a_value_head, ("v_head.bias is unexpected", "heads of your own")),
        (_with_a_tensor_of_a_kind, ("model.layers.1.mlp.up_proj.weight is a DTensor",)),
        (_offloaded, ("model.norm.weight is a Parameter [48]", "on meta", "in memory")),
    ],
    ids=["compiled", "wrapped", "types", "untied", "value head", "split", "offloaded"],
)
def test_a_model_that_cannot_be_borrowed_is_refused(
    tmp_path: Path, change: Callable[[PreTrainedModel], nn.Module], parts: tuple[str, ...]
) -> None:
    changed = change(save_checkpoint(tmp_path, "qwen2", tie_word_embeddings=True))
    with pytest.raises(CheckpointError) as error:
        borrow(changed)  # type: ignore[arg-type]
    for part in ("borrow: ", *parts):
        assert part in str(error.value)


def test_a_model_compiled_in_place_is_borrowed(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "qwen2")
    theirs.compile()
    assert borrow(theirs).head is theirs.lm_head.weight


def test_every_parameter_is_sampled_whatever_its_strides() -> None:
    """Scaling any one of them unseen by its counter is noticed, also where it is transposed in memory."""
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    watch = WeightWatch(model)
    assert watch.is_current()
    count = 0
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
        assert not watch.is_current()
        watch.renew()
        assert watch.is_current()
        count += 1
    assert count == len(list(model.parameters())) > 20


def test_weights_that_are_nan_equal_themselves() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(float("nan"))
    assert WeightWatch(model).is_current()


def test_parameters_made_in_inference_mode_are_watched_too() -> None:
    with torch.inference_mode():
        model = tiny_model()
    watch = WeightWatch(model)
    assert watch.is_current()
    with torch.inference_mode():
        model.model.norm.weight.mul_(2.0)
    assert not watch.is_current()


def test_the_samples_are_few_and_views() -> None:
    """The cost does not grow with the model's width, and nothing is kept of it but these bits."""
    model = tiny_model(hidden=400)
    watch = WeightWatch(model)
    parameters = list(model.parameters())
    for sample, parameter in zip(watch._samples, parameters, strict=True):
        assert 1 <= len(sample) <= SAMPLES
        assert sample.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert watch._bits.numel() <= 4 * SAMPLES * len(parameters)


# ---- masters and shadows -------------------------------------------------------------------------------------


def addresses(model: Model) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_a_shadow_costs_its_own_bytes_once_and_a_refresh_nothing() -> None:
    masters = tiny_model(hidden=96)
    with Allocations() as made:
        shadow = Shadow(masters)
    halves = sum(2 * parameter.numel() for parameter in masters.parameters())
    assert sum(parameter.nbytes for parameter in shadow.model.parameters()) == halves
    assert sum(made.sizes) == halves
    before = addresses(shadow.model)
    randomise(masters, 5)
    with Allocations() as made:
        shadow.refresh()
    assert made.sizes == []
    assert addresses(shadow.model) == before
    for master, copy in zip(masters.parameters(), shadow.model.parameters(), strict=True):
        assert torch.equal(copy, master.bfloat16())
        assert not copy.requires_grad


def test_an_engine_on_a_shadow_samples_from_the_rounded_masters_of_the_last_update() -> None:
    masters = tiny_model()
    shadow = Shadow(masters)
    engine = Engine(shadow, kv_tokens=1024)
    before = addresses(shadow.model)
    seen = []
    for seed in (1, 2):
        randomise(masters, seed)
        with pytest.raises(StaleWeights), engine.tree(PROMPT, key=0) as tree:
            engine.extend(tree.root.fork(), GREEDY)
        engine.weights_changed()
        with engine.tree(PROMPT, key=0) as tree:
            nodes = engine.extend(tree.root.fork(2), GREEDY)
        expected = tiny_model(seed).bfloat16()
        same(nodes, grown(expected))
        seen.append(nodes[0].tokens.tolist())
    assert addresses(shadow.model) == before
    assert seen[0] != seen[1]
    assert engine.cache.pool.keys.dtype == torch.bfloat16


def test_a_shadow_of_a_model_with_adapters_follows_both() -> None:
    masters = tiny_model()
    masters.add_adapters(LoRA(rank=2))
    randomise(masters, 4)
    shadow = Shadow(masters)
    randomise(masters, 6)
    shadow.refresh()
    assert shadow.model.adapters is masters.adapters is not None
    pairs = zip(masters.named_parameters(), shadow.model.named_parameters(), strict=True)
    for (name, master), (same_name, copy) in pairs:
        assert name == same_name
        assert torch.equal(copy, master.bfloat16())


def test_an_engine_on_a_shadow_is_told_what_becomes_of_the_adapters_of_the_masters() -> None:
    """Switched off on the masters they are off in the copy: a reference that still had them would be the policy."""
    masters = tiny_model()
    masters.add_adapters(LoRA(rank=2))
    randomise(masters, 4)
    shadow = Shadow(masters)
    engine = Engine(shadow, kv_tokens=1024)

    def now() -> list[Node]:
        engine.weights_changed()
        with engine.tree(PROMPT) as tree:
            return engine.extend(tree.root.fork(2), GREEDY)

    assert shadow.model.adapters is not None
    with shadow.model.adapters_off():
        base = grown(shadow.model)
    with masters.adapters_off():
        same(now(), base)
    adapted = now()
    same(adapted, grown(Shadow(masters)))
    assert masters.adapters is not None
    masters.adapters.config = replace(masters.adapters.config, alpha=1.0)
    weaker = now()
    same(weaker, grown(Shadow(masters)))
    assert len({nodes[0].logprob_raw.tobytes() for nodes in (base, adapted, weaker)}) == 3


def test_a_shadow_of_masters_that_were_rebuilt_is_refused() -> None:
    masters = tiny_model()
    shadow = Shadow(masters)
    masters.add_adapters(LoRA(rank=2))
    with pytest.raises(ValueError, match=r"lora_A.* was added to the masters.*make a new Shadow"):
        shadow.refresh()
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        Shadow(masters, torch.int8)


def test_a_bf16_policy_with_masters_in_the_optimizer_is_updated_where_it_lies() -> None:
    """The other way round: the model trained is the bf16 one, and an engine borrows it without a copy."""
    model = tiny_model(dtype=torch.bfloat16).requires_grad_(True)
    engine = Engine(model, kv_tokens=1024)
    optimizer = MasterAdamW(model, OptimConfig(lr=0.1, warmup_steps=0))
    before = addresses(model)
    old = [parameter.detach().clone() for parameter in model.parameters()]
    tokens = torch.tensor(PROMPT)
    n = len(tokens)
    hidden = model.packed(tokens, torch.arange(n), torch.full((n,), n, dtype=torch.int32))
    hidden.float().pow(3).sum().backward()
    optimizer.step()
    assert addresses(model) == before
    assert sum(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True)) > 15
    with pytest.raises(StaleWeights), engine.tree(PROMPT) as tree:
        engine.extend(tree.root.fork(), GREEDY)
    engine.weights_changed()
    with engine.tree(PROMPT, key=0) as tree:
        nodes = engine.extend(tree.root.fork(2), GREEDY)
    same(nodes, grown(model))
