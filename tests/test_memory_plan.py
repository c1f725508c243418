"""The memory plan against tensors; what does not fit is refused with flags that do; fewer bytes, the same numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from engine_helpers import tiny_model
from rich.console import Console
from torch import nn

import ibtpo.memory_plan
from ibtpo.checkpoints import latest_checkpoint
from ibtpo.config import (
    AdvantageConfig,
    EngineConfig,
    EvalConfig,
    JsonlConfig,
    LoRAConfig,
    LossConfig,
    OptimConfig,
    SamplingConfig,
    SearchConfig,
    TrainConfig,
)
from ibtpo.memory_fit import check_memory, fitting_flags
from ibtpo.memory_plan import GIB, Processes, activation_bytes, largest_micro_batch, plan_memory
from ibtpo.optim import MasterAdamW
from ibtpo.policy import adapters_of
from ibtpo.pool_bound import least_pool, pool_warning
from ibtpo.search import make_search
from ibtpo.setup import find_nonfinite, longest_prompt
from ibtpo.tasks import Problem, format_prompt, make_task
from ibtpo.train import train
from ibtpo.update import frozen_copy
from ibtpo_engine import (
    Engine,
    Model,
    ModelConfig,
    OutOfPages,
    Sampling,
    initialise,
    load_tokenizer,
    save_adapter,
)
from ibtpo_kernels.one_pass import GPU_CHUNK_BYTES

CPU = torch.device("cpu")
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RUN = TrainConfig(model="elsewhere", task="jsonl", dtype="bfloat16")
LORA = LoRAConfig(rank=4)


def shape_of(architecture: str = "Qwen3ForCausalLM", **fields: object) -> ModelConfig:
    return ModelConfig.from_dict(SHAPE | {"architectures": [architecture]} | fields)


def model_of(shape: ModelConfig, config: TrainConfig) -> Model:
    model = initialise(Model(shape), 0).to(getattr(torch, config.dtype))
    if (lora := adapters_of(config)) is not None:
        model.add_adapters(lora)
    return model


def forest(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (tokens,), generator=generator)
    return ids, torch.arange(tokens), torch.full((tokens,), tokens, dtype=torch.int32)


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LoRAConfig(), LORA, LoRAConfig(rank=40, targets="mlp")], ids=lambda c: c.rank)
@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_is_planned_to_the_byte(dtype: Any, lora: LoRAConfig, tied: bool) -> None:
    """Weights, masters, running means, gradients, reference and pool; steps and rounding up to pages apart."""
    config = replace(RUN, dtype=dtype, lora=lora, engine=EngineConfig(kv_tokens=1000))
    shape = shape_of(tie_word_embeddings=tied)
    model = model_of(shape, config)
    parts = plan_memory(config, shape, CPU).parts
    assert parts["weights"] == nbytes(model.parameters())
    optimizer = MasterAdamW(model, config.optim)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state()
    assert parts["master weights"] == nbytes(v for k, v in state.items() if k.startswith("master."))
    assert parts["optimizer state"] == nbytes(v for k, v in state.items() if k.startswith("exp_avg"))
    assert parts["gradients"] == sum(p.numel() for p in trained) * 4
    assert parts["reference model"] == (0 if lora.rank else nbytes(frozen_copy(model).parameters()))
    pool = Engine(model, kv_tokens=1000).cache.pool
    assert parts["KV pool"] == nbytes((pool.keys, pool.values))


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LoRAConfig(), LORA], ids=lambda c: c.rank)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(
    architecture: str, dtype: Any, lora: LoRAConfig, checkpointing: bool
) -> None:
    """Within the two tensors of one layer: below the first adapter nothing is kept; of a checkpointed model, layers'
    inputs are kept before the backward pass, the one whole layer during it."""
    config = replace(RUN, dtype=dtype, lora=lora, gradient_checkpointing=checkpointing)
    shape = shape_of(architecture)
    model, tokens = model_of(shape, config), 97
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.packed(*forest(tokens), checkpointing=checkpointing)
    assert hidden.requires_grad
    planned = activation_bytes(shape, config, tokens)
    slack = tokens * (getattr(torch, dtype).itemsize * shape.hidden_size + 8)
    if checkpointing:
        whole = activation_bytes(replace(shape, num_layers=1), replace(config, gradient_checkpointing=False), tokens)
        planned -= whole - tokens * (getattr(torch, dtype).itemsize * shape.hidden_size + 4 * shape.head_dim + 12)
    assert abs(sum(kept.values()) - planned) <= slack


@pytest.mark.parametrize("lora", [LoRAConfig(), LORA], ids=lambda c: c.rank)
def test_checkpointing_changes_no_bit_of_the_gradients(lora: LoRAConfig) -> None:
    config = replace(RUN, dtype="float32", lora=lora)
    gradients = []
    for checkpointing in (False, True):
        model = model_of(shape_of(), config)
        model.packed(*forest(97), checkpointing=checkpointing).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


BIG = shape_of(vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, head_dim=128)


@pytest.mark.parametrize(
    ("config", "gib", "parts"),
    [
        (RUN, 45.0, ["micro-batch-tokens"]),
        (replace(RUN, micro_batch_tokens=2048, engine=EngineConfig(kv_tokens=900_000)), 35.0, ["engine.kv-tokens"]),
        (RUN, 29.0, ["micro-batch-tokens", "gradient-checkpointing"]),
        (RUN, 12.0, ["lora.rank"]),
        (replace(RUN, lora=LoRAConfig(rank=64)), 5.5, ["gradient-checkpointing"]),
    ],
)
def test_the_flags_that_are_offered_fit_and_little_more_would_not(
    config: TrainConfig, gib: float, parts: list[str]
) -> None:
    free = int(gib * GIB)
    device = torch.device("cuda")
    assert not plan_memory(config, BIG, device, free=free).fits
    flags = fitting_flags(config, BIG, device, free)
    assert flags is not None
    assert all(part in flags for part in parts), flags
    words = flags.split()
    value = {
        name: int(words[i + 1])
        for i, name in enumerate(words)
        if name.startswith("--") and i + 1 < len(words) and words[i + 1].isdigit()
    }
    changed = replace(
        config,
        micro_batch_tokens=value.get("--micro-batch-tokens", config.micro_batch_tokens),
        engine=replace(config.engine, kv_tokens=value.get("--engine.kv-tokens", config.engine.kv_tokens)),
        lora=replace(config.lora, rank=value.get("--lora.rank", config.lora.rank)),
        gradient_checkpointing="--gradient-checkpointing" in words,
    )
    assert plan_memory(changed, BIG, device, free=free).fits
    if "--micro-batch-tokens" in value:
        more = replace(changed, micro_batch_tokens=changed.micro_batch_tokens + 256)
        assert not plan_memory(more, BIG, device, free=free).fits


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_a_gpu_is_planned_with_the_chunk_of_its_own_kernels(dtype: Any, size: int) -> None:
    """They hold the logits in fp32 and their gradient, of more rows than the CPU takes at a time."""
    config = replace(RUN, dtype=dtype, lora=LoRAConfig(rank=8), micro_batch_tokens=8192)
    plan = plan_memory(config, BIG, torch.device("cuda"), free=0)
    logits = plan.parts["log-prob workspace"] - 2 * size * plan.tokens * BIG.hidden_size
    rows = logits // (BIG.vocab_size * (4 + size))
    assert rows % 128 == 0
    assert 0.8 * GPU_CHUNK_BYTES < logits <= GPU_CHUNK_BYTES


def _offer(config: TrainConfig, shape: ModelConfig, gib: float, **options: Any) -> str:
    """The flags offered where so much is free, on a GPU: there the process itself does not count."""
    return fitting_flags(config, shape, torch.device("cuda"), int(gib * GIB), **options) or ""


EIGHT = shape_of(
    vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, max_position_embeddings=40_960,
)  # fmt: skip
WIDE = TrainConfig(model="elsewhere", task="jsonl")


def test_what_changes_training_least_is_offered_first() -> None:
    """8 B parameters in fp32, on ever smaller devices."""
    assert "--" not in _offer(WIDE, EIGHT, 190).replace("--micro-batch-tokens", "")
    assert "--gradient-checkpointing" in _offer(WIDE, EIGHT, 170)
    assert _offer(WIDE, EIGHT, 135).endswith("--optim.state 8bit")
    no_penalty = replace(WIDE, loss=LossConfig(kl_coef=0))
    assert "--loss.kl-coef 0" in _offer(WIDE, EIGHT, 85) and "--lora.rank" not in _offer(WIDE, EIGHT, 85)
    assert "--loss.kl-coef" not in _offer(no_penalty, EIGHT, 85)
    assert _offer(WIDE, EIGHT, 48).endswith("--gradient-checkpointing --lora.rank 64")
    assert "--gradient-checkpointing --dtype bfloat16 --lora.rank" in _offer(WIDE, EIGHT, 21.4)
    assert _offer(WIDE, EIGHT, 12) == ""


def test_only_what_may_change_is_offered(tmp_path: Path) -> None:
    """Of a resumed run neither type nor adapters nor the optimizer's state; no adapters in bitwise parity."""
    resumed = replace(WIDE, resume=tmp_path)
    assert _offer(resumed, EIGHT, 135).endswith("--gradient-checkpointing --loss.kl-coef 0")
    assert _offer(resumed, EIGHT, 85) == ""
    assert _offer(replace(WIDE, parity="bitwise"), EIGHT, 48) == ""
    keeps = replace(WIDE, advantage=AdvantageConfig(pi_ref="reference"))
    assert "kl-coef" not in _offer(keeps, EIGHT, 85)
    assert _offer(WIDE, EIGHT, 135, processes=Processes(2, "fsdp")).endswith("--optim.state 8bit")
    odd = replace(EIGHT, vocab_size=151_937, hidden_size=4000)  # a block of its embedding would lie on two processes
    assert "8bit" not in _offer(WIDE, odd, 135, processes=Processes(2, "fsdp"))


