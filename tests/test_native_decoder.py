"""The native decoder: what it runs, that it agrees with the module, and that no branch's numbers know the batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import prompt_of, randomise, same, save_checkpoint, tiny_model

import ibtpo_kernels as K
from ibtpo_engine import Engine, Growth, Model, Node, Sampling, Tree, load_model
from ibtpo_engine import engine as engine_module
from ibtpo_engine import native as native_module
from ibtpo_engine.scheduler import ENDED_SHARE

pytestmark = pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")

CASES = {
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied-1-layer": ("qwen3", {"head_dim": 20, "tie_word_embeddings": True, "num_hidden_layers": 1}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
SAMPLING = Sampling(max_tokens=40, temperature=0.9, top_p=0.95, top_k=30, min_p=0.01, stop_tokens=(7, 9))


def is_native(engine: Engine) -> bool:
    return engine.scheduler.runner.is_native


def grow(
    model: Model, *, batch: int, prefill_tokens: int = 2048, only: int | None = None, kv_tokens: int = 160
) -> list[Node]:
    """The branches of `batch` trees of different prompts, with so many `kv_tokens` each; with `only`, of that tree."""
    engine = Engine(model, kv_tokens=batch * kv_tokens, prefill_tokens=prefill_tokens)
    keys = range(batch) if only is None else [only]
    prompts = [prompt_of(5 + 3 * i % 40, seed=i) for i in keys]
    nodes = [node for nodes in engine.generate(prompts, SAMPLING, n=2, keys=keys) for node in nodes]
    engine.check_integrity()
    return nodes


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_module(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture, with and without biases and head norms: the same tokens, log-probs within rounding."""
    family, fields = CASES[case]
    save_checkpoint(tmp_path, family, **fields)
    model = load_model(tmp_path)
    assert is_native(Engine(model, kv_tokens=64))
    ours = grow(model, batch=7)
    monkeypatch.setattr(native_module, "MOST_BYTES", 0)
    assert not is_native(Engine(model, kv_tokens=64))
    theirs = grow(model, batch=7)
    same(ours, theirs, atol=1e-4)
    assert {node.finish for node in ours} == {"stop", "length"}


def test_what_only_torch_can_run_is_left_to_it() -> None:
    def accepted(model: Model) -> bool:
        return is_native(Engine(model, kv_tokens=64))

    assert accepted(tiny_model())
    assert not accepted(tiny_model(dtype=torch.float64))
    assert not accepted(tiny_model(dtype=torch.bfloat16))
    hooked = tiny_model()
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert not accepted(hooked)
    replaced = tiny_model()
    replaced.model.layers[0].mlp.up_proj = torch.nn.Sequential(replaced.model.layers[0].mlp.up_proj)
    assert not accepted(replaced)
    strided = tiny_model()
    weight = strided.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not accepted(strided)
    with K.backend("reference"):
        assert not accepted(tiny_model())


def equal(left: list[Node], right: list[Node]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for name in ("tokens", "logprob", "logprob_raw", "entropy"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_a_branch_has_the_same_bits_alone_and_in_any_batch() -> None:
    """And on any number of threads: a step is work for three of them."""
    model = tiny_model(hidden=400)
    together = grow(model, batch=60)
    for i in (0, 17, 59):
        equal(grow(model, batch=60, only=i), together[2 * i : 2 * i + 2])
    for count in (1, 3):
        with threads(count):
            equal(grow(model, batch=60), together)


def test_two_python_threads_may_decode_at_once() -> None:
    """Each with an engine of its own: one shares its steps out, the other runs alone, and nothing is mixed up."""
    models = [tiny_model(seed, hidden=200) for seed in (0, 1)]
    alone = [grow(model, batch=40) for model in models]
    with threads(3), ThreadPoolExecutor(2) as pool:
        for nodes, expected in zip(pool.map(lambda model: grow(model, batch=40), models * 3), alone * 3, strict=True):
            equal(nodes, expected)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 16])
