"""The memory a run will take, computed from its configuration before anything is allocated.

P parameters, of which Pt are trained; e bytes a number of `dtype`; N tokens of the largest micro-batch; V vocabulary, H
hidden, I inner size, L layers, Hq/Hkv heads of size D, r rank of the adapters. In bytes:

    weights        e P                    shared with the engine
    masters        4 Pt                   only for types below fp32, which would round small updates away
    optimizer      8 Pt                   two running means in fp32; 8bit: 2 Pt and two scales every 256 numbers
    gradients      e Pt, in a step 4 Pt   of the masters; a 16-bit gradient is freed as soon as it is widened,
                                          but the C library's malloc keeps blocks below its mmap threshold (up to
                                          32 MiB): on a CPU (4 + e) Pt in a step
    KV pool        2 L Hkv D e tokens     0 during the update if it is released
    CUDA graphs    as much as the decode steps they replay, see below; kept and released along with the pool
    reference      e P                    a frozen copy; 0 with adapters (switched off) or if none is needed
    activations    N (L a + e H + 4 D + 12), and with adapters 7 L e r N for all seven projections, where
                   a = e (4 H + 3 I + (n + 1) (Hq + Hkv) D) + 4 Hq        n = 2 with query and key norms, 1 without
                   tensors autograd keeps of a layer: residual stream and its norm twice (4 H); gate, up and their
                   product (3 I); queries, keys before norm and before attention, values, attention output, its log-sums
      with checkpointing                  N (L e H + a + e H + 4 D + 12): a layer's input, and one layer whole
    workspace      with the loss          logits of one chunk of rows (on a GPU in fp32, and their gradient: 768 MiB),
                                          hidden and its gradient (2 e N H), and, if the head is trained, its
                                          gradient in fp32 and in `dtype`: (4 + e) V H
                   in the layers' backward e N (2 I + 3 H), and the head's gradient e V H, waiting for the embedding's
                   in the optimizer step  temporaries of 8bit on a CPU: 20 bytes a number of the largest parameter
                   while sampling         logits of `max_branches` rows twice, counted in fp32 (plain sampling in bf16
                                          takes half), a chunk of the prompt; a CUDA graph has such logits of its own,
                                          and these rows in a layer

In N processes each samples for its share of the prompts, and a step takes an additional bucket of gradients. With fsdp,
masters (also for fp32, since the engine's weights are a copy), optimizer and gradients take 1/N each, and the *gathered
layers* are added: the trained parameters of two decoder layers and outside of layers, whole, with their gradients.

Not all of this is allocated at once: `MemoryPlan.phases` has the totals while sampling, in the backward pass and in the
optimizer step, and the largest counts. Tests compare each line with tensors, `bench/train_large.py` the sum with runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ibtpo.config import TrainConfig
from ibtpo.distributed import Mode
from ibtpo.distributed.group import BUCKET_BYTES
from ibtpo.optim import MOST_WIDE
from ibtpo.policy import adapters_of
from ibtpo.process_memory import host_memory
from ibtpo_engine import Model, ModelConfig
from ibtpo_engine.adapter_folder import is_adapter_folder
from ibtpo_engine.memory import bytes_per_token, free_memory
from ibtpo_engine.pages import PAGE, pages_for
from ibtpo_kernels.one_pass import chunk_rows, gpu_chunk_rows

GIB = 1 << 30
_LATER = 150 << 20  # bytes a CPU process loads later and keeps: optimizer, logger and matrix libraries, caches


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes, by part and by phase.

    Attributes:
        parts: bytes by name, in the order of the module's table; "process" is held by the process already (CPU only).
        phases: bytes allocated together in each phase of a step.
        free: bytes of the device available to the run, including those the process holds.
        tokens: N, of the largest micro-batch.
        release: is the pool's memory released during the update?
        device: "cpu" or "cuda".
    """

    parts: Mapping[str, int]
    phases: Mapping[str, int]
    free: int
    tokens: int
    release: bool
    device: str

    @property
    def total(self) -> int:
        """Peak bytes."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Is the total at most the free memory?"""
        return self.total <= self.free

    def __str__(self) -> str:
        peak = max(self.phases, key=lambda name: self.phases[name])
        where = "memory" if self.device == "cpu" else "GPU memory"
        notes = {"activations": f", {self.tokens:,} tokens", "KV pool": ", not during the update" * self.release}
        parts = [f"{name}{notes.get(name, '')} {_gib(n)}" for name, n in self.parts.items() if n]
        return (
            f"memory plan: {'; '.join(parts)}. At most {_gib(self.total)} at once ({peak}) of {_gib(self.free)} "
            f"free {where}"
        )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class Processes:
    """How a run is distributed over processes, as far as it affects the memory of one of them.

    Attributes:
        count: number of processes.
        mode: "ddp", or "fsdp" with a shard of masters, optimizer state and gradients each.
        sharing: how many of them share a device's memory (those of a node, on CPUs).
    """

    count: int = 1
    mode: Mode = "ddp"
    sharing: int = 1

    @property
    def split(self) -> int:
        """Number of processes over which masters, optimizer state and gradients are divided."""
        return self.count if self.mode == "fsdp" else 1


