"""Low-rank adapters beside frozen weights: y = W x + b + (alpha / rank) B (A x) (Hu et al., arXiv 2106.09685).

The weights are never merged, so the policy without adapters, the reference of a KL penalty, needs no second copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibtpo_kernels import fastest_linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that may be adapted: those of attention, then those of the MLP."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Configuration of a model's adapters.

    Raises:
        ValueError: a value is out of range; the message names it.

    Source: Hu et al., "LoRA" (2021).
    """

    rank: int = 16
    """Columns of B and rows of A."""
    alpha: float = 32.0
    """The product B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Names of the projections adapted, in every layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA: rank={self.rank} must be at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA: alpha={self.alpha} must be above 0 and finite")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"LoRA: targets={self.targets} must name some of {', '.join(TARGETS)}, each once")

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / self.rank


class Adapters:
    """The adapters of one model: their configuration and shared switch.

    Attributes:
        config: rank, weight and places.
        on: the switch.
    """

    def __init__(self, config: LoRA) -> None:
        self.config = config
        self.on = True

    @property
    def in_use(self) -> bool:
        """Do they take part in a forward pass now?"""
        return self.on

    def state(self) -> object:
        """Everything that decides how a forward pass applies them, for comparison."""
        return self.in_use, self.config


class LoRALinear(nn.Linear):
    """A linear layer that keeps its parameters and their names, with an adapter beside it.

    Args:
        linear: its weight and bias are taken over, not copied.
        adapters: configuration and switch.
        generator: draws A, uniform as in a new linear layer; B is 0, so that the layer initially equals `linear`.
    """

    def __init__(self, linear: nn.Linear, adapters: Adapters, generator: torch.Generator) -> None:
        inner, outer = linear.in_features, linear.out_features
        super().__init__(inner, outer, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = adapters
        rank, weight = adapters.config.rank, linear.weight
        bound = 1.0 / math.sqrt(inner)  # kaiming_uniform_ with a = sqrt(5), the default of PEFT too
        down = (2.0 * torch.rand((rank, inner), dtype=torch.float32, generator=generator, device="cpu") - 1.0) * bound
        self.lora_A = _holder(down.to(device=weight.device, dtype=weight.dtype))
        self.lora_B = _holder(weight.new_zeros((outer, rank), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        y = fastest_linear(x, self.weight, self.bias)
        if not self.adapters.in_use:
            return y
        down, up = self.lora_A.weight, self.lora_B.weight
        low = fastest_linear(fastest_linear(x.to(down.dtype), down), up)  # PEFT's may be fp32 in a bf16 model
        return (y + self.adapters.config.scale * low).to(y.dtype)


def _holder(weight: Tensor) -> nn.Linear:
    """A module that holds this weight, so that its name is lora_A.weight, as in PEFT."""
    outer, inner = weight.shape
    linear = nn.Linear(inner, outer, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def adapt_layers(model: nn.Module, adapters: Adapters, seed: int) -> None:
    """Put an adapter on every projection that the configuration names; freeze everything else.

    Args:
        model: its linear layers are replaced; parameters keep identity and names.
        adapters: configuration and switch.
        seed: decides the initial A.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in adapters.config.targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, adapters, generator))


def is_adapter(name: str) -> bool:
    """Does a parameter of this name belong to an adapter?"""
    return ".lora_A." in name or ".lora_B." in name
