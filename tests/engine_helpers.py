"""Tiny random models and checkpoints, and what an engine's tokens must be by one plain forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ibtpo_engine import Engine, Model, ModelConfig, Node, Sampling, Tree
from ibtpo_kernels import sample

VOCABULARY = 40
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

ROUNDING = 2e-5  # fp32 log-probs of these models, computed in batches of different shapes


def tiny_model(
    seed: int = 0,
    *,
    vocabulary: int = VOCABULARY,
    positions: int = 512,
    hidden: int = 24,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A Qwen3 of few layers whose weights are large enough for tokens to depend on everything before them."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": positions,
        }
    )
    model = Model(config).to(dtype)
    randomise(model, seed)
    return model.requires_grad_(False)


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Overwrite every parameter in place: matrices and biases normal around 0, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (parameter.ndim == 1 and name.endswith("weight")))


def save_checkpoint(folder: Path, family: str, *, seed: int = 0, shard: str = "1GB", **fields: Any) -> PreTrainedModel:
    """A random checkpoint as `transformers` saves it, with a tokenizer; returns the model in eval mode."""
    config_type, model_type = FAMILIES[family]
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    model = model_type(config_type(**(shape | fields)))
    randomise(model, seed, scale=0.2)
    model.eval()
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path, *, eos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single words, one a token id of `VOCABULARY`."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>"} if eos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", **special)
    fast.save_pretrained(folder)
    return fast


def path_logits(model: Model, tokens: npt.ArrayLike) -> Tensor:
    """Logits [n, V] after every token of one path, by the training forward."""
    tokens = torch.as_tensor(np.asarray(tokens, np.int64))
    n = len(tokens)
    with torch.no_grad():
        hidden = model.packed(tokens, torch.arange(n), torch.full((n,), n, dtype=torch.int32))
        return hidden @ model.head.T


def expected_tokens(model: Model, node: Node, sampling: Sampling) -> npt.NDArray[np.int64]:
    """What `node` must hold: each token drawn, with its own random number, from one forward pass over the path."""
    logits = path_logits(model, node.prefix())[node.start - 1 : node.end - 1].float()
    keys = torch.tensor([[node.stream, depth] for depth in range(node.start, node.end)])
    drawn = sample(
        logits,
        keys,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
    )
    return drawn[0].numpy()


def prompt_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """A random prompt."""
    return np.random.default_rng(seed).integers(3, vocabulary, length).tolist()


def same(left: Sequence[Node], right: Sequence[Node], atol: float = ROUNDING) -> None:
    """Assert that two lists of nodes hold the same tokens, endings and, within rounding, numbers."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.start, a.finish) == (b.start, b.finish)
        for name in ("logprob", "logprob_raw", "entropy"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=atol, err_msg=name)


def grow(engine: Engine, prompt: Sequence[int], sampling: Sampling, *, key: int = 0) -> Tree:
    """A tree that forks at its root, within a leaf and at a leaf's last token, so every kind of sharing occurs."""
    tree = engine.tree(prompt, key=key)
    first, second, _ = engine.extend(tree.root.fork(3), sampling)
    cut = max(len(first) // 2, 1)
    engine.extend([*first.fork(2, at=cut), *second.fork(1, at=len(second) - 1)], sampling)
    return tree


def node_on(model: Model, prompt: list[int], sampling: Sampling) -> Node:
    """What a fresh engine samples behind the prompt."""
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(prompt) as tree:
        return engine.extend(tree.root.fork(), sampling)[0]


def free_pages(engine: Engine) -> int:
    """Pages free, or held by nothing but the index."""
    return engine.cache.pool.num_free + engine.cache.index.evictable()


def assert_idle(engine: Engine) -> None:
    """No tree open, nothing under way, every page free or evictable, every slot free."""
    engine.check_integrity()
    scheduler = engine.scheduler
    assert not engine._trees
    assert not (scheduler.waiting or scheduler.running or scheduler.fills)
    assert free_pages(engine) == engine.cache.pool.num_pages
    assert scheduler.slots.num_free == len(scheduler.slots.table)


def work(call: Callable[[], object]) -> int:
    """How many instructions of Python a call takes; what C does is not seen."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def check_every_step(engine: Engine) -> list[int]:
    """From now on the engine's books are checked after each step; returns a list that grows by one entry a check."""
    checks: list[int] = []
    step = engine.scheduler.step

    def checked(version: int, most: int = 1) -> list[Node] | None:
        ended = step(version)
        engine.check_integrity()
        checks.append(len(engine.scheduler.running))
        return ended

    engine.scheduler.step = checked  # type: ignore[method-assign]
    return checks
