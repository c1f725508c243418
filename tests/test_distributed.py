"""Several processes: the loss, gradients, updates and trees of one, and ends that name the culprit."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.distributed as dist
from adder_runs import difference
from engine_helpers import tiny_model
from processes import run, time_limit
from torch.distributed.tensor import DTensor, distribute_tensor
from trees import VOCABULARY, chain, estimate, random_trajectories

from ibtpo import memory_plan
from ibtpo.advantage import advantage
from ibtpo.config import AdvantageConfig, LoRAConfig, LossConfig, OptimConfig, SamplingConfig, TrainConfig
from ibtpo.distributed import ALONE, Follower, Group, device_name, join, make_learner, restarted
from ibtpo.distributed.group import balance
from ibtpo.memory_fit import check_memory
from ibtpo.memory_plan import Processes, plan_memory
from ibtpo.metrics import tree_metrics
from ibtpo.optim import MasterAdamW, NonFinite, splits_in_blocks
from ibtpo.pack import pack
from ibtpo.runlog import RunFolder
from ibtpo.stopping import Interrupted
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
        assert difference(mine, expected) < within
    assert difference(ours["weights"], theirs["weights"]) < within
    assert difference(ours["state"], theirs["state"]) < 2 * within  # second moments are squares


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
    back = pickle.loads(pickle.dumps(trees))
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
    back = pickle.loads(pickle.dumps(tree))
    assert (back.export().tokens == tree.export().tokens).all()
    assert back.notes["ib"].value(back.root) == 1.0


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


def _is_on_no_network(config: TrainConfig) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "none7"
    with join(config):
        pass


def test_processes_that_met_and_cannot_connect_are_told_of_the_interface(tmp_path: Path) -> None:
    """As where a host's name stands for 127.0.1.1: torchrun's flags were right, the others met by them."""
    run(2, _is_on_no_network, CONFIG, logs=tmp_path, ends_well=False)
    for rank in range(2):
        printed = (tmp_path / f"{rank}.txt").read_text()
        assert "none7" in printed
        assert "set GLOO_SOCKET_IFNAME on every node" in printed
        assert "--nnodes" not in printed


def _one_does_something_else(config: TrainConfig) -> None:
    with join(config) as group:
        group.gather(group.rank, "exchange their trees" if group.rank else "measure memory")


def test_processes_that_part_ways_say_so_instead_of_mixing_up_what_they_send(tmp_path: Path) -> None:
    run(2, _one_does_something_else, CONFIG, logs=tmp_path, ends_well=False)
    expected = "do different things (rank 0 to measure memory, rank 1 to exchange their trees)"
    assert expected in (tmp_path / "0.txt").read_text()


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


def _all_are_interrupted(config: TrainConfig) -> None:
    with pytest.raises(Interrupted if os.environ["RANK"] == "0" else SystemExit), join(config):
        raise Interrupted
    assert not dist.is_initialized(), "NCCL warns of communicators that are left to the end of the process"


def test_an_interrupted_run_leaves_nothing_open(tmp_path: Path) -> None:
    run(2, _all_are_interrupted, CONFIG, logs=tmp_path)


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


EIGHT = OptimConfig(state="8bit", lr=1e-2, grad_clip=1e9, weight_decay=0.1)


def _step(optimizer: MasterAdamW, seed: int, dtype: torch.dtype) -> None:
    """One step on gradients that depend on the seed alone; the first parameter has none in the first step."""
    generator = torch.Generator().manual_seed(seed)
    for i, (name, master) in enumerate(optimizer._masters.items()):
        gradient = torch.randn(master.shape, generator=generator).to(dtype)
        if i or seed:
            parameter = optimizer._parameters[name]
            gradient = gradient.to(parameter.dtype)
            if isinstance(master, DTensor):
                gradient = distribute_tensor(gradient, master.device_mesh, master.placements, src_data_rank=None)
            parameter.grad = gradient
    optimizer.step()


def _eight_bits(config: TrainConfig, rows: int, dtype: torch.dtype, out: Path) -> None:
    """Three steps; after the second what is saved is put into another optimizer, which goes on the same."""
    with join(config) as group:

        def learner(seed: int) -> tuple[Model, MasterAdamW]:
            full = tiny_model(seed, vocabulary=rows, hidden=128, dtype=dtype).requires_grad_(True)
            return full, make_learner(config, full, group, "fsdp")[1]

        full, optimizer = learner(0)
        _step(optimizer, 0, dtype)
        _step(optimizer, 1, dtype)
        state = group.gather(optimizer.state(), "pass the state on")[0]
        again, other = learner(5)
        again.load_state_dict(full.state_dict())
        for name, parameter in other._parameters.items():
            parameter.detach().copy_(optimizer._masters[name].detach())
        other.load_state(state)
        for each in (optimizer, other):
            _step(each, 2, dtype)
        assert all(torch.equal(p, again.get_parameter(name)) for name, p in full.named_parameters())
        last = optimizer.state()
        if group.leads:
            held = [kept["state1"].nbytes for kept in optimizer._adamw.state.values()]
            weights = {name: p.detach() for name, p in full.named_parameters()}
            torch.save({"weights": weights, "middle": state, "state": last, "held": sum(held)}, out)


@pytest.mark.parametrize(
    ("size", "rows", "dtype"), [(2, 60, torch.float32), (4, 62, torch.float32), (2, 60, torch.bfloat16)]
)
def test_a_state_in_8_bits_is_split_and_is_to_the_bit_that_of_one_process(
    size: int, rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """62 rows over four processes are 16, 16, 16 and 14; the norms and the smaller matrices stay in float32."""
    pytest.importorskip("bitsandbytes")
    run(size, _eight_bits, replace(CONFIG, optim=EIGHT), rows, dtype, tmp_path / "out.pt", logs=tmp_path / "logs")
    theirs = torch.load(tmp_path / "out.pt")
    full = tiny_model(0, vocabulary=rows, hidden=128, dtype=dtype).requires_grad_(True)
    alone = MasterAdamW(full, EIGHT)
    for seed in range(3):
        _step(alone, seed, dtype)
        expected = {1: theirs["middle"], 2: theirs["state"]}.get(seed, {})
        state = alone.state()
        assert not expected or expected.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in expected.items())
    assert all(torch.equal(p, theirs["weights"][name]) for name, p in full.named_parameters())
    kinds = {kept["state1"].dtype for kept in alone._adamw.state.values()}
    assert kinds == {torch.uint8, torch.float32}
    whole = sum(kept["state1"].nbytes for kept in alone._adamw.state.values())
    assert whole / size <= theirs["held"] < 1.1 * whole / size


@pytest.mark.parametrize(("shape", "processes", "splits"), [
    ((896, 896), 2, True),
    ((151936, 896), 8, True),
    ((62, 128), 4, True),
    ((90, 64), 2, False),
    ((62, 128), 3, False),
    ((10, 64), 3, True),  # few enough to stay in float32
    ((8192,), 2, True),
    ((8192 + 512,), 3, False),
])  # fmt: skip
def test_blocks_of_8_bits_are_not_cut(shape: tuple[int, ...], processes: int, splits: bool) -> None:
    assert splits_in_blocks(torch.Size(shape), processes) == splits


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
    eight = replace(CONFIG, distributed="fsdp", optim=OptimConfig(state="8bit"))
    assert check_memory(eight, shape, CPU, twins)[0] == "fsdp"  # its matrices are small enough for float32
    odd = tiny_model(vocabulary=90, hidden=64).config
    said = r"8bit optimizer state of model.embed_tokens.weight \[90, 64\] over 2 processes, .* --optim.state float32"
    with pytest.raises(ValueError, match=said):
        check_memory(eight, odd, CPU, twins)
    assert check_memory(replace(eight, distributed="auto"), odd, CPU, twins)[0] == "ddp"
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
