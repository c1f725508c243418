"""Engine against `transformers`: decoding with the built-in policy; ours also returns log-prob and entropy.

make bench SUITES=bench/bench_engine.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ibtpo.policy import built_in_policy
from ibtpo_engine import Engine, Sampling, native

PROMPT, NEW = 24, 64
BATCHES = (1, 8, 32, 128, 256)


@pytest.fixture(scope="module")
def policy():
    return built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))


def prompts(batch: int) -> np.ndarray:
    """int [batch, PROMPT]: different prompts, so that nothing is shared."""
    return np.random.default_rng(0).integers(1, 14, (batch, PROMPT))


@pytest.mark.parametrize("batch", BATCHES)
def test_engine(benchmark, policy, batch):
    benchmark.group = f"decode batch {batch}"
    benchmark.extra_info["tokens"] = batch * NEW
    engine = Engine(policy.model, kv_tokens=batch * 128)
    sampling = Sampling(max_tokens=NEW)

    def run() -> int:
        engine.cache.index.clear()
        trees = [engine.tree(prompt) for prompt in prompts(batch)]
        nodes = engine.extend([tree.root.fork()[0] for tree in trees], sampling)
        for tree in trees:
            tree.close()
        return sum(len(node) for node in nodes)

    assert benchmark.pedantic(run, rounds=7, warmup_rounds=1) == batch * NEW


@pytest.mark.parametrize("how", ["native", "module"])
@pytest.mark.parametrize("batch", BATCHES)
def test_step(benchmark, policy, batch, how, monkeypatch):
    """One decode step in the middle of its pages, repeated at the same length, including the engine's own work."""
    if how == "module":
        monkeypatch.setattr(native, "MOST_BYTES", 0)
    engine = Engine(policy.model, kv_tokens=batch * 128)
    assert engine.scheduler.runner.is_native == (how == "native")
    nodes = [engine.tree(prompt).root.fork()[0] for prompt in prompts(batch)]
    engine._submit(nodes, Sampling(max_tokens=NEW))
    length = engine.scheduler.slots.length
    while len(engine.scheduler.running) < batch:
        engine._step()
    before = length.copy()

    def again() -> None:
        length[:] = before

    benchmark.group = f"step batch {batch}"
    benchmark.pedantic(engine._step, setup=again, rounds=50, warmup_rounds=3)


@pytest.mark.parametrize("batch", BATCHES)
def test_transformers_generate(benchmark, policy, batch, tmp_path):
    benchmark.group = f"decode batch {batch}"
    benchmark.extra_info["tokens"] = batch * NEW
    policy.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = torch.from_numpy(prompts(batch))

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                pad_token_id=0,
            )
        return out[:, PROMPT:].numel()

    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1) == batch * NEW
