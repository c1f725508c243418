"""The settings nearest to a run's own with which it fits into memory, as flags."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ibtpo.config import TrainConfig
from ibtpo.distributed import ALONE, Group, Mode
from ibtpo.memory_plan import ONE, MemoryPlan, Processes, largest_micro_batch, plan_memory
from ibtpo_engine import ModelConfig
from ibtpo_engine.pages import PAGE

_STEP = 256  # settings are looked for in multiples of it
_RANKS = (64, 32, 16, 8, 4)


def check_memory(
    config: TrainConfig, shape: ModelConfig, device: torch.device, group: Group = ALONE
) -> tuple[Mode, MemoryPlan]:
    """How the processes of a run train, and what that takes of each; all must call it, before they load anything.

    ``distributed: auto`` is ddp where that fits every process, else fsdp; alone always ddp.

    Raises:
        ValueError: it does not fit, and the message names what is short and settings that fit; or fsdp was asked for
            what cannot be split.
    """
    if config.distributed == "fsdp" and group.size > 1:
        _check_split(config)
    hosts = group.gather(socket.gethostname(), "count the processes of each host")
    sharing = hosts.count(hosts[group.rank]) if device.type == "cpu" else 1
    mode: Mode = "fsdp" if config.distributed == "fsdp" and group.size > 1 else "ddp"
    processes = Processes(group.size, mode, sharing)
    plan = plan_memory(config, shape, device, processes=processes)
    fit = group.gather(plan.fits, "plan memory")
    if config.distributed == "auto" and not all(fit) and _is_split(config, group):
        processes = replace(processes, mode="fsdp")
        plan = plan_memory(config, shape, device, free=plan.free, processes=processes)
    if plan.fits:
        return processes.mode, plan
    flags = fitting_flags(config, shape, device, plan.free, processes)
    remedy = f"the nearest that fits: {flags}" if flags else "no setting of this model fits; take a smaller one"
    raise ValueError(f"{plan}, so nothing was allocated; {remedy}")


def _is_split(config: TrainConfig, group: Group) -> bool:
    """Can these processes hold shares of this run's model?"""
    return group.size > 1 and config.optim.state == "float32"


def _check_split(config: TrainConfig) -> None:
    if config.optim.state != "float32":
        raise ValueError(
            f"distributed: fsdp cannot split the optimizer's state in {config.optim.state}; use --optim.state float32, "
            "of which each process holds a share, or --distributed ddp"
        )


def fitting_flags(
    config: TrainConfig, shape: ModelConfig, device: torch.device, free: int, processes: Processes = ONE
) -> str | None:
    """Flags with which a run fits into `free` bytes; None if none do.

    Tried in this order: smaller micro-batches, a smaller KV pool, both; then the same with adapters of a lower rank,
    with gradient checkpointing, and at last, for a run that trains the weights themselves, with adapters.
    """

    def fits(candidate: TrainConfig) -> bool:
        return plan_memory(candidate, shape, device, free=free, processes=processes).fits

    for base in _bases(config):
        for candidate in _smaller(base, fits):
            if candidate != config and fits(candidate):
                return _difference(config, candidate)
    return None


def _bases(config: TrainConfig) -> Iterator[TrainConfig]:
    yield config
    lower = [replace(config, lora=replace(config.lora, rank=rank)) for rank in _RANKS if rank < config.lora.rank]
    yield from lower
    kept = [config, *lower]
    if not config.gradient_checkpointing:
        kept = [replace(one, gradient_checkpointing=True) for one in kept]
        yield from kept
    if config.lora.rank == 0 and config.model != "built-in":
        yield from (replace(kept[0], lora=replace(config.lora, rank=rank)) for rank in _RANKS)


def _smaller(base: TrainConfig, fits: Callable[[TrainConfig], bool]) -> Iterator[TrainConfig]:
    """The run with the largest micro-batch that fits, with the largest pool, and with the smallest pool and then the
    largest micro-batch."""

    def with_micro(tokens: int, one: TrainConfig = base) -> TrainConfig:
        return replace(one, micro_batch_tokens=tokens)

    def with_pool(tokens: int) -> TrainConfig:
        return replace(base, engine=replace(base.engine, kv_tokens=tokens))

    yield base
    longest = largest_micro_batch(replace(base, micro_batch_tokens=1))  # no micro-batch is smaller than a trajectory
    least = _round_up(longest, _STEP)
    yield with_micro(_largest(least, largest_micro_batch(base), lambda tokens: fits(with_micro(tokens))))
    pool = _round_up(2 * longest, PAGE)  # a trajectory and the one it is forked from
    yield with_pool(_largest(pool, base.engine.kv_tokens, lambda tokens: fits(with_pool(tokens))))
    poor = with_pool(min(pool, base.engine.kv_tokens))
    yield with_micro(_largest(least, largest_micro_batch(base), lambda tokens: fits(with_micro(tokens, poor))), poor)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest low + n _STEP below `high` that fits; `low`, or `high` if that is less, if none does."""
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
    if other.lora.rank != config.lora.rank:
        flags.append(f"--lora.rank {other.lora.rank}")
    if other.gradient_checkpointing != config.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    return " ".join(flags)
