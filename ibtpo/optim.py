"""AdamW on fp32 master weights, with warm-up and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ibtpo.config import OptimConfig
from ibtpo_engine.shadow import copy_weights


class NonFinite(ArithmeticError):
    """Loss, gradient or weights hold NaN or Inf; the message says which and what to do."""


class NonFiniteGradient(NonFinite):
    """The gradient holds NaN or Inf; the weights were not changed."""


MOST_WIDE = 4096
"""Parameters with fewer numbers keep their running means in float32 in any case, as in bitsandbytes."""
BLOCK = 256
"""This many consecutive numbers of an 8-bit state share a scale."""


class OtherForm(ValueError):
    """The saved running means have another form than `optim.state`; the message names both."""


class MasterAdamW:
    """Updates a model in place; if it computes below fp32, an fp32 copy of each weight is kept and updated.

    A bf16 weight has 8 bits of mantissa, so an update of 1e-6 would be rounded away; the master keeps it.

    Args:
        model: its parameters are updated, its gradients read and cleared.
        config: rates and limits. Weight decay acts on matrices only.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.num_steps = 0
        self.scale = 1.0  # factor of the learning rate, for schedules beyond the warm-up
        self.sum_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda masters: None  # over processes
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wide = (torch.float32, torch.float64)
        self._masters = {
            name: p if p.dtype in wide else nn.Parameter(p.detach().float()) for name, p in self._parameters.items()
        }
        self._own = self._own_parts()
        own = list(self._own.values())
        groups = [
            {"params": [p for p in own if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adamw = _adamw(groups, config)

    def _own_parts(self) -> dict[str, nn.Parameter]:
        """This process's part of each master, which AdamW updates."""
        return self._masters

    @property
    def lr(self) -> float:
        """Learning rate of the next step: linear warm-up, then constant, times `scale`."""
        return self.scale * self.config.lr * min(1.0, (self.num_steps + 1) / max(self.config.warmup_steps, 1))

    def step(self) -> float:
        """Clip the accumulated gradient, update the weights in place, clear the gradient.

        Returns:
            L2 norm of the gradient before clipping.

        Raises:
            NonFiniteGradient: the norm is NaN or Inf; nothing was updated, the gradient is cleared.
        """
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None  # freed one by one, so that not all gradients exist in both types
        self.sum_gradients(self._masters.values())
        norm = float(nn.utils.clip_grad_norm_(self._masters.values(), self.config.grad_clip))
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._update()
            self.num_steps += 1
            self._write_back()
        self.discard()
        if not math.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient's norm is {norm} at optimizer step {self.num_steps + 1}; lower optim.lr or "
                "loss.clip_high, and continue from the last checkpoint"
            )
        return norm

    def _update(self) -> None:
        self._adamw.step()

    def discard(self) -> None:
        """Clear the accumulated gradient without a step."""
        for parameter in [*self._parameters.values(), *self._masters.values()]:
            parameter.grad = None

    def _write_back(self) -> None:
        copy_weights(self._masters, self._parameters)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to resume, as named tensors for safetensors: masters (if kept) and moments."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                state[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state.get(self._own[name], {}).items():
                if not key.startswith("qmap"):
                    state[f"{key}.{name}"] = torch.as_tensor(value)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, for a model of the same shape.

        Raises:
            OtherForm: the running means were kept in another form.
        """
        kept = "8bit" if any(key.startswith("state1.") for key in state) else "float32"
        if kept != self.config.state and len(state) > 1 + sum(key.startswith("master.") for key in state):
            raise OtherForm(f"optim.state: the optimizer was saved as {kept}, not {self.config.state}")
        self.num_steps = int(state["num_steps"])
        for name, master in self._masters.items():
            if f"master.{name}" in state:
                master.copy_(state[f"master.{name}"])
            if self.config.state == "8bit":
                self._load_8bit(name, state)
                continue
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in state:
                    self._adamw.state[self._own[name]][key] = state[f"{key}.{name}"].clone().to(master.device)
        self._write_back()

    def _load_8bit(self, name: str, state: Mapping[str, Tensor]) -> None:
        if f"step.{name}" not in state:
            return
        kept = self._begin_8bit(name)
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if f"{key}.{name}" in state:  # small parameters are kept in float32, without scales
                kept[key].copy_(state[f"{key}.{name}"])
        kept["step"] = int(state[f"step.{name}"])

    def _begin_8bit(self, name: str) -> dict[str, Any]:
        """Zero running means of a parameter, with their 8-bit code tables."""
        own = self._own[name]
        groups = enumerate(self._adamw.param_groups)
        place = next((g, i) for g, group in groups for i, p in enumerate(group["params"]) if p is own)
        is_wide = self._masters[name].numel() < MOST_WIDE  # the whole parameter's size: `own` may be a shard
        self._adamw.args.min_8bit_size = own.numel() + 1 if is_wide else 0
        self._adamw.init_state(self._adamw.param_groups[place[0]], own, *place)
        self._adamw.args.min_8bit_size = MOST_WIDE
        kept: dict[str, Any] = self._adamw.state[own]
        return kept


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Any:
    """torch's AdamW, or that of bitsandbytes, which keeps its running means in 8 bits."""
    fields: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.state == "float32":
        return torch.optim.AdamW(groups, **fields, fused=True)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise ValueError("optim.state: 8bit needs bitsandbytes; pip install 'ibtpo[8bit]', or use float32") from None
    return AdamW8bit([group for group in groups if group["params"]], **fields)  # type: ignore[no-untyped-call]


def splits_in_blocks(shape: torch.Size, processes: int) -> bool:
    """Can the rows be divided among processes so that no block of an 8-bit state spans two of them?"""
    each = -(-shape[0] // processes)
    return shape.numel() < MOST_WIDE or each >= shape[0] or each * (shape.numel() // shape[0]) % BLOCK == 0
