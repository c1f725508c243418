"""The policy a run starts from: a checkpoint folder, or the built-in tiny one with fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ibtpo.config import LoRAConfig
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
from ibtpo_engine.adapter_folder import base_of, is_adapter_folder
from ibtpo_engine.errors import CheckpointError
from ibtpo_engine.lora import TARGETS

_ADAPTED = {"all": TARGETS, "attention": TARGETS[:4], "mlp": TARGETS[4:]}


def adapted_projections(config: LoRAConfig) -> tuple[str, ...]:
    """Names of the projections that adapters are put on."""
    return _ADAPTED[config.targets]


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, the tokens that end an answer, and the folder its weights came from, if any."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    base: str | None = None

    def save(self, folder: Path) -> None:
        """Write a folder that `transformers` loads; of a model with adapters, one that PEFT loads on its base."""
        if self.model.adapters is None:
            save_model(self.model, self.tokenizer, folder)
            return
        assert self.base is not None  # see `adapt`
        save_adapter(self.model, folder, base=self.base)
        self.tokenizer.save_pretrained(folder)

    def adapt(self, config: LoRAConfig, seed: int) -> None:
        """Put the adapters on that `config` asks for, unless they are there.

        Raises:
            ValueError: the policy is not from a folder, or has other adapters.
        """
        if config.rank == 0:
            return
        wanted = LoRA(rank=config.rank, alpha=config.alpha, targets=adapted_projections(config))
        if self.base is None:
            raise ValueError("lora.rank: the built-in policy is small, train it whole; give a checkpoint with --model")
        if self.model.adapters is None:
            self.model.add_adapters(wanted, seed=seed)
        elif self.model.adapters.config != wanted:
            raise ValueError(
                f"lora: {wanted} is asked for, but the model's folder has {self.model.adapters.config}; "
                "set lora.rank, lora.alpha and lora.targets alike, or lora.rank to 0"
            )


def load_policy(folder: Path | str, *, dtype: torch.dtype, device: torch.device) -> Policy:
    """Load a Hugging Face checkpoint folder, or a PEFT adapter folder with the base that it names.

    Raises:
        CheckpointError: model or tokenizer cannot be used; the message names file, field and remedy.
    """
    base = base_of(folder) if is_adapter_folder(folder) else str(Path(folder).resolve())
    model = load_model(base, dtype=dtype, device=device)
    if is_adapter_folder(folder):
        load_adapter(model, folder)
    tokenizer = load_tokenizer(folder if (Path(folder) / "tokenizer_config.json").exists() else base)
    return Policy(model, tokenizer, stop_tokens(base, tokenizer), base)


def model_shape(source: Path | str) -> ModelConfig:
    """The shape of a policy that is not loaded yet: "built-in", a checkpoint folder, or an adapter folder's base."""
    if source == "built-in":
        return ModelConfig.from_dict(built_in_config(char_tokenizer()))
    folder = Path(base_of(source) if is_adapter_folder(source) else source)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a Hugging Face checkpoint folder.")
    return ModelConfig.from_folder(folder)


def built_in_policy(seed: int, *, dtype: torch.dtype, device: torch.device) -> Policy:
    """A Qwen3-shaped model of 0.22 M parameters with fresh weights and a tokenizer of single characters."""
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
