"""AdamW on fp32 master weights, with warm-up and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ibtpo.config import OptimConfig
from ibtpo_engine.shadow import copy_weights


class NonFinite(ArithmeticError):
    """Loss, gradient or weights hold NaN or Inf; the message says which and what to do."""


class NonFiniteGradient(NonFinite):
    """The gradient holds NaN or Inf; the weights were left as they were."""


class MasterAdamW:
    """Updates a model in place; where it computes in less than fp32, an fp32 copy of each weight is kept and updated.

    A bf16 weight has 8 bits of mantissa, so an update of 1e-6 would be rounded away; the master keeps it.

    Args:
        model: its parameters are updated, its gradients read and cleared.
        config: rates and limits. Weight decay acts on matrices only.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.num_steps = 0
        self.scale = 1.0  # of the learning rate, for schedules beyond the warm-up
        self.sum_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda masters: None  # over several processes
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wide = (torch.float32, torch.float64)
        self._masters = {
            name: p if p.dtype in wide else nn.Parameter(p.detach().float()) for name, p in self._parameters.items()
        }
        masters = list(self._masters.values())
        groups = [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )

    @property
    def lr(self) -> float:
        """Learning rate of the step to come: linear warm-up, then constant, times `scale`."""
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
        self.sum_gradients(self._masters.values())
        norm = float(nn.utils.clip_grad_norm_(self._masters.values(), self.config.grad_clip))
        if norm == norm and norm != float("inf"):
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._adamw.step()
            self.num_steps += 1
            self._write_back()
        self.discard()
        if norm != norm or norm == float("inf"):
            raise NonFiniteGradient(
                f"the gradient's norm is {norm} at optimizer step {self.num_steps + 1}; lower optim.lr or "
                "loss.clip_high, and go on from the last checkpoint"
            )
        return norm

    def discard(self) -> None:
        """Clear the accumulated gradient without a step."""
        for parameter in [*self._parameters.values(), *self._masters.values()]:
            parameter.grad = None

    def _write_back(self) -> None:
        copy_weights(self._masters, self._parameters)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors for safetensors: masters (where kept) and moments by name."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                state[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, for a model of the same shape."""
        self.num_steps = int(state["num_steps"])
        for name, master in self._masters.items():
            if f"master.{name}" in state:
                master.copy_(state[f"master.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in state:
                    self._adamw.state[master][key] = state[f"{key}.{name}"].clone().to(master.device)
        self._write_back()
