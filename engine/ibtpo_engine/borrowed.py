"""Models of `transformers` already in memory, with or without PEFT's adapters, whose parameters are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from ibtpo_engine.adapter_folder import check_plain
from ibtpo_engine.errors import CheckpointError, StaleWeights
from ibtpo_engine.lora import TARGETS, Adapters, LoRA, adapt_layers, is_adapter
from ibtpo_engine.model import Model
from ibtpo_engine.model_config import ARCHITECTURES, ModelConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_MERGE = "merge it into the model (merge_and_unload)"


def borrow(model: PreTrainedModel | PeftModel) -> Model:
    """A model of `transformers` as an engine's model, with the same parameters; nothing is copied.

    A LoRA adapter of PEFT is shared, too, and PEFT's own switch acts on both: within `disable_adapter()` the engine
    samples from the base. Dropout is left out, in adapters too, as in evaluation.

    The parameters are borrowed, not the code: forward hooks and replaced modules are not run.

    Raises:
        CheckpointError: the engine does not run its architecture (see `load_model`), it is compiled, wrapped, split,
            offloaded or of several types, or its parameters are not those of its configuration; or its adapters are
            more than one plain LoRA on attention and MLP projections in every layer.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kind = type(base).__name__
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"borrow: {kind} is not supported, only plain {', '.join(ARCHITECTURES)} are. Pass the model itself, not a "
            "compiled, wrapped or sharded one (accelerate: unwrap_model(model, keep_torch_compile=False))."
        )
    adapters = _adapters_of(model, base)
    with torch.device("meta"):
        ours = Model(ModelConfig.from_dict(base.config.to_dict() | {"architectures": [kind]}))
    if adapters is not None:
        adapt_layers(ours, adapters, seed=0)
        ours.adapters = adapters
    theirs = _parameters_of(base, adapters)
    _check_borrowed(theirs, dict(ours.named_parameters()), kind)
    for name, parameter in ours.named_parameters():  # load_state_dict copies this flag to theirs
        parameter.requires_grad_(theirs[name].requires_grad)
    ours.load_state_dict(theirs, assign=True)
    return ours


class PeftAdapters(Adapters):
    """An adapter in layers of PEFT; it is on only while PEFT has it on.

    Args:
        config: rank, weight and places.
        name: its name in PEFT.
        layers: PEFT's layers that have it.
    """

    def __init__(self, config: LoRA, name: str, layers: list[Any]) -> None:
        super().__init__(config)
        self.name = name
        self._layers = layers
        self._scaling = layers[0].scaling[name]

    @property
    def in_use(self) -> bool:
        """Do they take part in a forward pass now?"""
        return self.on and not self._layers[0].disable_adapters

    def state(self) -> object:
        """Everything that decides how a forward pass applies them, for comparison.

        Raises:
            StaleWeights: PEFT no longer applies this adapter alone, in the way it did when it was borrowed.
        """
        off = self._layers[0].disable_adapters
        as_borrowed = ([self.name], self._scaling, off, False)
        for layer in self._layers:
            now = (layer.active_adapters, layer.scaling.get(self.name), layer.disable_adapters, layer.merged)
            if now != as_borrowed:
                raise StaleWeights(
                    f"PEFT's adapter {self.name!r} was merged, scaled or switched off in some layers, or another one "
                    "was made active. Undo that, or borrow the model again and make a new Engine"
                )
        return super().state()


def _adapters_of(model: Any, base: nn.Module) -> PeftAdapters | None:
    """The adapter that PEFT has active in a model; None if it has no adapters."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    unloaded = model is base and not any(hasattr(module, "adapter_layer_names") for module in base.modules())
    if not configs or unloaded:  # up to 0.18 PEFT leaves the configurations where it has unloaded the adapters
        return None
    if others := [str(config.peft_type) for config in configs.values() if config.peft_type != "LORA"]:
        raise CheckpointError(f"borrow: PEFT's {others[0]} is not supported, only LoRA is; {_MERGE}")
    layers = {path: module for path, module in base.named_modules() if hasattr(module, "lora_A")}
    active = {name for layer in layers.values() for name in layer.active_adapters}
    if len(active) != 1:
        raise CheckpointError(f"borrow: {len(active)} adapters are active {sorted(active)}; choose one by set_adapter")
    [name] = active
    check_plain(vars(configs[name]), f"borrow: adapter {name!r}", _MERGE, in_memory=True)
    layers = {path: layer for path, layer in layers.items() if name in layer.r}
    adapters = PeftAdapters(_lora(name, layers), name, list(layers.values()))
    try:
        adapters.state()
    except StaleWeights as error:
        raise CheckpointError(f"borrow: {error}") from None
    return adapters


def _lora(name: str, layers: dict[str, Any]) -> LoRA:
    """The configuration of the adapter `name` in PEFT's layers, given by their paths in the model."""
    names = {path.rpartition(".")[2] for path in layers}
    if odd := names.difference(TARGETS):
        raise CheckpointError(f"borrow: {min(odd)} has an adapter; only {', '.join(TARGETS)} may have one; {_MERGE}")
    if odd := {type(layer.lora_variant[name]).__name__ for layer in layers.values() if name in layer.lora_variant}:
        raise CheckpointError(f"borrow: adapter {name!r} is a {min(odd)}; only plain LoRA is supported; {_MERGE}")
    rank, scaling = next((layer.r[name], layer.scaling[name]) for layer in layers.values())
    return LoRA(rank=rank, alpha=scaling * rank, targets=tuple(target for target in TARGETS if target in names))


def _parameters_of(base: nn.Module, adapters: PeftAdapters | None) -> dict[str, Parameter]:
    """The base's parameters, and those of the given adapter only, under the names that our models use."""
    parameters = dict(base.named_parameters())  # a tied head is named once, as the embedding
    if adapters is None:
        return parameters
    plain = {}
    for name, parameter in parameters.items():
        if not is_adapter(name):
            plain[name.replace(".base_layer.", ".")] = parameter
            continue
        matrix, adapter, last = name.rsplit(".", 2)  # "...q_proj.lora_A", "default", "weight"
        if adapter == adapters.name:
            plain[f"{matrix}.{last}"] = parameter
    return plain


def _check_borrowed(theirs: dict[str, Parameter], wanted: dict[str, Parameter], kind: str) -> None:
    if odd := theirs.keys() ^ wanted.keys():
        raise CheckpointError(
            f"borrow: parameter {min(odd)} is {'missing' if min(odd) in wanted else 'unexpected'} in this {kind}. "
            "Merge adapters that are not in every layer, remove heads of your own, and let "
            "config.tie_word_embeddings agree with the weights."
        )
    first = next(iter(theirs.values()))
    for name, found in theirs.items():
        dtype = found.dtype if is_adapter(name) else first.dtype  # PEFT keeps adapters of a bf16 model in fp32
        needed = (Parameter, dtype, first.device, wanted[name].shape)
        if found.is_meta or (type(found), found.dtype, found.device, found.shape) != needed:
            raise CheckpointError(
                f"borrow: {name} is a {type(found).__name__} {list(found.shape)} of {found.dtype} on {found.device}; "
                f"it must be a Parameter {list(needed[3])} of {first.dtype} in memory on {first.device}, as all are"
            )