@pytest.mark.parametrize("gib", [190, 135, 85, 21.4])
def test_the_offer_says_what_it_changes(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibtpo.memory_plan, "free_memory", lambda device: int(gib * GIB))
    with pytest.raises(ValueError) as refused:
        check_memory(WIDE, EIGHT, torch.device("cuda"))
    flags, meaning = str(refused.value).partition("the nearest settings that fit: ")[2].rstrip(")").split(" (", 1)
    for flag, word in (("8bit", "running means"), ("kl-coef", "KL"), ("bfloat16", "rounds"), ("rank", "adapters")):
        assert (flag in flags) == (word in meaning)
    assert ("learns the same" in meaning) == (gib == 190)


METHODS = [
    SearchConfig(),
    SearchConfig(method="random-tree", lookahead=3),
    SearchConfig(method="independent"),
    SearchConfig(method="eptree", initial_branches=3, nodes_per_round=2, rounds=2),
    SearchConfig(method="treepo", segment_tokens=20),
    SearchConfig(method="tree-grpo", initial_branches=3, nodes_per_round=2, rounds=2),
    SearchConfig(method="vineppo", group_size=2, value_rollouts=4),
]


@pytest.mark.parametrize("search", METHODS, ids=lambda search: search.method)
@pytest.mark.parametrize("prompt", [1, 31, 33])
def test_every_tree_fits_into_the_smallest_pool_offered(search: SearchConfig, prompt: int) -> None:
    """No trajectory stops before its limit, several trees grow at once; two trajectories of pages hold none."""
    config = replace(RUN, search=search, sampling=SamplingConfig(max_tokens=50), eval=EvalConfig(samples=2))
    pool = least_pool(config, prompt=prompt, context=512)
    grow = make_search(config.search, config.ib, lambda tokens: range(9, len(tokens), 9), 50)
    for kv_tokens in (pool, 2 * (prompt + 50)):
        engine = Engine(tiny_model(), kv_tokens=kv_tokens)
        trees = engine.run(
            grow, [[*range(1, prompt + 1)]] * 3, Sampling(max_tokens=50), reward=lambda tree, leaf: leaf.tokens[0] % 2
        )
        if kv_tokens == pool:
            assert all(len(tree.leaves()) == search.trajectories for _, tree in trees)
        else:
            with pytest.raises(OutOfPages):
                list(trees)


