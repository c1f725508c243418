"""Several processes: the loss, gradients, updates, trees and checkpoints of one, and ends that name the culprit."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from engine_helpers import tiny_model
from processes import end, run, started, time_limit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trees import VOCABULARY, chain, estimate, random_trajectories

from ibtpo import memory_plan
from ibtpo.advantage import advantage
from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, LoRAConfig, LossConfig, OptimConfig, SamplingConfig, TrainConfig
from ibtpo.distributed import ALONE, Follower, Group, device_name, join, make_learner, restarted
from ibtpo.distributed.exchange import freeze, thaw
from ibtpo.distributed.group import balance
from ibtpo.memory_fit import check_memory
from ibtpo.memory_plan import Processes, plan_memory
from ibtpo.metrics import tree_metrics
from ibtpo.optim import NonFinite
from ibtpo.pack import pack
from ibtpo.policy import load_policy
from ibtpo.runlog import RunFolder, latest_checkpoint
from ibtpo.stopping import StopRequest
from ibtpo.trainer import Trainer
from ibtpo.update import Updater, frozen_copy
from ibtpo_engine import LoRA, Model, Tree

CONFIG = TrainConfig(
    sampling=SamplingConfig(temperature=0.8, top_p=1.0, max_tokens=64),
    loss=LossConfig(kl_coef=0.1),
    advantage=AdvantageConfig(pi_ref="reference", ib_weight=0.3),
    optim=OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-2, grad_clip=0.01),  # smooth in the gradient; always clipped
    mini_batches=2,
    micro_batch_tokens=40,
    distributed_timeout=30.0,
)
TINY = [
    "--jsonl.grade", "exact", "--prompts-per-step", "4", "--search.rounds", "5", "--sampling.max-tokens", "6",
    "--eval.prompts", "4", "--eval.samples", "2", "--checkpoint-every", "2", "--distributed-timeout", "60",
    "--optim.lr", "1e-3", "--optim.warmup-steps", "1", "--optim.eps", "1e-3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    with time_limit(180):
        yield


def _trees(seed: int = 0, count: int = 7) -> list[Tree]:
    """Random trees of 3 to 12 trajectories, so that no two processes have alike work; one has nothing to learn from."""
    rng, trees = Random(seed), []
    for index in range(count):
        tree, trajectories = random_trajectories(rng, leaves=3 + 9 * (index % 2), binary=False)
        if index == 3:
            for leaf in tree.leaves():
                leaf.reward = 0.5
        tree.notes["ib"] = estimate(tree, trajectories)
        tree.notes["iid_leaves"] = [steps[-1] for steps in trajectories[:2]]
        trees.append(tree)
    return trees


def _update(config: TrainConfig, dtype: torch.dtype, group: Group, steps: int = 1) -> dict[str, Any]:
    """Metrics, every optimizer step's (clipped) gradients, weights and optimizer state after `steps` updates."""
    full = tiny_model(0, vocabulary=VOCABULARY, dtype=dtype).requires_grad_(True)
    reference = frozen_copy(tiny_model(1, vocabulary=VOCABULARY, dtype=dtype))
    if config.lora.rank:
        reference = _adapt(full, config.lora.rank)
    before = {name: p.detach().clone() for name, p in full.named_parameters()}
    model, optimizer = make_learner(config, full, group, "fsdp" if config.distributed == "fsdp" else "ddp")
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        gradients.append({name: _whole(p.grad).clone() for name, p in optimizer._masters.items()})

    optimizer._adamw.register_step_pre_hook(keep)
    updater = Updater(model, optimizer, reference, config, group=group, full=full)
    metrics = [updater.update(_trees(seed)) for seed in range(steps)]
    weights = {name: p.detach().clone() for name, p in full.named_parameters()}
    assert {name for name, p in full.named_parameters() if torch.equal(p, before[name]) and p.requires_grad} == (
        set() if dtype != torch.bfloat16 else ANY  # which rounds a small update away; the masters in the state have it
    )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter is full.get_parameter(name) and torch.equal(parameter, before[name]), name
    return {"metrics": metrics, "gradients": gradients, "weights": weights, "state": optimizer.state()}


