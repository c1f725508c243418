"""The policy a run starts from: a checkpoint folder, or the tiny built-in one with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ibtpo.config import LoRAConfig, TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.run_format import CONFIG, is_run
from ibtpo.tasks.digit_chain import char_tokenizer
from ibtpo_engine import (
    LoRA,
    Model,
    ModelConfig,
    initialise,
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    save_model,
    stop_tokens,
)
from ibtpo_engine.adapter_folder import adapter_config, base_of, is_adapter_folder
from ibtpo_engine.checkpoint import check_folder
from ibtpo_engine.errors import CheckpointError
from ibtpo_engine.lora import TARGETS

_ADAPTED = {"all": TARGETS, "attention": TARGETS[:4], "mlp": TARGETS[4:]}


def adapters_of(config: TrainConfig) -> LoRA | None:
    """The adapters that a run trains: those configured, or those of an adapter folder; None if it trains the weights.

    Raises:
        CheckpointError: the folder's adapter cannot be run.
    """
    if config.lora.rank:
        return _asked_for(config.lora)
    return adapter_config(config.model) if is_adapter_folder(config.model) else None


def may_adapt(config: TrainConfig) -> bool:
    """May the run train adapters of any rank?"""
    is_fixed = config.model == "built-in" or is_adapter_folder(config.model)
    return not is_fixed and config.parity == "fast"


def _asked_for(config: LoRAConfig) -> LoRA:
    return LoRA(rank=config.rank, alpha=config.alpha, targets=_ADAPTED[config.targets])


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, the tokens that end an answer, and the folder of its weights, if any."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    base: str | None = None

    def save(self, folder: Path) -> None:
        """Write a folder for `transformers`; for a model with adapters, an adapter folder for PEFT."""
        if self.model.adapters is None:
            save_model(self.model, self.tokenizer, folder)
            return
        assert self.base is not None  # see `adapt`
        save_adapter(self.model, folder, base=self.base)
        self.tokenizer.save_pretrained(folder)

    def adapt(self, config: LoRAConfig, seed: int) -> None:
        """Add the adapters that `config` describes, unless they are there.

        Raises:
            ValueError: the policy has other adapters.
        """
        if config.rank == 0:
            return
        wanted = _asked_for(config)
        assert self.base is not None  # `train` refuses adapters on the built-in policy
        if self.model.adapters is None:
            self.model.add_adapters(wanted, seed=seed)
        elif self.model.adapters.config != wanted:
            raise ValueError(
                f"lora: {wanted} is asked for, but the model's folder has {self.model.adapters.config}; "
                "give lora.rank, lora.alpha and lora.targets these values, or set lora.rank to 0"
            )


def load_policy(
    folder: Path | str, *, dtype: torch.dtype, device: torch.device, began_with: str | None = None
) -> Policy:
    """Load a Hugging Face checkpoint folder, or a PEFT adapter folder with its base.

    Args:
        folder: the checkpoint.
        dtype, device: type and device to which the weights are converted.
        began_with: as for `base_folder`.

    Raises:
        CheckpointError: model or tokenizer cannot be used; the message names file, field and remedy.
    """
    base = base_folder(folder, began_with) if is_adapter_folder(folder) else str(Path(folder).resolve())
    model = load_model(base, dtype=dtype, device=device)
    if is_adapter_folder(folder):
        load_adapter(model, folder)
    tokenizer = _tokenizer(folder, base)
    return Policy(model, tokenizer, stop_tokens(base, tokenizer), base)


def _tokenizer(folder: Path | str, base: Path | str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder if (Path(folder) / "tokenizer_config.json").exists() else base)


def base_folder(folder: Path | str, began_with: str | None = None) -> str:
    """The folder of an adapter's base checkpoint.

    For a run's checkpoint the run's configuration overrides the path in the adapter, since the base may have been moved
    after the adapter was saved.

    Args:
        folder: holds an adapter.
        began_with: for a run's checkpoint, the model the run began with; by default the one in its config.yaml.

    Raises:
        CheckpointError: the base does not exist.
    """
    run = _run_of(folder)
    if run is None:
        return base_of(folder)
    began_with = str(load_yaml(run / CONFIG).get("model")) if began_with is None else began_with
    if is_adapter_folder(began_with) and _run_of(began_with) != run:
        return base_folder(began_with)
    if Path(began_with).is_dir() and not is_adapter_folder(began_with):
        return str(Path(began_with).resolve())
    try:
        return base_of(folder)
    except CheckpointError:
        raise CheckpointError(
            f"{folder} holds adapters, and their base model is not there: {began_with}. Give its new folder by "
            f"ibtpo train --resume {run} --model FOLDER, or in the field model of {run / CONFIG}"
        ) from None


def _run_of(folder: Path | str) -> Path | None:
    """The run folder of which a folder is a checkpoint, or None."""
    run = Path(folder).absolute().parent.parent
    return run if is_run(run) else None


def model_shape(source: Path | str, began_with: str | None = None) -> ModelConfig:
    """The shape of a policy that is not loaded yet: "built-in", a checkpoint folder, or an adapter folder's base.

    Args:
        source: "built-in" or the folder to be loaded.
        began_with: as for `base_folder`.

    Raises:
        CheckpointError: there is no such folder, or its config.json cannot be used.
    """
    if source == "built-in":
        return ModelConfig.from_dict(built_in_config(char_tokenizer()))
    folder = Path(base_folder(source, began_with) if is_adapter_folder(source) else source)
    check_folder(folder)
    return ModelConfig.from_folder(folder)


def tokenizer_of(source: Path | str, began_with: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy that is not loaded yet; the arguments are those of `model_shape`."""
    if source == "built-in":
        return char_tokenizer()
    return _tokenizer(source, base_folder(source, began_with) if is_adapter_folder(source) else source)


def built_in_policy(seed: int, *, dtype: torch.dtype, device: torch.device) -> Policy:
    """A Qwen3-shaped model of 0.22 M parameters with random weights and a tokenizer of single characters."""
    tokenizer = char_tokenizer()
    model = initialise(Model(ModelConfig.from_dict(built_in_config(tokenizer))), seed)
    return Policy(model.to(device=device, dtype=dtype), tokenizer, (int(tokenizer.eos_token_id),))


def built_in_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """config.json of the built-in policy, as `transformers` reads it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "eos_token_id": int(tokenizer.eos_token_id),
        "pad_token_id": int(tokenizer.pad_token_id),
    }
