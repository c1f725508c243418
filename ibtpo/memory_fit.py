"""The flags that change a run's settings least and make it fit into memory."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import torch

from ibtpo.config import TrainConfig
from ibtpo.distributed import ALONE, Group, Mode
from ibtpo.memory_plan import ONE, MemoryPlan, Processes, largest_micro_batch, plan_memory, trained_shapes
from ibtpo.optim import splits_in_blocks
from ibtpo.policy import may_adapt
from ibtpo.pool_bound import least_pool
from ibtpo_engine import ModelConfig

_STEP = 256  # tokens; the search's increment
_RANKS = (64, 32, 16, 8, 4)


def check_memory(
    config: TrainConfig,
    shape: ModelConfig,
    device: torch.device,
    group: Group = ALONE,
    *,
    longest_prompt: Callable[[], int] = lambda: 0,
) -> tuple[Mode, MemoryPlan]:
    """The training mode of a run's processes and its memory plan; all processes must call it before they load anything.

    ``distributed: auto`` is ddp if that fits every process, else fsdp; a single process always uses ddp.

    Args:
        config, shape, device: the run.
        group: its processes.
        longest_prompt: returns the tokens of its longest prompt; called only if the run does not fit.

    Raises:
        ValueError: it does not fit, and the message names what is short and settings that fit; or fsdp was requested
            for parameters that cannot be split.
    """
    if config.distributed == "fsdp" and group.size > 1:
        _check_split(config, shape, group.size)
    hosts = group.gather(socket.gethostname(), "count the processes of each host")
    sharing = hosts.count(hosts[group.rank]) if device.type == "cpu" else 1
    mode: Mode = "fsdp" if config.distributed == "fsdp" and group.size > 1 else "ddp"
    processes = Processes(group.size, mode, sharing)
    plan = plan_memory(config, shape, device, processes=processes)
    fit = group.gather(plan.fits, "plan memory")
    if config.distributed == "auto" and not all(fit) and _is_split(config, shape, group.size):
        processes = replace(processes, mode="fsdp")
        plan = plan_memory(config, shape, device, free=plan.free, processes=processes)
    if plan.fits:
        return processes.mode, plan
    prompt = longest_prompt()
    flags = fitting_flags(config, shape, device, plan.free, processes, prompt=prompt)
    nearest = f"the nearest settings that fit: {flags} ({_meaning(flags)})" if flags else None
    remedy = nearest or _no_remedy(config, shape, prompt)
    raise ValueError(f"{plan}, so nothing was allocated; {remedy}")


def _no_remedy(config: TrainConfig, shape: ModelConfig, prompt: int) -> str:
    pool = least_pool(config, prompt=prompt, context=shape.max_positions)
    return (
        f"no micro-batch, precision or adapter makes it fit with the {pool:,} tokens of KV pool that a tree may need; "
        "lower sampling.max_tokens, grow smaller trees (search.*, eval.samples), or take a smaller model"
    )


def _is_split(config: TrainConfig, shape: ModelConfig, processes: int) -> bool:
    """Can this run's model be sharded over these processes?"""
    return processes > 1 and _cut_parameter(config, shape, processes) is None


def _cut_parameter(config: TrainConfig, shape: ModelConfig, processes: int) -> tuple[str, torch.Size] | None:
    """A trained parameter whose optimizer state has blocks that would span two processes, or None."""
    if config.optim.state == "float32":
        return None
    trained = trained_shapes(shape, config).items()
    return next(((name, size) for name, size in trained if not splits_in_blocks(size, processes)), None)


def _check_split(config: TrainConfig, shape: ModelConfig, processes: int) -> None:
    cut = _cut_parameter(config, shape, processes)
    if cut is not None:
        raise ValueError(
            f"distributed: fsdp cannot split the {config.optim.state} optimizer state of {cut[0]} {list(cut[1])} over "
            f"{processes} processes, since that would cut a block of 256 numbers; use another number of processes, "
            "--optim.state float32, or --distributed ddp"
        )


def fitting_flags(
    config: TrainConfig,
    shape: ModelConfig,
    device: torch.device,
    free: int,
    processes: Processes = ONE,
    *,
    prompt: int = 0,
) -> str | None:
    """Flags with which a run fits into `free` bytes; None if there are none.

    Tried in this order: smaller micro-batches, a smaller KV pool, both; then the same with what `_bases` changes.

    Args:
        config, shape, device, processes: as for `plan_memory`.
        free: bytes that the process may have.
        prompt: tokens of the longest prompt: every tree must fit into the pool, every trajectory into a micro-batch.
    """

    def fits(candidate: TrainConfig) -> bool:
        return plan_memory(candidate, shape, device, free=free, processes=processes).fits

    longest = min(config.sampling.max_tokens + prompt, shape.max_positions)
    longest = max(longest, largest_micro_batch(replace(config, micro_batch_tokens=1)))
    micro = min(_round_up(longest, _STEP), largest_micro_batch(config))
    pool = min(least_pool(config, prompt=prompt, context=shape.max_positions), config.engine.kv_tokens)
    for base in _bases(config, shape, processes):
        if fits(_with(base, micro, pool)):
            return _difference(config, next(filter(fits, _smaller(base, micro, pool, fits))))
    return None


