"""Captured decode steps, in an engine. Needs CUDA, or `emulated_cuda` as `test_gpu.py` does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import prompt_of, tiny_model
from gpu_only import DEVICE, INTERPRETED

import ibtpo_kernels as K
from ibtpo_engine import Engine, Growth, LoRA, Model, Node, Sampling, Tree
from ibtpo_engine import native as native_module
from ibtpo_engine.capture import capture_for
from ibtpo_engine.runner import Runner
from ibtpo_engine.scheduler import Scheduler
from ibtpo_engine.slots import Slots
from ibtpo_engine.step_graphs import MOST_GRAPHS, StepGraphs, rounded_up
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.advance import RunRows
from ibtpo_kernels.gpu.replay import Heads, ReplayPlan, Room, work_for

pytestmark = pytest.mark.gpu
FIELDS = ("logprob", "logprob_raw", "entropy")
SHORT = Sampling(max_tokens=4, temperature=0.8, top_p=0.95, stop_tokens=(2,))
LITTLE = Sampling(max_tokens=2, temperature=0.8)
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


def test_a_path_that_has_grown_by_a_split_is_planned_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one program would walk all of its splits, one after the other."""
    work: list[int] = []
    load = ReplayPlan.load

    def watched(plan: ReplayPlan, rows: Any, made: Any) -> None:
        work.append(made.num_slots)
        load(plan, rows, made)

    def grow(engine: Engine) -> list[Tree]:
        tree = engine.tree(prompt_of(14), key=0)
        assert sum(event.done for event in engine.stream(tree.root.fork(), LONG)) == 1
        return [tree]

    monkeypatch.setattr(ReplayPlan, "load", watched)
    monkeypatch.setattr(configs, "SPLIT", 4)  # steps; splits are of a page
    assert_same(grow(engine_of(model, graphs=True)), plainly(grow, model))
    assert work == [1, 2]


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


def test_pages_given_in_an_interrupted_run_are_not_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They went back to the pool; a branch that goes on, as its call was not the interrupted one, gets another."""
    is_over, num_interrupts = RunRows.is_over, 0

    def interrupted(rows: RunRows) -> bool:
        nonlocal num_interrupts
        done = is_over(rows)
        if rows._progress[2] and not num_interrupts:
            num_interrupts += 1
            raise KeyboardInterrupt
        return done

    def grow(engine: Engine) -> list[Tree]:
        trees = [engine.tree(prompt_of(14, seed=seed), key=seed) for seed in range(2)]
        events = engine.stream(trees[0].root.fork(2), LONG)
        next(events)
        with suppress(KeyboardInterrupt):
            engine.extend(trees[1].root.fork(), LONG)
        for _ in events:
            pass
        engine.check_integrity()
        return trees[:1]

    monkeypatch.setattr(RunRows, "is_over", interrupted)
    assert_same(grow(engine_of(model, graphs=True)), plainly(grow, model))
    assert num_interrupts == 1


@pytest.mark.parametrize("after", ["load", "begin"])
def test_pinned_memory_is_not_written_after_an_interrupt(
    model: Model, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Before a transfer from it has ended: here a run goes on with the same bucket, and no call checks the weights."""
    place, is_armed = (ReplayPlan, RunRows)[after == "begin"], False
    send = getattr(place, after)

    def interrupted(*given: Any, **more: Any) -> None:
        nonlocal is_armed
        send(*given, **more)
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    def grow(engine: Engine) -> list[Tree]:
        other = engine.tree(prompt_of(7), key=7)
        engine.extend(other.root.fork(), Sampling(max_tokens=1))  # its prompt is filled

        def search(tree: Tree) -> Growth:
            nonlocal is_armed
            yield tree.root.fork(2)
            is_armed = engine.scheduler.runner.graphs is not None
            with suppress(KeyboardInterrupt):
                engine.extend(other.root.fork(2), LITTLE)
            yield tree.root.fork(2)  # their slots are the same in another order

        trees = [tree for _, tree in engine.run(search, [prompt_of(9)], LITTLE, keys=[9])]
        engine.check_integrity()
        return trees

    monkeypatch.setattr(place, after, interrupted)
    engine = engine_of(model, graphs=True)
    assert_same(grow(engine), plainly(grow, model))
    assert graphs_of(engine).captured == 1


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
    planner = engine.scheduler.slots.planner
    graphs._capture = lambda step: step
    rooms = [(Room(1, 1, 1 << i, False), 1) for i in range(MOST_GRAPHS + 3)]
    for room in rooms:
        graphs._bucket_of(planner, *room)
    assert list(graphs._buckets) == rooms[-MOST_GRAPHS:]
    graphs._bucket_of(planner, *rooms[3])
    assert list(graphs._buckets)[-1] == rooms[3]


def test_buckets_hold_what_they_are_for_and_little_more() -> None:
    for count in range(1, 600):
        size = rounded_up(count)
        assert count <= size <= count * 1.25
        assert rounded_up(size) == size
    assert len({rounded_up(count) for count in range(1, 257)}) == 28