def _adapt(model: Model, rank: int) -> Model:
    """Adapters that have been trained a little: without, B is 0, and so is the gradient of A."""
    model.add_adapters(LoRA(rank=rank, alpha=2.0 * rank), seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _update_as_rank(config: TrainConfig, dtype: torch.dtype, out: Path) -> None:
    with join(config) as group:
        result = _update(config, dtype, group)
        everyones = group.gather(result["weights"], "compare weights")
        assert all(torch.equal(other[n], w) for n, w in result["weights"].items() for other in everyones)
        if group.leads:
            torch.save(result, out)


def _difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to its own largest entry."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).abs().max() / theirs[n].double().abs().max().clamp(min=1e-12))
        for n in ours
    )


@pytest.mark.parametrize(("size", "mode", "dtype", "within", "other"), [
    (2, "ddp", torch.float64, 1e-9, {}),
    (2, "fsdp", torch.float64, 1e-9, {}),
    (4, "ddp", torch.float32, 2e-5, {"parity": "bitwise"}),
    (4, "fsdp", torch.float64, 1e-9, {"gradient_checkpointing": True}),
    (2, "fsdp", torch.float32, 2e-5, {"parity": "bitwise"}),
    (2, "fsdp", torch.bfloat16, 0.05, {}),
    (2, "ddp", torch.float64, 1e-9, {"lora": LoRAConfig(rank=3)}),
    (2, "fsdp", torch.float64, 1e-9, {"lora": LoRAConfig(rank=3)}),
    (4, "fsdp", torch.float64, 1e-9, {"lora": LoRAConfig(rank=3), "gradient_checkpointing": True}),
    (2, "fsdp", torch.float32, 2e-5, {"lora": LoRAConfig(rank=3)}),
    (2, "fsdp", torch.bfloat16, 0.05, {"lora": LoRAConfig(rank=3), "mini_batches": 1}),  # rounding adds up later
])  # fmt: skip
def test_loss_gradients_and_updates_are_those_of_one_process(
    size: int, mode: Any, dtype: torch.dtype, within: float, other: dict[str, Any], tmp_path: Path
) -> None:
    """Of a global batch whose trees, micro-batches and denominators are spread unevenly."""
    config = replace(CONFIG, distributed=mode, **other)
    run(size, _update_as_rank, config, dtype, tmp_path / "result.pt", logs=tmp_path / "logs")
    ours = torch.load(tmp_path / "result.pt")
    theirs = _update(replace(config, gradient_checkpointing=False), dtype, ALONE)
    (metrics,), (expected,) = ours["metrics"], theirs["metrics"]
    assert metrics.keys() == expected.keys()
    assert expected["optimizer_steps"] == config.mini_batches
    assert expected["groups_skipped"] == 1
    for name in metrics.keys() - {"tokens_trained", "training_efficiency"}:  # the same tokens may be cut otherwise
        assert metrics[name] == pytest.approx(expected[name], rel=max(within, 1e-6), abs=within), name
    assert len(ours["gradients"]) == len(theirs["gradients"]) == config.mini_batches
    for mine, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert _difference(mine, expected) < within
    assert _difference(ours["weights"], theirs["weights"]) < within
    assert _difference(ours["state"], theirs["state"]) < 2 * within  # second moments are squares


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dr_grpo"])
def test_shares_of_a_step_carry_the_weights_of_the_whole(aggregation: Any) -> None:
    """Every edge has the weight it has where one process packs all trees, to the last bit."""
    trees = [advantage(tree.export(), tree.notes["ib"], AdvantageConfig()) for tree in _trees()]
    how = {"micro_batch_tokens": 10**6, "max_tokens": 64, "dtype": torch.float64}
    loss = LossConfig(aggregation=aggregation)
    weights = []
    for shares in ([None], balance([len(tree.packed) for tree in trees], 3)):
        batches = [batch for only in shares for batch in pack(trees, loss, only=only, **how)]
        edges = torch.cat([torch.stack([b.edge_tree, b.edge_token]) for b in batches], 1)
        order = (edges[0] * 10**6 + edges[1]).argsort()
        weights.append(torch.cat([torch.stack([b.weight, b.positive, b.negative]) for b in batches], 1)[:, order])
    assert torch.equal(*weights)


