"""The policy a run starts from: a checkpoint folder, or the built-in tiny one with fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ibtpo.tasks.digit_chain import char_tokenizer
from ibtpo_engine import Model, ModelConfig, initialise, load_model, load_tokenizer, save_model, stop_tokens


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer and the tokens that end an answer."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Write a folder that `transformers` loads."""
        save_model(self.model, self.tokenizer, folder)


def load_policy(folder: Path | str, *, dtype: torch.dtype, device: torch.device) -> Policy:
    """Load a Hugging Face checkpoint folder.

    Raises:
        CheckpointError: model or tokenizer cannot be used; the message names file, field and remedy.
    """
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    return Policy(model, tokenizer, stop_tokens(folder, tokenizer))


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