def _bases(config: TrainConfig, shape: ModelConfig, processes: Processes) -> Iterator[TrainConfig]:
    """Every combination of the changes that are possible, ordered by how little they change what the run learns.

    So the first one that fits has no unnecessary change: without it, the combination would have come earlier.
    """
    new = config.resume is None  # a checkpoint fixes the types of weights and optimizer state, and the adapters' rank
    checkpointing, states, dtypes = [config.gradient_checkpointing], [config.optim.state], [config.dtype]
    weights, ranks = [config.loss.kl_coef], [config.lora.rank]
    if not config.gradient_checkpointing:
        checkpointing.append(True)
    eight = replace(config, optim=replace(config.optim, state="8bit"))
    splits = processes.mode == "ddp" or _is_split(eight, shape, processes.count)
    if new and config.optim.state == "float32" and splits:
        states.append("8bit")
    if new and config.dtype == "float32":
        dtypes.append("bfloat16")
    if config.loss.kl_coef > 0 and config.advantage.pi_ref != "reference":
        weights.append(0.0)
    if new and may_adapt(config):
        ranks += [rank for rank in _RANKS if config.lora.rank == 0 or rank < config.lora.rank]
    for rank, weight, dtype, state, again in product(ranks, weights, dtypes, states, checkpointing):
        if rank and state != config.optim.state:
            continue  # adapters have little optimizer state: a lower rank saves as much
        yield replace(
            config,
            gradient_checkpointing=again,
            optim=replace(config.optim, state=state),
            dtype=dtype,
            loss=replace(config.loss, kl_coef=weight),
            lora=replace(config.lora, rank=rank),
        )


def _smaller(base: TrainConfig, micro: int, pool: int, fits: Callable[[TrainConfig], bool]) -> Iterator[TrainConfig]:
    """The run with the largest micro-batch that fits, with the largest pool, and with the smallest pool and then the
    largest micro-batch; `micro` and `pool` are the smallest."""
    most_micro, most_pool = largest_micro_batch(base), base.engine.kv_tokens
    yield base
    yield _with(base, _largest(micro, most_micro, lambda tokens: fits(_with(base, tokens, most_pool))), most_pool)
    kept = base.micro_batch_tokens
    yield _with(base, kept, _largest(pool, most_pool, lambda tokens: fits(_with(base, kept, tokens))))
    yield _with(base, _largest(micro, most_micro, lambda tokens: fits(_with(base, tokens, pool))), pool)


def _with(base: TrainConfig, micro: int, pool: int) -> TrainConfig:
    return replace(base, micro_batch_tokens=micro, engine=replace(base.engine, kv_tokens=pool))


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest of low, low + _STEP, low + 2 _STEP, ... that fits, by bisection; `low` if none does.

    Never more than `high`.
    """
    first, last = 0, max(high - low, 0) // _STEP
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if fits(low + middle * _STEP) else (first, middle - 1)
    return min(low + first * _STEP, high)


def _difference(config: TrainConfig, other: TrainConfig) -> str:
    flags = []
    if other.micro_batch_tokens != config.micro_batch_tokens:
        flags.append(f"--micro-batch-tokens {other.micro_batch_tokens}")
    if other.engine.kv_tokens != config.engine.kv_tokens:
        flags.append(f"--engine.kv-tokens {other.engine.kv_tokens}")
    if other.gradient_checkpointing != config.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    if other.optim.state != config.optim.state:
        flags.append(f"--optim.state {other.optim.state}")
    if other.dtype != config.dtype:
        flags.append(f"--dtype {other.dtype}")
    if other.loss.kl_coef != config.loss.kl_coef:
        flags.append(f"--loss.kl-coef {other.loss.kl_coef:g}")
    if other.lora.rank != config.lora.rank:
        flags.append(f"--lora.rank {other.lora.rank}")
    return " ".join(flags)


_MEANS = {
    "--optim.state": "the optimizer's running means are rounded to 8 bits",
    "--dtype": "the computation rounds to bfloat16",
    "--loss.kl-coef": "there is no KL penalty, and so no reference model",
    "--lora.rank": "adapters of this rank are trained, not the weights",
}


def _meaning(flags: str) -> str:
    """How flags from `fitting_flags` change what the run learns."""
    means = [text for flag, text in _MEANS.items() if flag in flags.split()]
    if "--optim.state" in flags and find_spec("bitsandbytes") is None:
        means[0] += " (pip install 'ibtpo[8bit]')"
    return "; ".join(means) or "it learns the same, more slowly"
