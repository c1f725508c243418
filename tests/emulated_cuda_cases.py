"""What `emulated_cuda` notices, and the CUDA branches of engine and trainer on it.

Collected by `test_emulated_cuda.py`, with that plugin. The engine's kernels run in Triton's interpreter; training runs
on plain torch, which takes less time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import emulated_cuda
import numpy as np
import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from engine_helpers import prompt_of, same, tiny_model
from safetensors.torch import load_file
from torch import Tensor

import ibtpo_kernels as K
from ibtpo.checkpoints import checkpoints
from ibtpo.cli import main
from ibtpo.tasks.data import DataTask
from ibtpo_engine import Engine, LoRA, Node, Sampling, initialise
from ibtpo_kernels import dispatch
from ibtpo_kernels.gpu import configs
from ibtpo_kernels.roofline import cli, roofs, small
from ibtpo_kernels.roofline.decode import plan_decode
from ibtpo_kernels.roofline.rows import read
from ibtpo_kernels.roofline.trees import DecodeTree

CUDA = torch.device("cuda", 0)
Train = Callable[..., list[dict[str, Any]]]


def captured(step: Callable[[], object]) -> Any:
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_devices_do_not_mix() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (there.device, (there + 1).device, there.cpu().device) == (CUDA, CUDA, here.device)
    for mix in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.stack([here, there]),
        lambda: here[there.long()],
    ):
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            mix()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        with pytest.raises(RuntimeError, match=f"Expected a '{device}' device type for generator but found '{other}'"):
            torch.rand(3, device=device, generator=torch.Generator(other))
    assert torch.equal((there * 2).cpu(), here * 2)
    assert here.copy_(there).device == here.device


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(4)),
        lambda x: x.copy_(torch.zeros(4), non_blocking=True),
        lambda x: x.copy_(torch.zeros(4, pin_memory=True)),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "mask", "tolist", "cpu", "copy", "pageable", "pinned", "tensor", "synchronize"],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_nothing_waits_within_a_capture(waiting: Callable[[Tensor], object], inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(4.0, device="cuda")
        waiting(x)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            captured(lambda: waiting(x))


def test_a_replay_is_what_was_captured_on_what_the_buffers_hold() -> None:
    pinned, out, factor = torch.ones(4, pin_memory=True), torch.zeros(4, device="cuda"), [2.0]

    def step() -> None:
        x = torch.zeros(4, device="cuda")
        x += pinned.to("cuda", non_blocking=True)
        out.copy_((x * factor[0])[1:].sum() + x)

    graph = captured(step)
    for value in (1.0, 3.0):
        pinned.fill_(value)
        factor[0] = 5.0  # read when it was captured
        graph.replay()
        assert out.tolist() == [7 * value] * 4


def test_pinned_memory_stays_until_the_copy_was_waited_for() -> None:
    pinned, there = torch.ones(4, pin_memory=True), torch.zeros(4, device="cuda")
    for copy in (lambda: there.copy_(pinned, non_blocking=True), lambda: pinned.to("cuda", non_blocking=True)):
        copy()
        pinned[1] += 1
        with pytest.raises(RuntimeError, match="pinned memory was written while a copy may have read it"):
            there.sum().item()
        copy()
        torch.cuda.synchronize()
        pinned[1] += 1
        there.sum().item()


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30], ids=["parts", "whole"])
def test_the_head_multiplies_16_bits_into_float32(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the operands are widened first; the sums over parts are float32, too."""
    monkeypatch.setattr(import_module("ibtpo_kernels.gpu.logprob"), "_CHUNK_BYTES", chunk_bytes)
    hidden, weight = torch.randn(70, 32).half(), (torch.randn(131, 32) / 6).half()
    rows, targets = torch.randint(0, 70, (90,)), torch.randint(0, 131, (90,))

    def gradients(x: Tensor, w: Tensor, *edges: Tensor) -> list[Tensor]:
        found = []
        for loss in (
            lambda: sum(out.sum() for out in K.linear_logprob(x, w, *edges)),
            lambda: K.policy_head(x, w, *edges, lambda logprob, entropy, *_: logprob.sum() + entropy.sum())[0],
        ):
            found += torch.autograd.grad(loss(), (x, w))
        return found

    there = gradients(*(x.to("cuda").requires_grad_() for x in (hidden, weight)), rows.to("cuda"), targets.to("cuda"))
    here = gradients(*(x.double().requires_grad_() for x in (hidden, weight)), rows, targets)
    for ours, exact in zip(there, here, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, atol=3e-3, rtol=3e-3)


SAMPLING = Sampling(max_tokens=3, temperature=0.8, top_p=0.95)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SPLIT", 16)
    monkeypatch.setattr(import_module("ibtpo_kernels.gpu.sample"), "_BLOCK", 64)


def grow(engine: Engine) -> list[Node]:
    """Two branches behind a prompt."""
    return engine.extend(engine.tree(prompt_of(7), key=0).root.fork(2), SAMPLING)


@pytest.mark.usefixtures("_small_blocks")
def test_a_default_device_and_type_do_not_matter() -> None:
    """To captured steps, fresh weights and fresh adapters."""
    grown, weights = [], []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        sampled, fresh = (tiny_model(layers=1).to(device) for _ in range(2))
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                grown.append(grow(Engine(sampled, kv_tokens=1024, cuda_graphs=device == "cuda")))
                initialise(fresh, 0).add_adapters(LoRA(rank=2))
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append([parameter.detach().cpu() for parameter in fresh.parameters()])
    same(*grown)
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


