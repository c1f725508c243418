"""Captured decode steps, in an engine. Needs CUDA, or `emulated_cuda` as `test_gpu.py` does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from engine_helpers import prompt_of, tiny_model
from gpu_only import DEVICE, INTERPRETED

import ibtpo_kernels as K
from ibtpo_engine import Engine, LoRA, Model, Node, Sampling, Tree
from ibtpo_engine import native as native_module
from ibtpo_engine.capture import capture_for
from ibtpo_engine.step_graphs import MOST_GRAPHS, StepGraphs, rounded_up
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.replay import Heads, ReplayPlan, Room, work_for

pytestmark = pytest.mark.gpu
FIELDS = ("logprob", "logprob_raw", "entropy")
SHORT = Sampling(max_tokens=4, temperature=0.8, top_p=0.95, stop_tokens=(2,))
LONG = Sampling(max_tokens=8, temperature=0.8, min_p=0.01, top_k=12)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops run on Triton, in splits of a page, and the model as a module."""
    monkeypatch.setattr(configs, "SPLIT", 16)
    monkeypatch.setattr(import_module("ibtpo_kernels.gpu.sample"), "_BLOCK", 64)
    monkeypatch.setattr(native_module, "MOST_BYTES", 0)
    with K.backend("triton"):
        yield


@pytest.fixture
def model() -> Model:
    return tiny_model().to(DEVICE)


def engine_of(model: Model, *, graphs: bool, **options: int) -> Engine:
    engine = Engine(model, **({"kv_tokens": 4096, "cuda_graphs": graphs} | options))
    runner = engine.scheduler.runner
    assert not runner.is_native
    assert runner.has_step == graphs
    return engine


