"""Several processes: the loss, gradients, updates, trees and checkpoints of one, and ends that name the culprit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from engine_helpers import tiny_model
from processes import end, run, start
from safetensors.torch import load_file
from trees import VOCABULARY, chain, estimate, random_trajectories

from ibtpo.advantage import advantage
from ibtpo.cli import main
from ibtpo.config import AdvantageConfig, EngineConfig, LoRAConfig, LossConfig, OptimConfig, SamplingConfig, TrainConfig
from ibtpo.distributed import ALONE, Group, choose_mode, device_name, join, learner, make_learner, restarted
from ibtpo.distributed.exchange import freeze, thaw
from ibtpo.distributed.group import balance
from ibtpo.distributed.learner import ddp_bytes
from ibtpo.metrics import tree_metrics
from ibtpo.pack import pack
from ibtpo.runlog import latest_checkpoint
from ibtpo.update import Updater, frozen_copy
from ibtpo_engine import Model, Tree

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
    model, optimizer = make_learner(config, full, group, choose_mode(config, full, group))
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        gradients.append({name: _whole(p.grad).clone() for name, p in optimizer._masters.items()})

    optimizer._adamw.register_step_pre_hook(keep)
    updater = Updater(model, optimizer, reference, config, group=group, full=full)
    metrics = [updater.update(_trees(seed)) for seed in range(steps)]
    weights = {name: p.detach().clone() for name, p in full.named_parameters()}
    return {"metrics": metrics, "gradients": gradients, "weights": weights, "state": optimizer.state()}


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


@pytest.mark.parametrize(("size", "mode", "dtype", "within"), [
    (2, "ddp", torch.float64, 1e-9),
    (2, "fsdp", torch.float64, 1e-9),
    (4, "ddp", torch.float32, 2e-5),
    (4, "fsdp", torch.float64, 1e-9),
    (2, "fsdp", torch.bfloat16, 0.05),
])  # fmt: skip
def test_loss_gradients_and_updates_are_those_of_one_process(
    size: int, mode: Any, dtype: torch.dtype, within: float, tmp_path: Path
) -> None:
    """Of a global batch whose trees, micro-batches and denominators are spread unevenly; for two optimizer steps."""
    config = replace(CONFIG, distributed=mode)
    run(size, _update_as_rank, config, dtype, tmp_path / "result.pt", logs=tmp_path / "logs")
    ours = torch.load(tmp_path / "result.pt")
    theirs = _update(config, dtype, ALONE)
    (metrics,), (expected,) = ours["metrics"], theirs["metrics"]
    assert metrics.keys() == expected.keys()
    assert expected["optimizer_steps"] == 2
    assert expected["groups_skipped"] == 1
    for name in metrics.keys() - {"tokens_trained", "training_efficiency"}:  # the same tokens may be cut otherwise
        assert metrics[name] == pytest.approx(expected[name], rel=max(within, 1e-6), abs=within), name
    assert len(ours["gradients"]) == len(theirs["gradients"]) == 2
    for mine, other in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert _difference(mine, other) < within
    assert _difference(ours["weights"], theirs["weights"]) < within
    assert _difference(ours["state"], theirs["state"]) < 2 * within  # second moments are squares
    if dtype != torch.bfloat16:  # which rounds a small update away; the masters in the state have it
        before = dict(tiny_model(0, vocabulary=VOCABULARY, dtype=dtype).named_parameters())
        assert [name for name, weight in theirs["weights"].items() if torch.equal(weight, before[name])] == []


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
        if group.rank != 1:
            group.meet("count heads")
        time.sleep(2)


def test_who_does_not_come_in_time_is_named(tmp_path: Path) -> None:
    codes = end(start(3, _one_is_missing, replace(CONFIG, distributed_timeout=0.5), logs=tmp_path))
    assert all(codes)
    assert "waited 0.5 s for rank 1 of 3 to count heads" in (tmp_path / "0.txt").read_text()


def _one_raises(config: TrainConfig) -> None:
    with join(config) as group:
        if group.rank == 1:
            raise ValueError("the third row\n has no answer")
        group.gather(group.rank, "go on")


def test_one_that_raises_ends_all_with_its_message(tmp_path: Path) -> None:
    began = time.monotonic()
    assert all(end(start(3, _one_raises, CONFIG, logs=tmp_path)))
    assert time.monotonic() - began < 20
    assert "ValueError: the third row" in (tmp_path / "1.txt").read_text()
    assert "rank 1 failed: the third row has no answer" in (tmp_path / "0.txt").read_text()
    assert "third row" not in (tmp_path / "2.txt").read_text()


class _Twins(Group):
    """Two processes that bring the same."""

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, value]


def test_auto_takes_shares_where_whole_copies_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    config = replace(CONFIG, engine=EngineConfig(kv_tokens=1000))
    parameters = sum(p.numel() for p in model.parameters())
    kv = 1000 * 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, fp32
    assert ddp_bytes(config, model) == (8 + 4 + 4) * parameters + kv  # moments, gradients, reference
    assert ddp_bytes(config, tiny_model(dtype=torch.bfloat16)) == (4 + 8 + 6 + 2) * parameters + kv // 2
    monkeypatch.setattr(learner, "free_memory", lambda device: 2 * ddp_bytes(config, model))
    assert choose_mode(config, model, _Twins(0, 2)) == "ddp"
    monkeypatch.setattr(learner, "free_memory", lambda device: ddp_bytes(config, model))
    assert choose_mode(config, model, _Twins(0, 2)) == "fsdp"
    assert choose_mode(config, model, ALONE) == "ddp"
    assert choose_mode(replace(config, distributed="ddp"), model, _Twins(0, 2)) == "ddp"


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
    assert restarted(config) == config
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(config).resume == tmp_path
    assert restarted(replace(config, out=tmp_path / "none")).resume is None
    assert restarted(replace(config, out=None)).resume is None


def test_fsdp_refuses_adapters() -> None:
    config = replace(CONFIG, distributed="fsdp", lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="train adapters with --distributed ddp"):
        choose_mode(config, Model(tiny_model().config), Group(0, 2))
    assert choose_mode(replace(config, distributed="auto"), Model(tiny_model().config), Group(0, 2)) == "ddp"


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("adder")
    return [
        "--model", save_checkpoint(folder / "model", teach=40), "--data", save_additions(folder / "rows.jsonl"), *TINY,
    ]  # fmt: skip


def _train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "tokens_sampled" in row]


def _saved(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    last = latest_checkpoint(folder)
    assert last is not None
    return load_file(last.path / f"{name}.safetensors")


def test_a_run_goes_on_in_any_number_of_processes(adder: list[object], tmp_path: Path) -> None:
    """1, then 2 with shares, then 1: it ends where a run in one process does."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(*adder, "--out", whole, "--sampled-tokens", 900) == 0
    assert _train(*adder, "--out", parts, "--sampled-tokens", 200) == 0
    first = len(_rows(parts))
    run(2, _train, "--resume", parts, "--sampled-tokens", 500, "--distributed", "fsdp", logs=tmp_path / "logs")
    second = len(_rows(parts))
    assert "2 processes, fsdp" in (tmp_path / "logs" / "0.txt").read_text()
    assert (tmp_path / "logs" / "1.txt").read_text() == ""
    assert _train("--resume", parts, "--sampled-tokens", 900) == 0
    assert 0 < first < second < len(_rows(parts))
    for ours, theirs in zip(_rows(parts), _rows(whole), strict=True):
        assert ours["tokens_sampled"] == theirs["tokens_sampled"]
        assert ours["reward"] == pytest.approx(theirs["reward"])
    assert _saved(parts, "optimizer").keys() == _saved(whole, "optimizer").keys()
    assert _difference(_saved(parts, "optimizer"), _saved(whole, "optimizer")) < 0.02
    assert _difference(_saved(parts), _saved(whole)) < 1e-3
    assert sum(row["optimizer_steps"] for row in _rows(parts)) > 2