def test_a_branch_has_the_same_bits_however_its_prompt_is_cut(prefill_tokens: int) -> None:
    model = tiny_model()
    equal(grow(model, batch=4, prefill_tokens=prefill_tokens), grow(model, batch=4))


@pytest.mark.parametrize("cut", [1, 15, 16, 30])
def test_decoded_and_prefilled_have_the_same_bits(cut: int) -> None:
    """What follows a path is the same whether its tokens were sampled one by one or came as a prompt."""
    model, greedy = tiny_model(), Sampling(temperature=0, max_tokens=40)
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(prompt_of(20)) as tree:
        [decoded] = engine.extend(tree.root.fork(), greedy)
    other = Engine(model, kv_tokens=1024)
    with other.tree([*prompt_of(20), *decoded.tokens[:cut].tolist()]) as tree:
        [prefilled] = other.extend(tree.root.fork(), greedy)
    for name in ("tokens", "logprob_raw", "entropy"):
        assert np.array_equal(getattr(prefilled, name)[: 40 - cut], getattr(decoded, name)[cut:]), name


def test_an_update_of_the_weights_is_seen() -> None:
    """In place, and where a parameter's memory is another one."""
    model = tiny_model(0)
    engine = Engine(model, kv_tokens=1024)

    def sampled() -> list[int]:
        with engine.tree(prompt_of(9), key=3) as tree:
            return engine.extend(tree.root.fork(), Sampling(max_tokens=20))[0].tokens.tolist()

    first = sampled()
    randomise(model, 1)
    engine.weights_changed()
    second = sampled()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    randomise(model, 0)
    engine.weights_changed()
    assert sampled() == first != second
    assert is_native(engine)


def test_a_released_pool_is_freed_and_taken_again() -> None:
    engine = Engine(tiny_model(), kv_tokens=1024)

    def sampled() -> list[Node]:
        with engine.tree(prompt_of(9), key=3) as tree:
            return engine.extend(tree.root.fork(), Sampling(max_tokens=20))

    before = sampled()
    pages = weakref.ref(engine.cache.pool.keys)
    engine.release()
    assert pages() is None
    equal(sampled(), before)


def test_logits_without_a_distribution_leave_the_branch_as_it_was() -> None:
    model = tiny_model()
    engine = Engine(model, kv_tokens=1024)
    runner, slots = engine.scheduler.runner, engine.scheduler.slots
    tree = engine.tree(prompt_of(9))
    node = tree.root.fork()[0]
    engine._submit([node], Sampling(max_tokens=20))
    for _ in range(3):
        engine._step()
    before = slots.length.copy()
    norm = model.model.norm.weight
    kept = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 0 has no distribution"):
        engine._step()
    assert np.array_equal(slots.length, before)
    norm.data.copy_(kept)
    while node.in_flight:
        engine._step()
    assert runner.is_native
    other = Engine(model, kv_tokens=1024)
    with other.tree(prompt_of(9)) as again:
        equal(other.extend(again.root.fork(), Sampling(max_tokens=20)), [node])
    tree.close()