def grow(engine: Engine) -> list[Tree]:
    """Two trees, forked in the middle of nodes; one grows over a page, which is a split here."""
    trees = [engine.tree(prompt_of(length, seed=length), key=length) for length in (7, 12)]
    first = engine.extend([node for tree in trees for node in tree.root.fork(2)], SHORT)
    engine.extend([fork for node in first[1:] for fork in node.fork(2, at=max(len(node) // 2, 1))], LONG)
    return trees


def plainly(grow: Callable[[Engine], list[Tree]], model: Model) -> list[Tree]:
    """The same without graphs; on an emulated device by the CPU, which takes less time."""
    if not INTERPRETED:
        return grow(engine_of(model, graphs=False))
    with K.backend("cpu" if K.has_compiled() else "reference"):
        return grow(engine_of(copy.deepcopy(model).to("cpu"), graphs=False))


def assert_same(ours: list[Tree], theirs: list[Tree]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        a, b = mine.nodes(), other.nodes()
        assert [node.tokens.tolist() for node in a] == [node.tokens.tolist() for node in b]
        assert [(node.start, node.finish) for node in a] == [(node.start, node.finish) for node in b]
        for name in FIELDS:
            for x, y in zip(a, b, strict=True):
                np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=2e-5)


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine.scheduler.runner.graphs
    assert graphs is not None
    return graphs


def test_captured_steps_sample_what_plain_ones_do(model: Model) -> None:
    engine = engine_of(model, graphs=True)
    trees = grow(engine)
    assert_same(trees, plainly(grow, model))
    assert any(node.end > 16 > node.start for tree in trees for node in tree.nodes())
    engine.check_integrity()
    graphs = graphs_of(engine)
    assert graphs.captured >= 2, "several sizes of batch"
    assert graphs.replayed > 2 * graphs.captured


def grow_little(engine: Engine) -> list[Tree]:
    tree = engine.tree(prompt_of(7), key=0)
    engine.extend(tree.root.fork(2), Sampling(max_tokens=3, temperature=0.8))
    return [tree]


def test_graphs_outlive_updates_in_place_and_nothing_else(model: Model) -> None:
    engine = engine_of(model, graphs=True)
    grow_little(engine)
    captured = graphs_of(engine).captured
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    engine.weights_changed()
    updated = grow_little(engine)
    assert graphs_of(engine).captured == captured, "the weights changed where they lie"
    assert_same(updated, plainly(grow_little, model))
    model.model.norm.weight.data = model.model.norm.weight.data * 1.5
    engine.weights_changed()
    moved = grow_little(engine)
    assert graphs_of(engine).captured > captured, "a parameter lies elsewhere"
    assert_same(moved, plainly(grow_little, model))


def test_graphs_do_not_outlive_the_scale_of_adapters(model: Model) -> None:
    """It is a number in them, as the switch decides what they compute."""
    model.add_adapters(LoRA(rank=2))
    adapters, engine = model.adapters, engine_of(model, graphs=True)
    assert adapters is not None
    grow_little(engine)
    captured = graphs_of(engine).captured
    adapters.config = replace(adapters.config, alpha=2 * adapters.config.alpha)
    engine.weights_changed()
    grow_little(engine)
    assert graphs_of(engine).captured > captured


def test_graphs_do_not_outlive_the_pool(model: Model) -> None:
    engine = engine_of(model, graphs=True)
    before = grow_little(engine)
    before[0].close()
    occupied = engine.cache.pool._memory  # so that the pool's next place is another
    step = weakref.ref(next(iter(graphs_of(engine)._buckets.values())))
    engine.release()
    assert step() is None, "its buffers and its graph's memory are free during the update"
    captured = graphs_of(engine).captured
    assert_same(grow_little(engine), before)
    assert engine.cache.pool._memory.data_ptr() != occupied.data_ptr()
    assert graphs_of(engine).captured > captured


def test_graphs_do_not_outlive_the_page_table(model: Model) -> None:
    """A reset begins with slots of its own; the pages in them are others, too, as another tree has the first ones."""

    def grow_beside(engine: Engine) -> list[Tree]:
        engine.extend(engine.tree(prompt_of(40, seed=5), key=9).root.fork(), Sampling(max_tokens=1))
        return grow_little(engine)

    engine = engine_of(model, graphs=True)
    grow_little(engine)
    engine.reset()
    assert_same(grow_beside(engine), plainly(grow_beside, model))


def test_pressure_preempts_and_the_tokens_stay(model: Model) -> None:
    def grow(engine: Engine) -> list[Tree]:
        prompts, sampling = [prompt_of(14, seed=seed) for seed in range(3)], Sampling(max_tokens=4, temperature=0.8)
        return [nodes[0].tree for nodes in engine.generate(prompts, sampling, n=2, keys=range(3))]

    engine = engine_of(model, graphs=True, kv_tokens=16 * 6)
    assert_same(grow(engine), plainly(grow, model))
    assert engine.stats()["preemptions"] > 0


def test_bad_logits_are_an_error_and_record_nothing(model: Model) -> None:
    engine = engine_of(model, graphs=True)
    node = engine.extend(engine.tree(prompt_of(9)).root.fork(), Sampling(max_tokens=4))[0]
    with torch.no_grad():
        model.head[5].fill_(float("nan"))
    engine.weights_changed()
    fork: list[Node] = []
    with pytest.raises(ValueError, match="has no distribution"):
        engine.extend(fork := node.fork(), Sampling(max_tokens=9))
    assert all(pending.is_pending for pending in fork)
    engine.check_integrity()


def test_the_graph_used_longest_ago_is_forgotten(model: Model) -> None:
    engine = engine_of(model, graphs=True)
    grow_little(engine)
    graphs = graphs_of(engine)
    like = next(iter(graphs._buckets.values())).plan.plan
    rooms = [Room(1, 1, 1 << i, False) for i in range(MOST_GRAPHS + 3)]
    for room in rooms:
        graphs._bucket_of(like, room)
    assert list(graphs._buckets) == rooms[-MOST_GRAPHS:]
    graphs._bucket_of(like, rooms[3])
    assert list(graphs._buckets)[-1] == rooms[3]


def test_buckets_hold_what_they_are_for_and_little_more() -> None:
    for count in range(1, 600):
        size = rounded_up(count)
        assert count <= size <= count * 1.25
        assert rounded_up(size) == size
    assert len({rounded_up(count) for count in range(1, 257)}) == 28


def test_a_plan_without_room_is_refused() -> None:
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(2, 6)
    rows = torch.arange(2, dtype=torch.int32, device=DEVICE)
    plan = K.plan_decode(table, rows, torch.tensor([90, 40], dtype=torch.int32, device=DEVICE))
    heads = Heads(4, 2, 16, torch.float32)
    work = work_for(plan, heads)
    assert (len(work.items), work.num_slots) == (9, 9), "six splits and three"
    room = Room.for_work(work, 2)
    assert room == Room(2, 16, 16, False)
    ReplayPlan(plan, room, heads).load(plan, work)
    for small in (Room(1, 16, 16, False), Room(2, 8, 16, False), Room(2, 16, 8, False)):
        with pytest.raises(ValueError, match="it was made for Room"):
            ReplayPlan(plan, small, heads).load(plan, work)


def test_on_the_cpu_graphs_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu; move it to a GPU"):
        Engine(model, kv_tokens=64, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs"):
        capture_for(model)