# ---- trees ---------------------------------------------------------------------------------------------------------


def test_trees_travel_with_all_that_was_left_on_them() -> None:
    trees = _trees()
    back = thaw(freeze(trees))
    assert tree_metrics(back) == tree_metrics(trees)
    for ours, theirs in zip(back, trees, strict=True):
        for name, values in vars(theirs.export()).items():
            if name != "nodes":
                assert (getattr(ours.export(), name) == values).all()
        assert [n.reward for n in ours.leaves()] == [n.reward for n in theirs.leaves()]
        pairs = list(zip(ours.nodes(), theirs.nodes(), strict=True))[1:]
        mine, other = ours.notes["ib"], theirs.notes["ib"]
        assert [mine.eta1(a) for a, _ in pairs] == [other.eta1(b) for _, b in pairs]
        assert [s for _, s in mine.branching()] == [s for _, s in other.branching()]
        grown = [(t, chain(t.root, [([1, 2], -0.5)], 1.0)) for t in (ours, theirs)]  # estimates go on where they were
        for tree, steps in grown:
            tree.notes["ib"].add_leaf(steps)
        assert mine.score(ours.root) == other.score(theirs.root)


def test_a_tree_of_any_depth_travels() -> None:
    tree = Tree([1])
    steps = chain(tree.root, [([i % VOCABULARY], -0.5) for i in range(5000)], 1.0)
    tree.notes["ib"] = estimate(tree, [steps])
    (back,) = thaw(freeze([tree]))
    assert (back.export().tokens == tree.export().tokens).all()
    assert back.notes["ib"].value(back.root) == 1.0
    assert thaw(freeze([])) == []