def test_the_smallest_pool_holds_an_evaluation_and_no_path_beyond_the_context() -> None:
    one = replace(RUN, search=SearchConfig(method="independent", group_size=1), sampling=SamplingConfig(max_tokens=50))
    many = replace(one, eval=EvalConfig(samples=9))
    assert least_pool(many, prompt=20, context=512) == 16 * (2 + 9 * 5)
    assert least_pool(many, prompt=500, context=512) == least_pool(many, prompt=462, context=512)
    assert least_pool(replace(many, sampling=SamplingConfig(max_tokens=10**6)), prompt=9, context=40) < 16 * 10 * 5


def test_the_pool_stays_on_a_gpu_where_graphs_would_be_captured_anew_and_there_is_room() -> None:
    device, engine = torch.device("cuda"), EngineConfig(cuda_graphs=True)
    captured = replace(WIDE, engine=engine)
    kept = plan_memory(captured, shape_of(), device, free=1 << 50)
    assert not kept.release and plan_memory(WIDE, shape_of(), device, free=1 << 50).release
    assert plan_memory(captured, shape_of(), device, free=kept.total - 1).release
    assert not plan_memory(captured, shape_of(), device, free=kept.total).release


def test_graphs_have_logits_of_their_own_that_are_released_with_the_pool() -> None:
    device, shape = torch.device("cuda"), shape_of()
    engine = EngineConfig(release="never", max_branches=4)
    plans = [
        plan_memory(replace(WIDE, engine=replace(engine, **changes)), shape, device, free=1 << 50)  # type: ignore[arg-type]
        for changes in ({}, {"cuda_graphs": True}, {"cuda_graphs": True, "release": "always"})
    ]
    without, kept, released = plans
    graphs = kept.parts["CUDA graphs"]
    assert without.parts["CUDA graphs"] == 0 < 2 * 4 * 4 * shape.vocab_size < graphs == released.parts["CUDA graphs"]
    assert all(kept.phases[name] == without.phases[name] + graphs for name in without.phases)
    assert released.phases["sampling"] == kept.phases["sampling"]
    assert released.phases["backward pass"] == kept.phases["backward pass"] - kept.parts["KV pool"] - graphs


