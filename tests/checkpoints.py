"""Tiny checkpoint folders made by `transformers` itself, with a byte-level tokenizer of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def byte_tokenizer(*, chat: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, a merged blank line as Qwen has it, and the special tokens of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=(IM_END if chat else END) if eos else None,
        pad_token=END,
        additional_special_tokens=[END, IM_START, IM_END],
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_checkpoint(
    folder: Path,
    kind: str = "qwen3",
    *,
    tied: bool = False,
    chat: bool = True,
    eos: bool = True,
    context: int = 128,
    shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    teach: int = 0,
) -> Path:
    """Write a random `kind` ("qwen3", "qwen2" or "llama") model of 30 k parameters and its tokenizer.

    Args:
        teach: updates on ``single_digits`` before it is saved, so that a rollout now and then is right.
    """
    tokenizer = byte_tokenizer(chat=chat, eos=eos)
    config_class, model_class = CLASSES[kind]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        **({"head_dim": 12} if kind == "qwen3" else {}),
    )
    torch.manual_seed(seed)
    model = model_class(config)
    if teach:
        single_digits(model, tokenizer, teach)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def single_digits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, updates: int) -> None:
    """Teach a model to answer additions with some digit and the end token; one answer in ten is then right."""
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(updates):
        digits = torch.randint(10, (16, 3), generator=rng).tolist()
        texts = [chat_text(tokenizer, f"{a}+{b}") + f"{c}{tokenizer.eos_token}" for a, b, c in digits]
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in texts])
        labels = ids.clone()
        labels[:, :-2] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def chat_text(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The prompt as the trainer would put it."""
    if not tokenizer.chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


def save_additions(path: Path, rows: int = 40) -> Path:
    """A JSONL file of one-digit additions modulo 10."""
    pairs = [(a, b) for a in range(10) for b in range(10)][::3][:rows]
    lines = [json.dumps({"prompt": f"{a}+{b}", "answer": str((a + b) % 10)}) for a, b in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
