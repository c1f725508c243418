"""How the processes of a run train its model: each a whole copy (ddp), or each a shard (fsdp)."""

from __future__ import annotations

from typing import Literal

from ibtpo.config import TrainConfig
from ibtpo.distributed.group import Group
from ibtpo.optim import MasterAdamW
from ibtpo_engine import Model

Mode = Literal["ddp", "fsdp"]


def make_learner(config: TrainConfig, full: Model, group: Group, mode: Mode) -> tuple[Model, MasterAdamW]:
    """The model to train, and its optimizer, whose steps leave the new weights in `full`.

    Args:
        config: rates and limits.
        full: the policy that samples.
        group: the processes.
        mode: with "fsdp" the model to train is a sharded copy of `full`.
    """
    if mode == "fsdp" and group.size > 1:
        from ibtpo.distributed.shard import ShardedAdamW, shard  # here: torch.distributed.fsdp is slow to import

        sharded = shard(full)
        return sharded, ShardedAdamW(sharded, full, config.optim)
    optimizer = MasterAdamW(full, config.optim)
    optimizer.sum_gradients = group.sum_gradients
    return full, optimizer
