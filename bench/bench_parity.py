"""What parity="bitwise" costs: a decode step, and a training forward and backward, against parity="fast".

The policy is four times as wide as the built-in one, so that products and not calls are what is measured. The native
decoder is bitwise as it is: a small float32 policy decodes at one speed.

make bench SUITES=bench/bench_parity.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ibtpo_engine import Engine, Model, ModelConfig, Sampling, initialise, native, sampler_logprob
from ibtpo_kernels import linear_logprob, with_value_of

WAYS = [("native", torch.float32), ("module", torch.float32), ("module", torch.bfloat16)]
VOCABULARY, HIDDEN, LAYERS = 1000, 384, 4
BATCHES = (1, 32)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 1024,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )


def sampled_trees(engine: Engine, count: int, sampling: Sampling):
    """Trees of four branches, two of which fork again half-way."""
    trees = [engine.tree(prompt) for prompt in np.random.default_rng(0).integers(1, VOCABULARY, (count, 50))]
    for tree in trees:
        first, second, *_ = engine.extend(tree.root.fork(4), sampling)
        engine.extend([*first.fork(1, at=len(first) // 2), *second.fork(1, at=len(second) // 2)], sampling)
    return trees


@pytest.mark.parametrize("parity", ["fast", "bitwise"])
@pytest.mark.parametrize(("how", "dtype"), WAYS, ids=["fp32-native", "fp32-module", "bf16-module"])
@pytest.mark.parametrize("batch", BATCHES)
def test_step(benchmark, config, batch, how, dtype, parity, monkeypatch):
    """One decode step in the middle of its pages, again and again at one length."""
    monkeypatch.setattr(native, "MOST_BYTES", 1 << 30 if how == "native" else 0)
    model = initialise(Model(config), 0).to(dtype)
    engine = Engine(model, kv_tokens=batch * 128, parity=parity)
    assert engine.scheduler.runner.is_native == (how == "native")
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (batch, 24))
    nodes = [engine.tree(prompt).root.fork()[0] for prompt in prompts]
    engine._submit(nodes, Sampling(max_tokens=64))
    length = engine.scheduler.slots.length
    while len(engine.scheduler.running) < batch:
        engine._step()
    before = length.copy()

    def again() -> None:
        length[:] = before

    benchmark.group = f"step batch {batch} {str(dtype).removeprefix('torch.')} {how}"
    benchmark.pedantic(engine._step, setup=again, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("parity", ["fast", "bitwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_train(benchmark, config, dtype, parity):
    """Forward and backward of the log-probs of four trees of some 1,500 packed tokens, the exact ones included."""
    model = initialise(Model(config), 0).to(dtype)
    trees = sampled_trees(Engine(model, kv_tokens=8192), 4, Sampling(max_tokens=80))
    packed = [tree.export() for tree in trees]
    first = np.cumsum([0, *map(len, packed)])[:-1]

    def joined(name: str, shift: bool) -> torch.Tensor:
        parts = [getattr(p, name) + (n if shift else 0) for p, n in zip(packed, first, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    tokens, pos, end = joined("tokens", False), joined("pos", False), joined("end", True).int()
    rows, targets = joined("edge_row", True), tokens[joined("edge_token", True)]

    def run() -> None:
        hidden = model.packed(tokens, pos, end, parity=parity)
        logprob, _ = linear_logprob(hidden, model.head, rows, targets)
        if parity == "bitwise":
            logprob = with_value_of(logprob, sampler_logprob(hidden, model.head, rows, targets, temperature=1.0)[0])
        logprob.mean().backward()

    benchmark.group = f"train {len(tokens)} tokens {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
