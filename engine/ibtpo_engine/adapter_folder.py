"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ibtpo_engine.checkpoint import INDEX, SINGLE
from ibtpo_engine.errors import CheckpointError
from ibtpo_engine.lora import TARGETS, LoRA, is_adapter
from ibtpo_engine.model import Model
from ibtpo_engine.weight_file import WeightFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name

_PLAIN: dict[str, tuple[object, ...]] = {  # fields of PEFT that change the result, and the values that do not
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),  # others change the base's weights
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
}

_OF_THE_BASE = ("init_lora_weights", "bias")  # those of them that concern the base's own weights

_MERGE = "merge it into its base with PEFT (merge_and_unload) and give the folder that the merged model is saved to"


def is_adapter_folder(folder: Path | str) -> bool:
    """Does a folder hold an adapter, and no model of its own? Some trainers write the base's config.json beside one."""
    folder = Path(folder)
    is_model = (folder / "config.json").exists() and any((folder / name).exists() for name in (INDEX, SINGLE))
    return (folder / CONFIG).is_file() and not is_model


def save_adapter(model: Model, folder: Path | str, *, base: str) -> None:
    """Write a model's adapters so that PEFT loads them; its frozen weights are not written.

    Args:
        model: has adapters.
        folder: made if it is not there.
        base: the folder or name of the checkpoint that the adapters belong on.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.adapters is None:
        raise ValueError("save_adapter: this model has no adapters; use save_model, or model.add_adapters first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.adapters.config
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    state = {
        PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: Model, folder: Path | str) -> None:
    """Put the adapters of a PEFT folder on a model, in the model's type, and freeze everything else.

    Args:
        model: the base, without adapters.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, asks for more than plain LoRA on attention and MLP projections,
            or does not fit the model, which must be loaded anew after this.
        ValueError: the model has adapters already.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    file = _weights(folder)
    model.add_adapters(config)
    parameters = {PREFIX + name: p for name, p in model.named_parameters() if is_adapter(name)}
    missing, unexpected = sorted(parameters.keys() - file.names()), sorted(set(file.names()) - parameters.keys())
    if missing or unexpected:
        what = f"{missing[0]!r} is missing" if missing else f"unexpected tensor {unexpected[0]!r}"
        raise CheckpointError(
            f"{file.path}: {what}. Check that the adapter belongs to this model. Only adapters on "
            f"{', '.join(TARGETS)}, each in every layer, are supported; if it has others, {_MERGE}."
        )
    for name, parameter in parameters.items():
        if file.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{file.path}: {name} has shape {file.shape(name)}, but the model needs {tuple(parameter.shape)}. "
                "Check that the adapter belongs to this model."
            )
        with torch.no_grad():
            file.read(name, parameter)


def check_plain(raw: Mapping[str, Any], source: str, remedy: str, *, in_memory: bool = False) -> None:
    """Raise CheckpointError unless PEFT's fields describe plain LoRA.

    Args:
        raw: the fields.
        source: where they are from, for the message.
        remedy: what to do instead, for the message.
        in_memory: is their base the model in memory, with any changes that they made to its weights?
    """
    for name, plain in _PLAIN.items():
        if raw.get(name) not in plain and not (in_memory and name in _OF_THE_BASE):
            raise CheckpointError(f"{source}: {name} = {raw[name]!r} is not supported, only plain LoRA is; {remedy}.")


def base_of(folder: Path | str) -> str:
    """The checkpoint folder that an adapter folder says it belongs on.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    base = _json(Path(folder)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not Path(base).is_dir():
        raise CheckpointError(
            f"{Path(folder) / CONFIG}: base_model_name_or_path = {base!r} must be the checkpoint folder of the "
            "adapter's base model; correct it, or load that folder and pass its model to load_adapter"
        )
    return base


def _weights(folder: Path) -> WeightFile:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = path.with_suffix(".bin")
        hint = f" Found {pickled.name}: convert it to safetensors (loading pickles runs code)."
        raise CheckpointError(f"{path}: not found.{hint if pickled.exists() else ' Save the adapter again.'}")
    return WeightFile(path)


def _json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Save the adapter again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not an object. Save the adapter again.")
    return raw


def _adapted(weights: WeightFile, targets: object, source: Path) -> set[str]:
    """The last names of the modules that have adapter weights; `targets` must match all of them, as for PEFT."""
    if isinstance(targets, list):
        pattern = rf"(.*\.)?({'|'.join(re.escape(str(target)) for target in targets)})"
    else:
        pattern = ".*" if targets == "all-linear" else str(targets)
    modules = {name.removeprefix(PREFIX).partition(".lora_A.")[0] for name in weights.names() if ".lora_A." in name}
    try:
        left_out = sorted(module for module in modules if not re.fullmatch(pattern, module))
    except re.error:
        left_out = sorted(modules)
    if left_out:
        raise CheckpointError(
            f"{source}: target_modules = {targets!r} does not name {left_out[0]}, which has an adapter; add it there."
        )
    return {module.rpartition(".")[2] for module in modules}


def adapter_config(folder: Path | str) -> LoRA:
    """The adapters that an adapter folder describes.

    Raises:
        CheckpointError: adapter_config.json cannot be read, or asks for more than plain LoRA; or it names targets by a
            pattern, which only the weights resolve, and they cannot be read.
    """
    folder = Path(folder)
    raw, path = _json(folder), folder / CONFIG
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; use a LORA adapter.")
    check_plain(raw, str(path), _MERGE)
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(name in TARGETS for name in targets):  # a pattern, or whole paths
        targets = _adapted(_weights(folder), targets, path)
    names = tuple(name for name in TARGETS if name in targets)
    try:
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
        if raw.get("use_rslora"):  # PEFT then scales by alpha / sqrt(rank), ours is alpha / rank
            alpha *= math.sqrt(rank)
        return LoRA(rank=rank, alpha=alpha, targets=names)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: r and lora_alpha must be positive numbers ({error}).") from None