ONE = Processes()
"""A run in one process."""


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model: all parameters, trained ones, the largest trained one, those too small for 8-bit states.

    Of the trained parameters, `layer` numbers lie in each decoder layer and `outside` in none.
    """

    parameters: int
    trained: int
    largest: int
    trained_small: int
    layer: int
    outside: int


def _dtype(config: TrainConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _one_layer(shape: ModelConfig, config: TrainConfig) -> Model:
    """The run's model with its adapters and one decoder layer, on the meta device."""
    lora = adapters_of(config)
    with torch.device("meta"):
        model = Model(replace(shape, num_layers=1))
        if lora is not None:
            model.add_adapters(lora)
    return model


def trained_shapes(shape: ModelConfig, config: TrainConfig) -> dict[str, torch.Size]:
    """The shapes of trained parameters in one decoder layer and outside of layers."""
    model = _one_layer(shape, config)
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sizes(shape: ModelConfig, config: TrainConfig) -> _Sizes:
    model, more = _one_layer(shape, config), shape.num_layers - 1
    in_layer = list(model.model.layers.parameters())
    layer = [parameter.numel() for parameter in in_layer if parameter.requires_grad]
    with_one = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return _Sizes(
        parameters=sum(p.numel() for p in model.parameters()) + more * sum(p.numel() for p in in_layer),
        trained=sum(with_one) + more * sum(layer),
        largest=max(with_one),
        trained_small=_small(with_one) + more * _small(layer),
        layer=sum(layer),
        outside=sum(with_one) - sum(layer),
    )


def _small(counts: list[int]) -> int:
    return sum(count for count in counts if count < MOST_WIDE)


