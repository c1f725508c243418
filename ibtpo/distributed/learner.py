"""How the processes of a run train its model: each a whole copy (ddp), or each a share (fsdp)."""

from __future__ import annotations

from typing import Literal

import torch

from ibtpo.config import TrainConfig
from ibtpo.distributed.group import Group
from ibtpo.distributed.shard import ShardedAdamW, shard
from ibtpo.optim import MasterAdamW
from ibtpo_engine import Model
from ibtpo_engine.memory import bytes_per_token, free_memory

Mode = Literal["ddp", "fsdp"]
SPARE = 0.25  # of the free memory, left to activations and logits


def choose_mode(config: TrainConfig, model: Model, group: Group) -> Mode:
    """What ``config.distributed`` says; "auto" is ddp where `ddp_bytes` leave enough of every process's free memory.

    Call it before the KV pool is made.

    Raises:
        ValueError: fsdp was asked for a model with adapters.
    """
    if config.distributed == "fsdp" and config.lora.rank > 0 and group.size > 1:
        raise ValueError("distributed: fsdp splits whole models only; train adapters with --distributed ddp")
    if group.size == 1 or config.lora.rank > 0 or config.distributed == "ddp":
        return "ddp"
    if config.distributed == "fsdp":
        return "fsdp"
    here = 1 if model.device.type == "cuda" else max(1, torch.distributed.get_node_local_rank(0) + 1)
    locals_here = max(group.gather(here, "count the processes of a node"))
    fits = ddp_bytes(config, model) * locals_here <= (1 - SPARE) * free_memory(model.device)
    return "ddp" if all(group.gather(fits, "plan memory")) else "fsdp"


def ddp_bytes(config: TrainConfig, model: Model) -> int:
    """Bytes a process still needs for ddp, the loaded policy aside: masters, moments, gradients, reference, KV pool."""
    numbers = [(p.numel(), p.element_size()) for p in model.parameters()]
    masters = sum(4 * count for count, size in numbers if size < 4)
    moments = sum(2 * 4 * count for count, _ in numbers)
    gradients = sum((size + (4 if size < 4 else 0)) * count for count, size in numbers)
    needs_reference = config.loss.kl_coef > 0 or config.advantage.pi_ref == "reference"
    reference = sum(size * count for count, size in numbers) if needs_reference else 0
    return masters + moments + gradients + reference + config.engine.kv_tokens * bytes_per_token(model)


def make_learner(config: TrainConfig, full: Model, group: Group, mode: Mode) -> tuple[Model, MasterAdamW]:
    """The model that is trained, and its optimizer; each of its steps leaves the new weights in `full`.

    Args:
        config: rates and limits.
        full: the policy that samples.
        group: the processes.
        mode: with "fsdp" another model than `full` is trained.
    """
    if mode == "fsdp" and group.size > 1:
        sharded = shard(full)
        return sharded, ShardedAdamW(sharded, full, config.optim)
    optimizer = MasterAdamW(full, config.optim)
    optimizer.sum_gradients = group.sum_gradients
    return full, optimizer
