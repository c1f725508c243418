"""A model and its optimizer sharded over processes (FSDP2), beside the whole copy that samples.

::

    sharded    fp32 masters, gradients, AdamW's moments: a shard of each on every process; trained
    full       the policy of the engine and of checkpoints, in its compute type: whole on every process

Of a model with adapters only these are sharded; both models use the same frozen weights, without a second copy. After
each optimizer step the shards are gathered into `full`, a parameter at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ibtpo.config import OptimConfig
from ibtpo.optim import BLOCK, MasterAdamW
from ibtpo_engine import Model

_WIDE = (torch.float32, torch.float64)


def shard(full: Model) -> Model:
    """A trainable copy of `full`, of which every process holds a shard; it computes in the type of `full`.

    Parameters are sharded by decoder layer and gradients *summed* over the processes, both kept in fp32 at least.
    Frozen parameters, such as all but a model's adapters, are those of `full`, whole. All processes must run the same
    number of forward and backward passes.
    """
    mesh = init_device_mesh(full.device.type, (dist.get_world_size(),))
    wide = full.dtype if full.dtype in _WIDE else torch.float32
    with torch.device("meta"):
        model = Model(full.config).to(wide)
    if full.adapters is not None:
        model.add_adapters(full.adapters.config)
    frozen = _use_frozen(model, full)
    policy = MixedPrecisionPolicy(param_dtype=full.dtype, reduce_dtype=wide)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    keep = False  # the head is used after the forward pass
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=keep)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=full.device, recurse=False)
    values = dict(full.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_share(values[name].detach().to(wide), cast(DTensor, parameter)))
    return model


def _use_frozen(model: Model, full: Model) -> set[nn.Parameter]:
    """Replace parameters of `model` by the frozen ones of `full`; returns these."""
    frozen = {name: parameter for name, parameter in full.named_parameters() if not parameter.requires_grad}
    for name, parameter in frozen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, parameter)
    return set(frozen.values())


def _share(value: Tensor, like: DTensor) -> DTensor:
    """This process's shard of a tensor that every process holds whole, without communication."""
    mesh: DeviceMesh = like.device_mesh
    return distribute_tensor(value.to(like.device), mesh, like.placements, src_data_rank=None)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class ShardedAdamW(MasterAdamW):
    """`MasterAdamW` on a sharded model; the state it saves and loads is whole, as a single process writes it.

    Args:
        sharded: the model from `shard`.
        full: the whole copy, updated by every step.
        config: rates and limits.
    """

    def __init__(self, sharded: Model, full: Model, config: OptimConfig) -> None:
        self._full = dict(full.named_parameters())
        super().__init__(sharded, config)
        if config.state == "8bit":
            for name in self._masters:
                self._begin_8bit(name)

    def _own_parts(self) -> dict[str, nn.Parameter]:
        if self.config.state == "float32":  # torch's AdamW accepts DTensors
            return self._masters
        return {name: nn.Parameter(_own(master).detach()) for name, master in self._masters.items()}

    def _update(self) -> None:
        if self.config.state == "8bit":
            for name, own in self._own.items():
                master = self._masters[name]
                own.data = _own(master).detach()  # FSDP may have moved it
                own.grad = None if master.grad is None or own.numel() == 0 else _own(master.grad)
        super()._update()
        for own in self._own.values():
            own.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, master in self._masters.items():
            self._full[name].copy_(_whole(master.detach()))

    def state(self) -> dict[str, Tensor]:
        """As `MasterAdamW.state` of the whole model, on rank 0 and on the CPU; empty on the others."""
        narrow = {f"master.{n}": p for n, p in self._masters.items() if self._full[n].dtype not in _WIDE}
        state: dict[str, Tensor] = {}
        for name, value in {**super().state(), **narrow}.items():
            kind, _, parameter = name.partition(".")
            if kind in _PARTS:
                whole = _joined(value, self._masters[parameter].shape, is_scale=kind.startswith("absmax"))
            else:
                whole = _whole(value.detach())  # all processes take part
            if dist.get_rank() == 0:
                state[name] = whole.cpu()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, in a run with any number of processes."""
        shares = dict(state)
        for name, master in self._masters.items():
            for key in (f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq")):
                if key in shares:
                    shares[key] = _share(shares[key], cast(DTensor, master))
            for key in (f"{kind}.{name}" for kind in _PARTS):
                if key in shares:
                    shares[key] = _part(shares[key], len(master))
        super().load_state(shares)


_PARTS = ("state1", "state2", "absmax1", "absmax2")  # of 8-bit states: plain tensors for this process's rows


def _own(x: Tensor) -> Tensor:
    return cast(DTensor, x).to_local()


def _rows(count: int, rank: int) -> tuple[int, int]:
    """The rows [first, end) of `count` that FSDP gives to a process."""
    each = -(-count // dist.get_world_size())
    return min(each * rank, count), min(each * (rank + 1), count)


def _part(whole: Tensor, rows: int) -> Tensor:
    """This process's part of the numbers, or of the block scales, of a parameter with this number of rows."""
    first, last = _rows(rows, dist.get_rank())
    return whole[len(whole) * first // rows : len(whole) * last // rows]


def _joined(part: Tensor, shape: torch.Size, *, is_scale: bool) -> Tensor:
    """Gather the parts that `_part` divided into the whole on every process."""
    ends = [_rows(shape[0], rank) for rank in range(dist.get_world_size())]
    lengths = [last - first for first, last in ends]
    if is_scale:
        lengths = [-(-length * (shape.numel() // shape[0]) // BLOCK) for length in lengths]
    mine = part.new_zeros(lengths[0], *part.shape[1:])
    mine[: len(part)] = part
    all_parts = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(all_parts, mine)
    return torch.cat([part[:length] for part, length in zip(all_parts, lengths, strict=True)])
