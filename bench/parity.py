"""The cost of parity="bitwise" against "fast", in turns: a decode step, and a training forward and backward pass.

.venv/bin/python bench/parity.py [--repetitions N] [--out FOLDER]

The policy is four times as wide as the built-in one, so that matrix products dominate, not calls. The native decoder is
always bitwise, so with it a float32 policy decodes at the same speed for both. Writes parity.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from rows import RESULTS, Call, Row, compare, write

from ibtpo_engine import Engine, Model, ModelConfig, Parity, Sampling, initialise, native, sampler_logprob
from ibtpo_kernels import linear_logprob, with_value_of

VOCABULARY, HIDDEN, LAYERS = 1000, 384, 4
BATCHES = (1, 32)
PROMPT, NEW = 24, 64
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
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


def policy(dtype: torch.dtype) -> Model:
    return initialise(Model(ModelConfig.from_dict(CONFIG)), 0).to(dtype)


def step(batch: int, how: Literal["native", "module"], dtype: torch.dtype, parity: Parity) -> Call:
    """One decode step in the middle of its pages, repeated at the same length."""
    native.MOST_BYTES = 1 << 30 if how == "native" else 0
    engine = Engine(policy(dtype), kv_tokens=batch * 128, parity=parity)
    assert engine.scheduler.runner.is_native == (how == "native")
    trees = [engine.tree(prompt) for prompt in np.random.default_rng(0).integers(1, VOCABULARY, (batch, PROMPT))]
    engine._submit([tree.root.fork()[0] for tree in trees], Sampling(max_tokens=NEW))
    length = engine.scheduler.slots.length
    while len(engine.scheduler.running) < batch:
        engine._step()
    before = length.copy()

    def again() -> int:
        length[:] = before
        engine._step()
        return len(trees)

    return again


def sampled_trees(engine: Engine, count: int, sampling: Sampling) -> list:
    """Trees of four branches, two of which fork again half-way."""
    trees = [engine.tree(prompt) for prompt in np.random.default_rng(0).integers(1, VOCABULARY, (count, 50))]
    for tree in trees:
        first, second, *_ = engine.extend(tree.root.fork(4), sampling)
        engine.extend([*first.fork(1, at=len(first) // 2), *second.fork(1, at=len(second) // 2)], sampling)
    return trees


def training(dtype: torch.dtype) -> dict[Parity, Call]:
    """Forward and backward pass of the log-probs of four trees; for "bitwise" also the exact log-probs."""
    model = policy(dtype)
    trees = sampled_trees(Engine(model, kv_tokens=8192), 4, Sampling(max_tokens=80))
    packed = [tree.export() for tree in trees]
    first = np.cumsum([0, *map(len, packed)])[:-1]

    def joined(name: str, shift: bool) -> torch.Tensor:
        parts = [getattr(p, name) + (n if shift else 0) for p, n in zip(packed, first, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    tokens, pos, end = joined("tokens", False), joined("pos", False), joined("end", True).int()
    rows, targets = joined("edge_row", True), tokens[joined("edge_token", True)]

    def train(parity: Parity) -> int:
        hidden = model.packed(tokens, pos, end, parity=parity)
        logprob, _ = linear_logprob(hidden, model.head, rows, targets)
        if parity == "bitwise":
            logprob = with_value_of(logprob, sampler_logprob(hidden, model.head, rows, targets, temperature=1.0)[0])
        logprob.mean().backward()
        return len(tokens)

    return {parity: partial(train, parity) for parity in get_args(Parity)}


def measure(repetitions: int) -> Iterator[Row]:
    for batch in BATCHES:
        for how, name in (("native", "fp32"), ("module", "fp32"), ("module", "bf16")):
            calls: dict[str, Call] = {parity: step(batch, how, TYPES[name], parity) for parity in get_args(Parity)}
            yield from compare(f"decode step, {name} {how}", batch, calls, repetitions)
    for name, dtype in TYPES.items():
        calls = dict(training(dtype))
        yield from compare(f"forward and backward, {name}", 4, calls, max(3, repetitions // 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--repetitions", type=int, default=30, metavar="N")
    options = parser.parse_args()
    write(options.out / "parity.csv", list(measure(options.repetitions)))
    print(f"wrote {options.out / 'parity.csv'}")


if __name__ == "__main__":
    main()