def test_adapters_train_in_two_processes(adder: list[object], tmp_path: Path) -> None:
    lora = [*adder, "--lora.rank", 4, "--loss.kl-coef", 0.1, "--sampled-tokens", 400]
    assert _train(*lora, "--out", tmp_path / "one") == 0
    run(2, _train, *lora, "--out", tmp_path / "two", logs=tmp_path / "logs")
    assert [row["tokens_sampled"] for row in _rows(tmp_path / "two")] == [
        row["tokens_sampled"] for row in _rows(tmp_path / "one")
    ]
    ours, theirs = (_saved(tmp_path / name, "adapter_model") for name in ("two", "one"))
    assert _difference(ours, theirs) < 1e-3


def test_sigterm_to_one_stops_all_with_a_checkpoint(adder: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start(2, _train, *adder, "--out", folder, "--sampled-tokens", 10**7, logs=tmp_path / "logs")
    _wait_for_steps(folder, 3)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert end(ranks) == [0, 0]
    steps = len(_rows(folder))
    last = latest_checkpoint(folder)
    assert last is not None
    assert last.step == steps
    assert "go on with: ibtpo train --resume" in (tmp_path / "logs" / "0.txt").read_text()


def _wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(_rows(folder)) < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def test_torchrun_restarts_a_run_where_it_was(adder: list[object], tmp_path: Path) -> None:
    """One command: rank 1 is killed on the way, the run ends complete all the same."""
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "-m", "ibtpo", "train", *adder, "--out", folder, "--sampled-tokens", "4000",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        _wait_for_steps(folder, 3)
        os.kill(_worker(launcher.pid, rank=1), signal.SIGKILL)
        printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, printed
    assert [row["step"] for row in _rows(folder)] == list(range(1, len(_rows(folder)) + 1))
    assert sum(row["tokens_sampled"] for row in _rows(folder)) >= 4000
    assert printed.count("2 processes, ddp") == 2
    assert (folder / "report.html").exists()


def _worker(launcher: int, rank: int) -> int:
    """The process that torchrun started as this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"torchrun has no child of rank {rank}")