def test_work_is_shared_out_evenly() -> None:
    assert [list(Group(rank, 3).share(7)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [list(Group(rank, 3).share(1)) for rank in range(3)] == [[], [], [0]]
    shares = balance([5, 9, 1, 4, 7], 2)
    assert shares == [[1, 3], [0, 2, 4]]  # 13 and 13


# ---- failures ------------------------------------------------------------------------------------------------------


def _one_is_missing(config: TrainConfig) -> None:
    with join(config) as group:
        group.timeout = 0.5
        if group.rank != 1:
            group.meet("count heads")
        time.sleep(2)


def test_who_does_not_come_in_time_is_named(tmp_path: Path) -> None:
    run(3, _one_is_missing, CONFIG, logs=tmp_path, ends_well=False)
    assert "waited 0.5 s for rank 1 of 3 to count heads" in (tmp_path / "0.txt").read_text()


def _one_raises(config: TrainConfig) -> None:
    with join(config) as group:
        if group.rank == 1:
            raise ValueError("the third row\n has no answer")
        group.gather(group.rank, "go on")


def test_one_that_raises_ends_all_with_its_message(tmp_path: Path) -> None:
    began = time.monotonic()
    run(3, _one_raises, CONFIG, logs=tmp_path, ends_well=False)
    assert time.monotonic() - began < 20
    assert "ValueError: the third row" in (tmp_path / "1.txt").read_text()
    assert "rank 1 failed: the third row has no answer" in (tmp_path / "0.txt").read_text()
    assert "third row" not in (tmp_path / "2.txt").read_text()


def _one_is_killed(config: TrainConfig, rank: int) -> None:
    with join(config) as group:
        if group.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        group.gather(group.rank, "go on")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all_at_once(rank: int, tmp_path: Path) -> None:
    """Not after the time-out, which may be half an hour: torchrun would have to kill them to restart the run."""
    began = time.monotonic()
    config = replace(CONFIG, distributed_timeout=1800.0)
    codes = run(3, _one_is_killed, config, rank, logs=tmp_path, ends_well=False)
    assert time.monotonic() - began < 20
    assert codes.pop(rank) == -signal.SIGKILL
    assert rank == 0 or "was it killed?" in (tmp_path / "0.txt").read_text()


class _Twins(Group):
    """Two processes that bring the same."""

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, value]


CPU = torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 4])
def test_auto_takes_shares_where_whole_copies_do_not_fit(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = replace(CONFIG, lora=LoRAConfig(rank=rank))
    shape, twins = tiny_model().config, _Twins(0, 2)
    monkeypatch.setattr(memory_plan, "host_memory", lambda: 0)
    whole, split = (plan_memory(base, shape, CPU, processes=Processes(2, mode, 2)) for mode in ("ddp", "fsdp"))

    def mode(free: int, config: TrainConfig = base, group: Group = twins) -> str:
        monkeypatch.setattr(memory_plan, "free_memory", lambda device: free * group.size)  # shared by two
        return check_memory(config, shape, CPU, group)[0]

    assert split.total < whole.total
    assert mode(whole.total) == "ddp"
    assert mode(whole.total - 1) == "fsdp"
    assert mode(whole.total, replace(base, distributed="fsdp")) == "fsdp"
    assert mode(whole.total, group=ALONE) == "ddp"
    for config, free in ((replace(base, distributed="ddp"), whole.total), (base, split.total)):
        with pytest.raises(ValueError, match="so nothing was allocated"):
            mode(free - 1, config)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_plan_counts_shares_as_they_are_held(rank: int, tmp_path: Path) -> None:
    config = replace(CONFIG, lora=LoRAConfig(rank=rank))
    run(4, _count_shares, config, tmp_path / "held.json", logs=tmp_path / "logs")
    held = json.loads((tmp_path / "held.json").read_text())
    plan = plan_memory(config, tiny_model(vocabulary=VOCABULARY).config, CPU, processes=Processes(4, "fsdp", 4))
    for name, parts in (("master weights", "masters"), ("optimizer state", "moments")):
        assert plan.parts[name] == pytest.approx(sum(rank[parts] for rank in held) / 4, rel=0.02), name


def _count_shares(config: TrainConfig, out: Path) -> None:
    with join(config) as group:
        full = tiny_model(0, vocabulary=VOCABULARY).requires_grad_(True)
        if config.lora.rank:
            _adapt(full, config.lora.rank)
        model, optimizer = make_learner(config, full, group, "fsdp")
        Updater(model, optimizer, frozen_copy(full), config, group=group, full=full).update(_trees())
        masters = sum(_share(p).nbytes for p in optimizer._masters.values())
        states = optimizer._adamw.state.values()
        moments = sum(_share(state[key]).nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
        held = group.gather({"masters": masters, "moments": moments}, "compare")
        if group.leads:
            out.write_text(json.dumps(held))


def _share(tensor: Any) -> torch.Tensor:
    return tensor.to_local()


@pytest.mark.parametrize(("variables", "device", "expected"), [
    ({}, "cuda:1", "cuda:1"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "auto", "cuda:1"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "cpu"),
    ({"WORLD_SIZE": "4", "LOCAL_RANK": "2"}, "cuda", "lower --nproc-per-node"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cuda:0", "would be shared"),
])  # fmt: skip
def test_every_process_of_a_node_gets_its_own_gpu(
    variables: dict[str, str], device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            device_name(replace(CONFIG, device=device))
    else:
        assert device_name(replace(CONFIG, device=device)) == expected


def test_a_restart_resumes_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, out=tmp_path)
    (tmp_path / "config.yaml").touch()
    assert restarted(config, ALONE) == config
    assert restarted(config, Group(start=2)).resume == tmp_path  # over several nodes torchrun does not always count
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(config, ALONE).resume == tmp_path
    assert restarted(replace(config, out=tmp_path / "none"), ALONE).resume is None
    assert restarted(replace(config, out=None), ALONE).resume is None


def test_fsdp_refuses_what_it_cannot_split() -> None:
    shape, twins = tiny_model().config, _Twins(0, 2)
    with pytest.raises(ValueError, match="cannot split the optimizer's state in 8bit; use --optim.state float32"):
        check_memory(replace(CONFIG, distributed="fsdp", optim=OptimConfig(state="8bit")), shape, CPU, twins)
    adapted = replace(CONFIG, distributed="fsdp", lora=LoRAConfig(rank=2))
    assert check_memory(adapted, shape, CPU, twins)[0] == "fsdp"
    assert check_memory(replace(adapted, distributed="auto"), shape, CPU, twins)[0] == "ddp"
    assert check_memory(adapted, shape, CPU, ALONE)[0] == "ddp"


def _spoiled(config: TrainConfig) -> None:
    """An update on trees of which one, and so one process, has a loss that is not finite."""
    with join(config) as group:
        full = tiny_model(0, vocabulary=VOCABULARY).requires_grad_(True)
        before = {name: p.detach().clone() for name, p in full.named_parameters()}
        model, optimizer = make_learner(config, full, group, "fsdp" if config.distributed == "fsdp" else "ddp")
        updater = Updater(model, optimizer, frozen_copy(full), config, group=group, full=full)
        trees = _trees()
        for node in list(trees[0].nodes())[1:]:
            node.logprob = np.full_like(node.logprob, np.nan)
        metrics = updater.update(trees)
        assert metrics["optimizer_steps_skipped"] == metrics["optimizer_steps"] == 1
        assert updater.nonfinite_in_a_row == 0  # the other half of the trees is well
        with pytest.raises(NonFinite, match="6 optimizer steps in a row"):
            for _ in range(3):
                updater.update([trees[0]] * 2)
        after = {name: p.detach() for name, p in full.named_parameters()}
        assert all(torch.isfinite(p).all() for p in after.values())
        assert not all(torch.equal(before[name], p) for name, p in after.items())
        assert all(
            torch.equal(other[n], p) for n, p in after.items() for other in group.gather(after, "compare weights")
        )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_skip_a_step_that_is_not_finite_for_one_and_stop_together(mode: Any, tmp_path: Path) -> None:
    run(2, _spoiled, replace(CONFIG, distributed=mode), logs=tmp_path)


def test_followers_write_nothing() -> None:
    """Each public method of a run folder that writes has a twin of the same signature that does not."""
    methods = {
        name: method
        for name, method in vars(RunFolder).items()
        if inspect.isfunction(method) and (not name.startswith("_") or name == "__init__")
    }
    assert {"log", "add_tree", "checkpoint", "configure", "close"} < methods.keys()
    for name, method in methods.items():
        assert name in vars(Follower), f"Follower.{name} is missing"
        if name != "__init__":
            twin = inspect.signature(vars(Follower)[name]).parameters
            assert list(twin) == list(inspect.signature(method).parameters), name


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("adder")
    return [
        "--model", save_checkpoint(folder / "model", teach=40), "--data", save_additions(folder / "rows.jsonl"), *TINY,
    ]  # fmt: skip


def _train(*arguments: object) -> int:
    if int(os.environ.get("RANK", "0")) > 0:
        sys.addaudithook(_forbid_writing)
    return main(["train", *map(str, arguments)])


def _forbid_writing(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends a process other than rank 0 that changes a file of a test."""
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
    changes |= event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR) != 0
    if changes and "pytest-" in os.fsdecode(arguments[0]) if changes and not isinstance(arguments[0], int) else False:
        print(f"a follower writes: {event} {arguments}", flush=True)
        os._exit(9)


def _rows(folder: Path, *, every: bool = False) -> list[dict[str, Any]]:
    """What was logged of training steps, or everything."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if every or "tokens_sampled" in row]


def _saved(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    last = latest_checkpoint(folder)
    assert last is not None
    return load_file(last.path / f"{name}.safetensors")


def test_a_run_goes_on_in_any_number_of_processes(adder: list[object], tmp_path: Path) -> None:
    """1, then 2 and 4 with shares, then 2 with copies, then 1: it ends where a run in one process does."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(*adder, "--out", whole, "--sampled-tokens", 500) == 0
    assert _train(*adder, "--out", parts, "--sampled-tokens", 100) == 0
    counts = [len(_rows(parts))]
    for size, mode, tokens in ((2, "fsdp", 200), (4, "fsdp", 300), (2, "ddp", 400)):
        logs = tmp_path / f"logs-{tokens}"
        run(size, _train, "--resume", parts, "--sampled-tokens", tokens, "--distributed", mode, logs=logs)
        assert f"{size} processes, {mode}" in (logs / "0.txt").read_text()
        assert [(logs / f"{rank}.txt").read_text() for rank in range(1, size)] == [""] * (size - 1)
        counts.append(len(_rows(parts)))
    assert _train("--resume", parts, "--sampled-tokens", 500) == 0
    counts.append(len(_rows(parts)))
    assert sorted(set(counts)) == counts
    _assert_same(parts, whole, within=1e-3, every=False)
    assert _saved(parts, "optimizer").keys() == _saved(whole, "optimizer").keys()
    assert _difference(_saved(parts, "optimizer"), _saved(whole, "optimizer")) < 0.02
    assert sum(row["optimizer_steps"] for row in _rows(parts)) > 2
    assert len(json.loads((parts / "environment.json").read_text())) == len(list(parts.glob("events.out.*"))) == 5
    last = latest_checkpoint(parts)
    assert last is not None
    assert "avg@2" in (last.path / "README.md").read_text()


def _assert_same(ours: Path, theirs: Path, within: float, *, every: bool = True) -> None:
    """The two runs sampled, rewarded and evaluated the same, and ended with the same weights."""
    machine = {"tokens_trained", "training_efficiency", "peak_memory", "memory_planned", "tokens_per_second"}
    for mine, other in zip(_rows(ours, every=every), _rows(theirs, every=every), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - machine:
            if not name.endswith("_seconds"):
                assert mine[name] == pytest.approx(other[name], rel=5e-3, abs=1e-4), name
    assert _difference(_saved(ours), _saved(theirs)) < within


@pytest.mark.parametrize(("preset", "mode"), [
    ("ib-tpo", "ddp"), ("grpo", "fsdp"), ("dapo", "fsdp"), ("treepo", "ddp"), ("vineppo", "fsdp"), ("tree-grpo", "ddp"),
])  # fmt: skip
def test_a_preset_is_the_same_in_two_processes(preset: str, mode: str, adder: list[object], tmp_path: Path) -> None:
    how = [*adder, "--preset", preset, "--sampled-tokens", 250, "--eval.every", 2, "--distributed", mode]
    how += ["--search.segment-tokens", 2] if preset == "treepo" else []
    one, two = tmp_path / "one", tmp_path / "two"
    assert _train(*how, "--out", one) == 0
    run(2, _train, *how, "--out", two, logs=tmp_path / "logs")
    _assert_same(two, one, within=1e-3)
    last, other = latest_checkpoint(two), latest_checkpoint(one)
    assert last is not None
    assert other is not None
    state = json.loads((last.path / "state.json").read_text())
    assert state == json.loads((other.path / "state.json").read_text())
    assert sum(row["optimizer_steps"] for row in _rows(two)) > 0
    if preset == "dapo":
        assert state["next_problem"] > 4 * state["step"]  # it did draw again


def test_state_in_8_bits_trains_in_two_processes(adder: list[object], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    how = [*adder, "--optim.state", "8bit", "--sampled-tokens", 300]
    assert _train(*how, "--out", tmp_path / "one") == 0
    run(2, _train, *how, "--out", tmp_path / "two", logs=tmp_path / "logs")
    _assert_same(tmp_path / "two", tmp_path / "one", within=0.02)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_adapters_train_in_two_processes(mode: str, adder: list[object], tmp_path: Path) -> None:
    lora = [*adder, "--lora.rank", 4, "--loss.kl-coef", 0.1, "--sampled-tokens", 400, "--distributed", mode]
    assert _train(*lora, "--out", tmp_path / "one") == 0
    run(2, _train, *lora, "--out", tmp_path / "two", logs=tmp_path / "logs")
    assert f"2 processes, {mode}" in (tmp_path / "logs" / "0.txt").read_text()
    assert [row["tokens_sampled"] for row in _rows(tmp_path / "two")] == [
        row["tokens_sampled"] for row in _rows(tmp_path / "one")
    ]
    ours, theirs = (_saved(tmp_path / name, "adapter_model") for name in ("two", "one"))
    assert _difference(ours, theirs) < 1e-3


def test_adapters_go_on_in_any_number_of_processes(adder: list[object], tmp_path: Path) -> None:
    """1, then 2 and 3 with shares, then 1; then further from the adapter itself, whose start is the reference."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = [*adder, "--lora.rank", 4, "--loss.kl-coef", 0.1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(*lora, "--out", whole, "--sampled-tokens", 400) == 0
    assert _train(*lora, "--out", parts, "--sampled-tokens", 100) == 0
    for size, tokens in ((2, 200), (3, 300)):
        logs = tmp_path / f"logs-{tokens}"
        run(size, _train, "--resume", parts, "--sampled-tokens", tokens, "--distributed", "fsdp", logs=logs)
    assert _train("--resume", parts, "--sampled-tokens", 400) == 0
    assert len(_rows(parts)) == len(_rows(whole))
    for name, within in (("adapter_model", 1e-3), ("optimizer", 0.02)):
        assert _difference(_saved(parts, name), _saved(whole, name)) < within
    more = ["--model", whole, *adder[2:], "--loss.kl-coef", 0.1, "--sampled-tokens", 200, "--distributed", "fsdp"]
    assert _train(*more, "--out", tmp_path / "one") == 0
    run(2, _train, *more, "--out", tmp_path / "two", logs=tmp_path / "logs")
    ours, theirs = (_saved(tmp_path / name, "adapter_model") for name in ("two", "one"))
    assert _difference(ours, theirs) < 1e-3
    last = latest_checkpoint(tmp_path / "two")
    assert last is not None
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(adder[1])
        logits = peft.PeftModel.from_pretrained(base, last.path)(torch.tensor([[1, 2, 3]])).logits
        own = load_policy(last.path, dtype=torch.float32, device=CPU).model
        tokens, pos, end = torch.tensor([1, 2, 3]), torch.arange(3), torch.full((3,), 3, dtype=torch.int32)
        assert torch.allclose(own.packed(tokens, pos, end) @ own.head.T, logits[0], atol=1e-4)


def test_sigterm_to_one_stops_all_with_a_checkpoint(adder: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(2, _train, *adder, "--out", folder, "--sampled-tokens", 10**7, logs=tmp_path / "logs") as ranks:
        _wait_for_steps(folder, 3)
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert end(ranks) == [0, 0], (tmp_path / "logs" / "1.txt").read_text()
    steps = len(_rows(folder))
    last = latest_checkpoint(folder)
    assert last is not None
    assert last.step == steps
    assert "go on with: ibtpo train --resume" in (tmp_path / "logs" / "0.txt").read_text()


def test_a_signal_that_comes_while_the_others_are_asked_is_not_forgotten() -> None:
    trainer = object.__new__(Trainer)
    trainer.stop = StopRequest()

    class Asking(Group):
        def gather(self, value: Any, what: str) -> list[Any]:
            trainer.stop.signal = signal.SIGTERM  # as the handler does
            return [value]

    trainer.group = Asking()
    assert not trainer._agree_to_stop()
    assert trainer._agree_to_stop()
    assert trainer.stop.signal == signal.SIGTERM


def _wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(_rows(folder)) < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def test_torchrun_restarts_a_run_where_it_was(adder: list[object], tmp_path: Path) -> None:
    """Two nodes, here two launchers on one machine: the process of the second one is killed, the run goes on.

    It ends as one that is left alone does, to the last bit; the launcher of the first node does not count a restart.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, alone = tmp_path / "run", tmp_path / "alone"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--monitor-interval", "0.1",
        "--local-addr", "127.0.0.1", "-m", "ibtpo", "train", *adder, "--out", folder, "--sampled-tokens", "800",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    logs = [tmp_path / "node0.txt", tmp_path / "node1.txt"]
    nodes = []
    try:
        for path in logs:
            with path.open("w") as log:
                nodes.append(
                    subprocess.Popen(
                        list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
        _wait_for_steps(folder, 3)
        os.kill(_worker([node.pid for node in nodes], rank=1), signal.SIGKILL)
        codes = [node.wait(timeout=90) for node in nodes]
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    printed = "\n".join(path.read_text() for path in logs)
    assert codes == [0, 0], printed
    assert printed.count("2 processes, ddp") == 2
    assert (folder / "report.html").exists()
    run(2, _train, *adder, "--out", alone, "--sampled-tokens", "800", logs=tmp_path / "logs")
    _assert_same(folder, alone, within=1e-12)


def _worker(launchers: list[int], rank: int) -> int:
    """The process that a torchrun started as this rank."""
    for launcher in launchers:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return int(child)
    raise AssertionError(f"no torchrun has a child of rank {rank}")