def test_a_pool_that_may_not_hold_a_tree_is_warned_of() -> None:
    config = replace(RUN, sampling=SamplingConfig(max_tokens=50))
    least = least_pool(config, prompt=31, context=512)
    for pool, warned in ((least, False), (least - 16, True), (least_pool(config, prompt=512, context=512), False)):
        own = replace(config, engine=replace(config.engine, kv_tokens=pool))
        warning = pool_warning(own, longest_prompt=lambda: 31, context=512)
        assert (warning is not None) == warned
        assert warning is None or f"up to {least:,} tokens" in warning


def test_no_pool_is_offered_that_one_tree_may_not_fit_into() -> None:
    """Where less is free the type is changed, not the pool; and no micro-batch is smaller than a trajectory."""
    shape, device = shape_of(max_position_embeddings=1024), torch.device("cuda")
    config = replace(WIDE, sampling=SamplingConfig(max_tokens=256), engine=EngineConfig(release="never"))
    least = least_pool(config, prompt=300, context=1024)
    engine = replace(config.engine, kv_tokens=least)
    poorest = replace(config, micro_batch_tokens=768, engine=engine, gradient_checkpointing=True)
    free = plan_memory(poorest, shape, device, free=0).total
    flags = f"--micro-batch-tokens 768 --engine.kv-tokens {least} --gradient-checkpointing"
    assert fitting_flags(config, shape, device, free, prompt=300) == flags
    less = fitting_flags(config, shape, device, free - 1, prompt=300) or ""
    assert f"--engine.kv-tokens {least} " in less
    assert "--optim.state 8bit" in less