@pytest.mark.usefixtures("_small_blocks")
def test_a_path_that_grew_past_its_row_of_the_table_is_nan() -> None:
    """And reads no page of the row below, which is what follows in memory."""
    table = torch.arange(4, dtype=torch.int32).view(2, 2).to("cuda")
    rows, lengths = (torch.tensor(x, dtype=torch.int32).to("cuda") for x in ([0, 1], [32, 32]))
    pages, q = torch.randn(2, 4, 16, 1, 16).to("cuda"), torch.randn(2, 2, 16).to("cuda")
    plan = K.plan_decode(table, rows, lengths)
    before = K.tree_decode(q, *pages, plan).cpu()
    lengths += torch.tensor([8, 0], dtype=torch.int32).to("cuda")
    after = K.tree_decode(q, *pages, plan).cpu()
    assert after[0].isnan().all()
    assert torch.equal(after[1], before[1])


@pytest.mark.usefixtures("_small_blocks")
def test_a_plain_step_waits_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its rows, what they are sampled by, whether all have a distribution, and what was sampled."""
    counts = []
    for tokens in (2, 4):
        engine = Engine(tiny_model(layers=1).to("cuda"), kv_tokens=1024)
        monkeypatch.setattr(emulated_cuda, "waits", waits := [])
        engine.extend(engine.tree(prompt_of(7), key=0).root.fork(2), Sampling(max_tokens=tokens, temperature=0.8))
        counts.append(len(waits))
    assert counts[1] - counts[0] == 2 * 4


def test_a_table_is_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(12, dtype=torch.int32).view(4, 3)
    planner = K.DecodePlanner(table, device="cuda")
    monkeypatch.setattr(emulated_cuda, "waits", waits := [])
    for value in (50, 60):
        table[1], table[3, 2] = value, value + 1
        planner.rewrote(1)
        planner.extended(3, 2)
        planner.upload()
    assert waits == []
    assert planner.table.tolist() == table.tolist()


def test_the_roofline_of_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed by events, on inputs drawn on the device, with rows that name it."""
    bandwidth, product = roofs._bandwidth, roofs._product
    monkeypatch.setattr(roofs, "_bandwidth", lambda device, _, kind: bandwidth(device, 1 << 12, kind))
    monkeypatch.setattr(roofs, "_product", lambda device, _, dtype: product(device, 16, dtype))
    found = [
        small.append_kv(3, 1, 16, torch.float32),
        plan_decode("B4", DecodeTree((1, 4), (32, 16)), (2, 1, 16), CUDA),
    ]
    monkeypatch.setattr(cli, "problems", lambda device, quick: found)
    assert cli.main(["--device", "cuda", "--quick", "--seconds", "1e-9", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "roofline_emulated_cuda.csv")
    assert [row["who"] for row in rows if row["op"] == "append_kv" and row["median_us"]] == ["ibtpo", "index_copy_"]
    assert {row["device"] for row in rows} == {"Emulated CUDA"}
    assert (
        "FlashInfer cascade: not measured: FlashInfer (flashinfer-python) is not installed" in capsys.readouterr().out
    )


TINY = [
    "--sampled-tokens", "16", "--prompts-per-step", "2", "--search.rounds", "1", "--sampling.max-tokens", "4",
    "--eval.prompts", "1", "--eval.samples", "1", "--optim.lr", "1e-3", "--optim.warmup-steps", "1",
    "--engine.release", "always",
]  # fmt: skip


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains on plain ops, with rewards that differ; resumes, and returns the rows of all steps."""
    monkeypatch.setattr(DataTask, "grade", lambda self, problem, text, finished: float(sum(map(ord, text)) % 2))
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: None)
    model = save_checkpoint(tmp_path / "model", tied=True, context=64)
    data = save_additions(tmp_path / "rows.jsonl")

    def run(device: str, *more: str) -> list[dict[str, Any]]:
        folder = tmp_path / device
        inputs = ["--model", model, "--task", "data", "--data", data, "--device", device]
        assert main(["train", *map(str, inputs), "--out", str(folder), *TINY, *more]) == 0
        assert main(["train", "--resume", str(folder), "--sampled-tokens", "48"]) == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return [row for row in rows if "optimizer_steps" in row]

    return run


def test_training_is_the_cpus(train: Train, tmp_path: Path) -> None:
    """The same samples, losses, gradients and weights, also of a step after a resume."""
    devices = ("cuda", "cpu")
    there, here = (train(device, "--dtype", "float32") for device in devices)
    assert len(there) == len(here) == 2
    for name in ("loss", "reward", "grad_norm", "entropy", "tokens_sampled", "tokens_trained", "optimizer_steps"):
        ours, theirs = ([row[name] for row in rows] for rows in (there, here))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6, err_msg=name)
    assert all(row["optimizer_steps"] for row in there)
    weights = [load_file(checkpoints(tmp_path / device)[-1].path / "model.safetensors") for device in devices]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [["--advantage.pi-ref", "reference"], ["--lora.rank", "4"]], ids=["all", "LoRA"])
def test_training_in_bf16(train: Train, more: list[str]) -> None:
    """With masters in float32; it learns from samples that the trainer finds as likely as the engine did."""
    rows = train("cuda", "--dtype", "bfloat16", *more)
    assert len(rows) == 2
    for row in rows:
        assert row["optimizer_steps"]
        assert row["grad_norm"] > 0
        assert row["logprob_gap"] < 0.02