def test_a_plan_without_room_is_refused() -> None:
    table = torch.arange(12, dtype=torch.int32).view(2, 6)
    rows, lengths = torch.arange(2, dtype=torch.int32), torch.tensor([90, 40], dtype=torch.int32)
    heads = Heads(4, 2, 16, torch.float32)
    work = work_for(K.plan_decode(table, rows, lengths), heads)
    assert (len(work.items), work.num_slots) == (9, 9), "six splits and three"
    room = Room.for_work(work, 2)
    assert room == Room(2, 16, 16, False)

    def load(room: Room) -> None:
        lengths = torch.zeros(room.queries, dtype=torch.int32, device=DEVICE)
        ReplayPlan(table.to(DEVICE), 16, room, heads, lengths).load(rows.numpy(), work)

    load(room)
    for small in (Room(1, 16, 16, False), Room(2, 8, 16, False), Room(2, 16, 8, False)):
        with pytest.raises(ValueError, match="it was made for Room"):
            load(small)


def test_on_the_cpu_graphs_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu; move it to a GPU"):
        Engine(model, kv_tokens=64, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs"):
        capture_for(model)


@pytest.mark.skipif(not K.has_compiled(), reason="the compiled module is missing")
def test_runs_of_steps_are_those_of_the_native_decoder(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps in each call, the same branches that end and pages that are given, the same tokens."""
    runs: list[list[tuple[int, K.DecodeRun]]] = [[], []]
    decode = Runner.decode

    def watched(runner: Runner, slots: Slots, chosen: Any, most: int = 1, **more: Any) -> K.DecodeRun:
        done = decode(runner, slots, chosen, most, **more)
        runs[runner.is_native].append((len(chosen), done))
        return done

    def grow(engine: Engine) -> list[Tree]:
        prompts, sampling = [prompt_of(14, seed=seed) for seed in range(3)], Sampling(max_tokens=8, stop_tokens=(2, 5))
        trees = [nodes[0].tree for nodes in engine.generate(prompts, sampling, n=2, keys=range(3))]
        engine.check_integrity()
        return trees

    run_on = Scheduler._run_on

    def checked(scheduler: Scheduler, decoding: Any, most: int) -> K.DecodeRun:
        run = run_on(scheduler, decoding, most)
        for slot in decoding.tolist():
            kv = scheduler.running[slot].kv
            assert kv is not None
            pages = scheduler.slots.table[slot, kv.first :]
            assert pages.tolist() == kv.pages + [-1] * (len(pages) - len(kv.pages))
        return run

    monkeypatch.setattr(Runner, "decode", watched)
    monkeypatch.setattr(Scheduler, "_run_on", checked)
    graphs = engine_of(model, graphs=True, kv_tokens=176)
    ours = grow(graphs)
    monkeypatch.undo()  # so that the other engine's model is small enough for the native decoder
    monkeypatch.setattr(Runner, "decode", watched)
    with K.backend("cpu"):
        theirs = grow(Engine(copy.deepcopy(model).to("cpu"), kv_tokens=176))
    assert_same(ours, theirs)
    assert runs[0] == runs[1]
    done = [run for _, run in runs[0]]
    assert max(run.steps for run in done) > 3 and any(run.paged for run in done)
    assert {code for run in done for _, code in run.events} == {1, 2, 3}
    assert graphs.stats()["preemptions"] > 0
    assert graphs_of(graphs).replayed == sum(run.steps for run in done), "none is replayed for nothing"


def test_a_run_is_recorded_up_to_the_end_of_a_row_and_no_further() -> None:
    slots = Slots(2, 8)
    for start in (0, 62):  # rows have room for 64 tokens
        slot = slots.take([0])
        slots.begin(slot, start=0, before=1, limit=64, stream=0, sampling=LONG)
        slots.length[slot] = start
    slots.tokens[:] = -1
    tokens = np.arange(6, dtype=np.int32).reshape(3, 2)
    numbers = tokens.astype(np.float32)
    slots.record_run(np.array([1, 0]), np.array([2, 1], np.int32), tokens, numbers, numbers + 1, numbers + 2)
    assert slots.length.tolist() == [1, 64]
    assert slots.tokens[1, 62:].tolist() == [0, 2] and slots.tokens[0, :2].tolist() == [1, -1]
    assert [slots.outputs(0)[i].tolist() for i in range(4)] == [[1], [1.0], [2.0], [3.0]]


class PlainRun:
    """What a run does, one row at a time: of branches with these lengths, limits and stop tokens."""

    def __init__(self, index: Any, length: Any, limit: Any, stops: Any, table: Any, spare: list[int]) -> None:
        self.index, self.length, self.limit, self.stops, self.table = index, length.copy(), limit, stops, table.copy()
        self.spare = spare
        self.running = list(range(len(length)))
        self.sampled: list[list[tuple[float, ...]]] = [[] for _ in length]
        self.events: list[tuple[int, int]] = []
        self.paged: list[int] = []
        self.columns: list[int] = []
        self.steps = 0
        self.failed: int | None = None

    def step(self, token: Any, numbers: Any) -> None:
        self.failed = next((row for row in self.running if token[row] < 0), None)
        if self.failed is not None:
            return
        self.steps += 1
        going = []
        for row in self.running:
            self.sampled[row].append((int(token[row]), *numbers[:, row].tolist()))
            self.length[row] += 1
            code = 1 if token[row] in self.stops[row] else 2 if self.length[row] >= self.limit[row] else 0
            if code == 0 and self.table[self.cell(row)] < 0:
                if len(self.paged) < len(self.spare):
                    self.table[self.cell(row)] = self.spare[len(self.paged)]
                    self.paged.append(row)
                    self.columns.append(self.cell(row)[1])
                else:
                    code = 3
            if code:
                self.events.append((row, code))
            else:
                going.append(row)
        self.running = going

    def cell(self, row: int) -> tuple[int, int]:
        return int(self.index[row]), int(self.length[row] - 1) // 16

    def address(self, row: int) -> int:
        return int(self.table[self.cell(row)] * 16 + (self.length[row] - 1) % 16) if row in self.running else -1

    def is_over(self, most: int, most_ended: int) -> bool:
        codes = [code for _, code in self.events]
        ended = len(codes) - codes.count(3)
        return self.failed is not None or not self.running or 3 in codes or self.steps == most or ended > most_ended


@pytest.mark.parametrize("case", range(14))
def test_a_run_records_and_gives_pages_as_a_loop_would(case: int) -> None:
    """The first and last have more rows than the kernel looks at together; among the others are all ways to end."""
    draw = np.random.default_rng(case)
    count = int(draw.integers(3, 9)) if case % 13 else 700
    size, most, most_ended = count + int(draw.integers(3)), 4, int(draw.integers(2))
    length = draw.integers(12, 33, count)
    limit, stops = length + draw.integers(2, 6, count), draw.integers(0, 9, (count, 2))
    width, index = 4, draw.permutation(count).astype(np.int32)
    table = np.full((count, width), -1, np.int32)
    for row, pages in zip(index, -(-length // 16), strict=True):
        table[row, :pages] = draw.integers(0, 50, pages)
    spare = draw.integers(100, 200, (2 * count, 0, 1)[case % 3]).astype(np.int32)[:count]
    plain = PlainRun(index, length, limit, stops, table, spare.tolist())
    fails_in = {3: 0, 6: 1, 9: 2, 13: 0}.get(case)

    rows = RunRows(size, 2, most, DEVICE)
    host = rows.host
    host["lengths"][:count] = host["keys"][:count, 1] = length
    host["limit"][:count], host["stops"][:count] = limit, stops
    there, whole = torch.from_numpy(table).to(DEVICE), np.zeros(size, np.int32)
    whole[:count] = index
    nothing = torch.zeros(0, 4, dtype=torch.int32, device=DEVICE)
    plan = K.DecodePlan(there, torch.from_numpy(whole).to(DEVICE), rows.there["lengths"], nothing, 16)
    rows.begin(count, most, most_ended=most_ended, spare=spare)

    is_over = False
    while not is_over:
        token, numbers = draw.integers(0, 60, size), draw.random((3, size)).astype(np.float32)
        if plain.steps == fails_in:
            token[plain.running[0 if case == 13 else -1]] = -1
        drawn = (torch.from_numpy(token).to(DEVICE), *torch.from_numpy(numbers).to(DEVICE).unbind())
        rows.advance(drawn, plan)  # type: ignore[arg-type]
        plain.step(token, numbers)
        is_over = rows.is_over()
        assert is_over == plain.is_over(most, most_ended)
        address, pos = rows.there["address"].tolist(), rows.there["pos"].tolist()
        keys = rows.there["keys"][:, 1].tolist()
        if plain.failed is None:
            assert address == [*map(plain.address, range(count)), *[-1] * (size - count)]
            assert all(pos[row] == plain.length[row] - 1 for row in plain.running)
            assert all(keys[row] == plain.length[row] for row in plain.running)
        assert pos[count:] == [-1] * (size - count)
    rows.advance(drawn, plan)  # type: ignore[arg-type]
    assert rows.is_over(), "and does not change"
    assert there.tolist() == plain.table.tolist()
    if plain.steps == 0:
        with pytest.raises(ValueError, match=f"sample: row {plain.failed} has no distribution"):
            rows.outcome()
        return
    outcome = rows.outcome()
    assert outcome.run == K.DecodeRun(plain.steps, sum(map(len, plain.sampled)), plain.events, plain.paged)
    assert outcome.columns.tolist() == plain.columns
    assert outcome.counts.tolist() == list(map(len, plain.sampled))
    for row, sampled in enumerate(plain.sampled):
        assert [tuple(part[step, row].item() for part in outcome[3:]) for step in range(len(sampled))] == sampled
