"""A lower-precision copy of a model beside its fp32 masters, refreshed in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ibtpo_engine.model import Model


class Shadow:
    """A copy of a model in another type, for a trainer that keeps its weights in fp32 and samples in bf16.

    Give it to `Engine` in place of the model: ``engine.weights_changed()`` then refreshes it, and an update of the
    masters without that call is detected. A refresh allocates nothing: it converts directly into the copy's memory,
    whose addresses stay.

    Args:
        masters: the trained model; borrowed.
        dtype: of the copy.

    Attributes:
        masters: as given.
        model: the copy; takes no gradient. Its adapters are switched on and off with those of the masters.
    """

    def __init__(self, masters: Model, dtype: torch.dtype = torch.bfloat16) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"Shadow: dtype={dtype} must be a floating-point type, such as torch.bfloat16")
        self.masters = masters
        converted = {  # deepcopy uses these instead of copying: no second set of masters, not even temporarily
            id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in masters.parameters()
        }
        switch = {id(masters.adapters): masters.adapters}  # both share one switch and configuration
        self.model: Model = copy.deepcopy(masters, converted | switch)

    def refresh(self) -> None:
        """Round the current masters into the copy.

        Raises:
            ValueError: parameters were added to the masters or removed.
        """
        masters, copies = dict(self.masters.named_parameters()), dict(self.model.named_parameters())
        if masters.keys() != copies.keys():
            name = min(masters.keys() ^ copies.keys())
            raise ValueError(f"Shadow: parameter {name} was added to the masters or removed; make a new Shadow")
        copy_weights(masters, copies)


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `source` into the one of the same name, unless they are the same tensor."""
    for name, tensor in target.items():
        if source[name] is not tensor:
            tensor.copy_(source[name])