@pytest.mark.parametrize("batch, kv_tokens", [(1, 160), (12, 160), (12, 60)], ids=["few", "many", "short of pages"])
def test_steps_run_ahead_give_the_same_bits(batch: int, kv_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no call ends without a reason: enough branches ended, one lacks a page, or all steps allowed were run."""
    model = tiny_model()
    calls: list[tuple[int, int, K.DecodeRun]] = []  # steps allowed, branches, what was done
    run = K.DecodeStep.run

    def watched(step: K.DecodeStep, most: int = 1, *, most_ended: int = 0, spare: Any = None) -> K.DecodeRun:
        done = run(step, most, most_ended=most_ended, spare=spare)
        ended, lacking = [code for _, code in done.events if code != 3], 3 in dict(done.events).values()
        assert most_ended == (len(step._chosen) // ENDED_SHARE if most > 1 else 0)
        assert done.steps == most or len(ended) > most_ended or lacking or len(ended) == len(step._chosen)
        assert not lacking or most == 1 or len(done.paged) == len(spare)
        calls.append((most, len(step._chosen), done))
        return done

    monkeypatch.setattr(K.DecodeStep, "run", watched)
    together = grow(model, batch=batch, kv_tokens=kv_tokens)
    runs = [done for _, _, done in calls]
    assert max(done.steps for done in runs) > 1 and any(done.paged for done in runs)
    assert any(done.rows < done.steps * count for _, count, done in calls) == (batch > 1), "steps without who had ended"
    assert any(3 in dict(done.events).values() for done in runs) == (kv_tokens < 160)
    rows = sum(done.rows for done in runs)
    calls.clear()
    monkeypatch.setattr(engine_module, "MOST_STEPS", 1)
    equal(grow(model, batch=batch), together)
    assert {done.steps for _, _, done in calls} == {1} and len(calls) > len(runs)
    assert kv_tokens < 160 or sum(done.rows for _, _, done in calls) == rows


def test_what_fails_in_a_later_step_of_a_call_is_raised_by_the_next() -> None:
    """And the steps before it are kept and counted."""
    model, sampling = tiny_model(), Sampling(max_tokens=40)
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(prompt_of(20), key=1) as tree:
        tokens = engine.extend(tree.root.fork(), sampling)[0].tokens.tolist()
    last = max(i for i in range(3, 11) if tokens[i] not in [*tokens[:i], *prompt_of(20)])
    model.model.embed_tokens.weight.data[tokens[last]] = torch.nan  # met in the step behind that token
    engine.weights_changed()
    tree = engine.tree(prompt_of(20), key=1)
    [node] = tree.root.fork()
    engine._submit([node], sampling)
    counted = engine.stats()["sampled"]
    with pytest.raises(ValueError, match="row 0 has no distribution"):
        while node.in_flight:
            engine._step(16)
    slots, branch = engine.scheduler.slots, next(iter(engine.scheduler.running.values()))
    assert slots.outputs(branch.slot)[0].tolist() == tokens[: last + 1]
    assert engine.stats()["sampled"] - counted == last + 1
    engine.check_integrity()
    tree.close()


def test_nothing_is_run_ahead_of_a_future_or_a_pause() -> None:
    """A reward that arrives is seen after the step under way; so is a place to pause at."""
    engine = Engine(tiny_model(), kv_tokens=4096)
    most: list[int] = []
    step, gate = engine.scheduler.step, Future()

    def watched(version: int, allowed: int = 1) -> list[Node] | None:
        most.append(allowed)
        return step(version, allowed)

    engine.scheduler.step = watched  # type: ignore[method-assign]

    def search(tree: Tree) -> Growth:
        if tree.ordinal == 0:
            yield gate
        else:
            yield tree.root.fork(2)
            gate.set_result(None)
        yield tree.root.fork(3)

    assert len(list(engine.run(search, [prompt_of(9), prompt_of(5)], Sampling(max_tokens=30)))) == 2
    opened = most.index(16)
    assert set(most[:opened]) == {1} and set(most[opened:]) == {16} and opened > 20
    most.clear()
    with engine.tree(prompt_of(9)) as tree:
        engine.extend(tree.root.fork(), Sampling(max_tokens=30, pause=lambda tokens, new: new == 20))
    assert set(most) == {1}


def test_rows_out_of_range_are_errors() -> None:
    """Checked before anything is written."""
    model = tiny_model()
    runner = Engine(model, kv_tokens=64).scheduler.runner
    decoder, pool = runner._decoder, runner.pool
    assert decoder is not None
    table = torch.zeros(1, 4, dtype=torch.int32)
    table[0, 1:] = -1
    plan = K.plan_decode(table, torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))

    def forward(token: int, pos: int, slot: int, plan: K.DecodePlan = plan) -> torch.Tensor:
        rows = (torch.tensor([value]) for value in (token, pos, slot))
        return decoder.forward(*rows, plan, pool.keys, pool.values)

    for bad in ((40, 0, 0), (-1, 0, 0), (1, 512, 0), (1, -1, 0), (1, 0, 16 * pool.num_pages), (1, 0, -2)):
        with pytest.raises(ValueError, match="Decoder: row 0 has token"):
            forward(*bad)
    assert not pool.keys.any()
    missing = K.plan_decode(table, torch.zeros(1, dtype=torch.int32), torch.full((1,), 17, dtype=torch.int32))
    with pytest.raises(ValueError, match="a page of its path is missing"):
        forward(1, 16, -1, missing)
    assert forward(1, 0, 0).isfinite().all()
    assert pool.keys.any()


# ---- what it refuses ---------------------------------------------------------------------------------------------


def decoder_arguments(model: Model) -> dict[str, object]:
    """What `native_decoder` gives `Decoder` for a model."""
    given: dict[str, object] = {}

    def seen(layers: list[K.LayerWeights], **rest: object) -> None:
        given.update(layers=layers, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_module, "Decoder", seen)
        native_module.native_decoder(model, max_positions=64)
    return given


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm", lambda x: x[:-1].contiguous(), "norm is"),
        ("head", lambda x: x[:-1].contiguous(), "head is"),
        ("embedding", lambda x: x[0].contiguous(), "embedding is"),
        ("sin", lambda x: x[:-1].contiguous(), "sin is"),
        ("cos", lambda x: x.double(), "float32"),
        ("num_kv_heads", lambda n: 0, "multiple of 0"),
        ("eps", lambda eps: float("nan"), "eps=nan"),
        ("q", lambda x: x[:-1].contiguous(), "layer 1: q is"),
        ("down", lambda x: x.t().contiguous(), "layer 1: down is"),
        ("gate_bias", lambda x: torch.zeros(3), "layer 1: gate_bias is"),
        ("k_norm", lambda x: torch.zeros(3), "layer 1: k_norm is"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, change: Callable[[Any], object], message: str) -> None:
    given: dict[str, Any] = decoder_arguments(tiny_model())
    K.Decoder(**given)
    if name in given:
        given[name] = change(given[name])
    else:
        first, second = given["layers"]
        given["layers"] = [first, replace(second, **{name: change(getattr(second, name))})]
    with pytest.raises(ValueError, match=message):
        K.Decoder(**given)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", lambda x: x[:-1], "tokens is"),
        ("tokens", lambda x: x.int(), "tokens is"),
        ("pos", lambda x: x[None], "pos is"),
        ("slots", lambda x: x.float(), "slots is"),
        ("k_pages", lambda x: x[:-1], "k_pages is"),
        ("k_pages", lambda x: x.bfloat16(), "k_pages is"),
        ("v_pages", lambda x: x[:, :-1].contiguous(), "v_pages is"),
        ("v_pages", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "v_pages is"),
        ("plan", lambda plan: replace(plan, page_size=8), "pages of 8 slots"),
        ("tokens", lambda x: x + 10**6, "out of range"),
        ("slots", lambda x: x + 10**6, "out of range"),
        ("pos", lambda x: x - 10, "out of range"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, change: Callable[[Any], object], message: str) -> None:
    given: dict[str, Any] = decoder_arguments(tiny_model())
    decoder = K.Decoder(**given)
    layers, heads, head_dim = len(given["layers"]), given["num_kv_heads"], 2 * given["cos"].shape[1]
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.arange(1, 4, dtype=torch.int32)
    rows: dict[str, Any] = {
        "tokens": torch.arange(3),
        "pos": torch.arange(3),
        "slots": torch.arange(3),
        "plan": K.plan_decode(table, torch.zeros(3, dtype=torch.int32), lengths, page_size=16),
        "k_pages": torch.zeros(layers, 2, 16, heads, head_dim),
        "v_pages": torch.zeros(layers, 2, 16, heads, head_dim),
    }
    assert decoder.forward(**rows).isfinite().all()
    with pytest.raises(ValueError, match=message):
        decoder.forward(**(rows | {name: change(rows[name])}))