def largest_micro_batch(config: TrainConfig) -> int:
    """N: the budget, or if longer the longest trajectory, which is never cut; at most the tokens of a mini-batch."""
    prompt = config.jsonl.max_prompt_tokens
    longest = config.sampling.max_tokens + (prompt or 0)
    most = max(config.micro_batch_tokens, longest)
    if config.task != "digit-chain" and prompt is None:
        return most  # prompts may have any length
    tree = (prompt or 4 * config.digits.max_ops) + config.search.trajectories * config.sampling.max_tokens
    return min(most, -(-config.prompts_per_step // config.mini_batches) * tree)


def activation_bytes(shape: ModelConfig, config: TrainConfig, tokens: int) -> int:
    """Bytes autograd keeps of the model's forward pass over `tokens` packed tokens; see the module's table."""
    size, heads, head, lora = _dtype(config).itemsize, shape.num_heads, shape.head_dim, adapters_of(config)
    wide = (3 if shape.qk_norm else 2) * (heads + shape.num_kv_heads) * head
    layer = size * (4 * shape.hidden_size + 3 * shape.intermediate_size + wide) + 4 * heads
    layer += size * lora.rank * len(lora.targets) if lora is not None else 0
    once = size * shape.hidden_size + 4 * head + 12
    if config.gradient_checkpointing:
        return tokens * (shape.num_layers * size * shape.hidden_size + layer + once)
    return tokens * (shape.num_layers * layer + once)


def _loss_workspace(shape: ModelConfig, config: TrainConfig, tokens: int, on_cpu: bool) -> int:
    size, head = _dtype(config).itemsize, shape.vocab_size * shape.hidden_size
    rows = chunk_rows(shape.vocab_size) if on_cpu else gpu_chunk_rows(shape.vocab_size, size)
    logits = min(tokens, rows) * shape.vocab_size * (size if on_cpu else 4 + size)
    gradient = 0 if adapters_of(config) else 4 * head + (size * head if size < 4 else 0)
    return logits + 2 * size * tokens * shape.hidden_size + gradient


def _layer_workspace(shape: ModelConfig, config: TrainConfig, tokens: int) -> int:
    size = _dtype(config).itemsize
    waiting = 0 if adapters_of(config) else size * shape.vocab_size * shape.hidden_size
    return size * tokens * (2 * shape.intermediate_size + 3 * shape.hidden_size) + waiting


def _most_rows(config: TrainConfig, processes: Processes) -> int:
    """Maximum rows of a decode step."""
    prompts, held_out = (-(-count // processes.count) for count in (config.prompts_per_step, config.eval.prompts))
    wanted = max(prompts * config.search.trajectories, held_out * config.eval.samples)
    return min(config.engine.max_branches, wanted)


def _step_workspace(shape: ModelConfig, config: TrainConfig, decoding: int, filled: int) -> int:
    """Bytes an engine step takes for `decoding` rows of logits and `filled` rows in a layer."""
    layer = _dtype(config).itemsize * (2 * shape.intermediate_size + 4 * shape.hidden_size)
    return 8 * decoding * shape.vocab_size + filled * layer


def _copies_reference(config: TrainConfig) -> bool:
    """Is a frozen copy kept? New adapters are switched off instead."""
    return config.needs_reference and (config.lora.rank == 0 or is_adapter_folder(config.model))


def plan_memory(
    config: TrainConfig,
    shape: ModelConfig,
    device: torch.device,
    *,
    free: int | None = None,
    processes: Processes = ONE,
) -> MemoryPlan:
    """The memory a run takes on its device.

    Args:
        config: the run.
        shape: configuration of its model.
        device: the device it runs on.
        free: bytes that the process may have; by default its share of what is free now.
        processes: how the run is distributed.
    """
    on_cpu, count = device.type == "cpu", _sizes(shape, config)
    parts = _parts(config, shape, processes, count, on_cpu)
    sampling, updates = _phases(config, shape, processes, count, parts, on_cpu)
    pool = parts["KV pool"] + parts["CUDA graphs"]  # released with the pool
    room = free if free is not None else free_memory(device) // processes.sharing + (host_memory() if on_cpu else 0)
    release = config.engine.release == "always"
    if config.engine.release == "auto":
        largest = max(updates.values())
        freely = not (on_cpu or config.engine.cuda_graphs)  # graphs would have to be captured again
        release = freely or (max(largest, sampling) <= room < largest + pool)
    kept = 0 if release else pool
    phases = {"sampling": sampling} | {name: need + kept for name, need in updates.items()}
    return MemoryPlan(parts, phases, room, largest_micro_batch(config), release, device.type)


def _parts(
    config: TrainConfig, shape: ModelConfig, processes: Processes, count: _Sizes, on_cpu: bool
) -> dict[str, int]:
    """The module's table; parts that exist only in some phases at their maximum."""
    size, tokens = _dtype(config).itemsize, largest_micro_batch(config)
    rows, split = _most_rows(config, processes), processes.split
    large = count.trained - count.trained_small
    eight = config.optim.state == "8bit"
    moments = 8 * count.trained_small + large * 2 + large // 32 if eight else 8 * count.trained
    return {
        "process": host_memory() + _LATER if on_cpu else 0,
        "weights": size * count.parameters,
        "master weights": -(-4 * count.trained // split) if size < 4 or split > 1 else 0,
        "optimizer state": -(-moments // split),
        "gradients": -(-4 * count.trained // split),
        "gathered layers": size * (2 * count.layer + count.outside) if split > 1 else 0,
        "KV pool": bytes_per_token(shape, _dtype(config)) * pages_for(config.engine.kv_tokens) * PAGE,
        "CUDA graphs": _step_workspace(shape, config, rows, rows) if config.engine.cuda_graphs else 0,
        "activations": activation_bytes(shape, config, tokens),
        "log-prob workspace": _loss_workspace(shape, config, tokens, on_cpu),
        "reference model": size * count.parameters if _copies_reference(config) else 0,
    }


def _phases(
    config: TrainConfig, shape: ModelConfig, processes: Processes, count: _Sizes, parts: Mapping[str, int], on_cpu: bool
) -> tuple[int, dict[str, int]]:
    """Totals while sampling, with the pool, and in each phase of an update, without the pool."""
    size, split = _dtype(config).itemsize, processes.split
    kept = sum(parts[name] for name in ("process", "weights", "master weights", "optimizer state", "reference model"))
    sampling = kept + parts["KV pool"] + parts["CUDA graphs"]
    sampling += _step_workspace(shape, config, _most_rows(config, processes), config.engine.prefill_tokens)
    backward = size * count.trained if split == 1 else 2 * parts["gathered layers"] + parts["gradients"]
    backward += parts["activations"]
    backward += max(parts["log-prob workspace"], _layer_workspace(shape, config, largest_micro_batch(config)))
    step = parts["gradients"]
    if config.optim.state == "8bit" and on_cpu:
        step += 20 * -(-count.largest // split)
    if on_cpu and size < 4 and split == 1:  # malloc keeps the 16-bit gradients
        step += size * count.trained
    if processes.count > 1:  # gradients are summed, or weights gathered, a piece at a time
        step += min(4 * count.trained, max(BUCKET_BYTES, 4 * count.largest))
    return sampling, {"backward pass": kept + backward, "optimizer step": kept + step}