def test_the_longest_prompt_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    """Of a file, with the checkpoint's tokenizer; most rows need not be tokenized to know that they are shorter."""
    tokenizer = load_tokenizer(save_checkpoint(tmp_path / "model"))
    rows = [{"prompt": f"{'9' * (37 * i % 101)}+1", "answer": "0"} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(RUN, data=data)
    task = make_task(config)
    lengths = [len(format_prompt(tokenizer, Problem(row["prompt"], "0"), config.jsonl)) for row in rows]
    assert longest_prompt(task, tokenizer, config) == max(lengths)
    assert longest_prompt(task, tokenizer, replace(config, jsonl=JsonlConfig(max_prompt_tokens=7))) == 7
    task.close()


def test_what_an_adapter_folder_holds_is_planned(tmp_path: Path) -> None:
    """Without --lora.rank its adapters are trained: the plan is that of a run that asks for the same."""
    shape = shape_of()
    model = model_of(shape, replace(RUN, lora=LoRAConfig(rank=4, targets="mlp")))
    save_adapter(model, tmp_path, base="elsewhere")
    implied = plan_memory(replace(RUN, model=str(tmp_path)), shape, CPU, free=0)
    asked = plan_memory(replace(RUN, model=str(tmp_path), lora=LoRAConfig(rank=4, targets="mlp")), shape, CPU, free=0)
    whole = plan_memory(RUN, shape, CPU, free=0)
    assert {**implied.parts, "process": 0} == {**asked.parts, "process": 0}
    assert implied.parts["optimizer state"] < whole.parts["optimizer state"] / 4
    assert "lora" not in _offer(replace(RUN, model=str(tmp_path)), BIG, 8)


def test_a_run_that_does_not_fit_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    config = replace(TrainConfig(), device="cpu", out=tmp_path / "run", engine=EngineConfig(kv_tokens=10**12))
    with pytest.raises(
        ValueError, match=r"KV pool.* nothing was allocated; the nearest settings that fit: --engine\.kv-tokens"
    ):
        train(config, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"6,336 tokens of KV pool that a tree may need; lower sampling\.max_tokens"):
        check_memory(RUN, replace(BIG, num_layers=10**6), CPU)


def test_a_micro_batch_is_never_planned_smaller_than_a_trajectory_nor_larger_than_all_trees() -> None:
    config = replace(RUN, micro_batch_tokens=64, sampling=SamplingConfig(max_tokens=500))
    assert largest_micro_batch(config) == 500
    digits = TrainConfig(prompts_per_step=2, mini_batches=2, sampling=SamplingConfig(max_tokens=50))
    assert largest_micro_batch(digits) < digits.micro_batch_tokens


def _two_steps(optimizer: MasterAdamW, network: nn.Module, first: int) -> None:
    for seed in range(first, first + 2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_means_in_8_bits_continue_to_the_bit_and_take_what_is_planned(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = OptimConfig(lr=1e-2, state="8bit")

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(128, 96).to(dtype)

    ours = network()
    optimizer = MasterAdamW(ours, config)
    _two_steps(optimizer, ours, 0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert saved["state1.weight"].dtype == torch.uint8
    assert saved["state1.bias"].dtype == torch.float32
    other = network()
    other.load_state_dict(ours.state_dict())
    resumed = MasterAdamW(other, config)
    resumed.load_state(saved)
    for one, model in ((optimizer, ours), (resumed, other)):
        _two_steps(one, model, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    after = resumed.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in optimizer.state().items())
    with pytest.raises(ValueError, match=r"optim\.state: the optimizer was saved as 8bit, not float32"):
        MasterAdamW(network(), OptimConfig()).load_state(saved)


def test_8_bits_take_a_quarter_and_the_scales() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = replace(RUN, optim=OptimConfig(state="8bit"))
    model = model_of(shape_of(), config)
    optimizer = MasterAdamW(model, config.optim)
    _two_steps(optimizer, model, 0)
    kept = nbytes(v for k, v in optimizer.state().items() if k.startswith(("state", "absmax")))
    assert plan_memory(config, shape_of(), CPU).parts["optimizer state"] == pytest.approx(kept, rel=0.01)


def _run(tmp_path: Path, name: str, **fields: Any) -> list[dict[str, Any]]:
    model = tmp_path / "model"
    if not model.exists():
        save_checkpoint(model, teach=30)
        save_additions(tmp_path / "data.jsonl")
    config = replace(
        TrainConfig(),
        model=str(model), task="jsonl", data=tmp_path / "data.jsonl", out=tmp_path / name, device="cpu",
        sampled_tokens=60, prompts_per_step=6, sampling=SamplingConfig(max_tokens=4, temperature=1.0, top_p=1.0),
        eval=EvalConfig(prompts=1, samples=1), advantage=AdvantageConfig(), **fields,
    )  # fmt: skip
    folder = train(config, Console(file=io.StringIO()))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "tokens_sampled" in row]


def test_a_run_without_the_pool_in_updates_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    release = Engine.release
    monkeypatch.setattr(Engine, "release", lambda engine: (released.append(1), release(engine))[1])
    runs = []
    for choice in ("never", "always"):
        before = len(released)
        engine = EngineConfig(kv_tokens=2048, release=choice)  # type: ignore[arg-type]
        runs.append(_run(tmp_path, choice, engine=engine, optim=OptimConfig(lr=1e-3)))
        assert (len(released) > before) == (choice == "always")
    assert sum(row["optimizer_steps"] for row in runs[0]) > 0
    for name in ("reward", "loss", "grad_norm", "logprob_gap_max"):
        assert [row.get(name) for row in runs[0]] == [row.get(name) for row in runs[1]]
    assert runs[0][-1]["memory_planned"] > 0
    assert runs[0][-1]["peak_memory"] > 0


def test_a_checkpoint_of_adapters_is_what_peft_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    from ibtpo.policy import load_policy

    rows = _run(tmp_path, "lora", lora=LORA, engine=EngineConfig(kv_tokens=2048), optim=OptimConfig(lr=1e-2))
    assert sum(row["optimizer_steps"] for row in rows) > 0
    last = latest_checkpoint(tmp_path / "lora")
    assert last is not None
    assert not (last.path / "model.safetensors").exists(), "the base is not saved again"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), last.path).eval()
    policy = load_policy(last.path, dtype=torch.float32, device=CPU)
    ids, pos, end = forest(20)
    ids %= policy.model.config.vocab_size
    with torch.no_grad():
        ours = policy.model.packed(ids, pos, end) @ policy.model.head.T
        wanted = theirs(ids[None]).logits[0]
        with theirs.disable_adapter():
            base = theirs(ids[None]).logits[0]
    assert (ours - wanted).abs().max() < 1e-4
    assert (wanted - base).abs().max() > 1e-3


def test_the_search_for_nan_takes_little_memory_and_looks_everywhere() -> None:
    """Widened as a whole, a matrix in bf16 would take four times its memory again."""
    model = nn.Linear(1 << 12, (1 << 12) + 3, bias=False, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert find_nonfinite(model) is None
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 8 * (1 << 22)
    with torch.no_grad():
        model.weight[-1, -1] = float("nan")
    assert find_nonfinite(model) == f"1 of {model.weight.numel()} numbers of weight are NaN or Inf"
