"""The engine and its peers, measured in turns in one run.

python bench/engine_peers.py [decode shared trees throughput ...] [--out FOLDER] [--repetitions N] [--scale S]

decode      the built-in policy at batch 1 ... 256, prompts of 24 tokens, 64 new ones, against `transformers` generate
            and its continuous batching (generate_batch), and llama.cpp where it is installed
shared      a prompt of 512 tokens and 16 branches of 32, a model of the shape of Qwen2.5-0.5B with random weights,
            against `transformers` generate and llama.cpp
trees       IBTree with 1 to 8 branches a round against independent trajectories, tokens sampled a second
trees-large the same on the shape of Qwen2.5-0.5B, where the model takes nearly all of a step's time: trajectories of 32
            tokens after prompts of 64
throughput  nano-vllm's load: 256 sequences with 100 to 1,024 tokens in and out, a model of the shape of Qwen3-0.6B,
            against `transformers` generate on one padded batch; --scale makes both smaller, for CPUs
graphs      on a GPU: a model of the shape of Qwen2.5-0.5B with decode steps captured as CUDA graphs, without, with
            bitwise parity, and `transformers` generate; run it alone, since all rows of a call name one device

Ours returns log-prob and entropy with every token; the peers return only tokens. Writes engine_peers.csv.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llama_cpp_peer import LlamaCpp, is_installed
from rows import CPU, RESULTS, Call, Row, compare, write
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.policy import Policy, built_in_policy
from ibtpo.search import make_search
from ibtpo.steps import StepSplitter
from ibtpo_engine import Engine, Model, ModelConfig, Sampling, initialise, save_model

SHAPES = {
    "Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6},
}  # fmt: skip


def random_model(shape: str, layers: int | None = None) -> Model:
    """A model of a known shape with random bfloat16 weights."""
    config = SHAPES[shape] | {
        "architectures": ["Qwen2ForCausalLM" if "Qwen2" in shape else "Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
    return initialise(Model(ModelConfig.from_dict(config)), 0).to(torch.bfloat16)


def in_transformers(save: Policy | Model, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights as a model of `transformers`."""
    with tempfile.TemporaryDirectory() as folder:
        save.save(Path(folder)) if isinstance(save, Policy) else save_model(save, None, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@contextmanager
def llama_cpp(model: Model, sequences: int, tokens: int, *, shared: bool) -> Iterator[LlamaCpp | None]:
    """The model in llama.cpp, if that is installed."""
    if not is_installed():
        yield None
        return
    other = LlamaCpp(model, sequences=sequences, tokens=tokens, shared=shared)
    try:
        yield other
    finally:
        other.close()


def extend_all(engine: Engine, prompts: np.ndarray, new: int, n: int = 1) -> int:
    """n branches on every prompt, without prefixes cached by earlier calls."""
    engine.cache.index.clear()
    trees = [engine.tree(prompt) for prompt in prompts]
    nodes = engine.extend([node for tree in trees for node in tree.root.fork(n)], Sampling(max_tokens=new))
    for tree in trees:
        tree.close()
    return sum(len(node) for node in nodes)


def generate(model: PreTrainedModel, prompts: torch.Tensor, new: int, n: int = 1) -> int:
    """transformers' generate, sampling from the full distribution."""
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
            num_return_sequences=n,
            pad_token_id=0,
        )
    return out[:, prompts.shape[1] :].numel()


def generate_padded(model: PreTrainedModel, prompts: list[np.ndarray], new: list[int]) -> int:
    """`generate` on a padded batch, until the longest is done; returns the number of requested tokens."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.from_numpy(prompt), 1
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=0.6,
            top_k=0,
            min_new_tokens=max(new),
            max_new_tokens=max(new),
            pad_token_id=0,
        )
    return sum(new)


def generate_batch(model: PreTrainedModel, prompts: torch.Tensor, new: int) -> int:
    """transformers' continuous batching."""
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=prompts.tolist(), generation_config=config, progress_bar=False)
    return sum(len(result.generated_tokens) for result in found.values())


def decode(options: argparse.Namespace) -> list[Row]:
    policy = built_in_policy(0, dtype=torch.float32, device=CPU)
    peer = in_transformers(policy, torch.float32)
    rows = []
    for batch in (1, 8, 32, 128, 256):
        prompts = np.random.default_rng(0).integers(1, 14, (batch, 24))
        engine, ids = Engine(policy.model, kv_tokens=batch * 128), torch.from_numpy(prompts)
        contenders: dict[str, Call] = {
            "engine": partial(extend_all, engine, prompts, 64),
            "transformers generate": partial(generate, peer, ids, 64),
        }
        if batch in (8, 128):
            contenders["transformers generate_batch"] = partial(generate_batch, peer, ids, 64)
        with llama_cpp(policy.model, batch, 88, shared=False) as other:
            if other is not None:
                contenders["llama.cpp"] = partial(other.generate, prompts, 64)
            rows += compare("decode, built-in policy", batch, contenders, options.repetitions, settle=0.05)
    return rows


def shared(options: argparse.Namespace) -> list[Row]:
    model = random_model("Qwen2.5-0.5B")
    peer = in_transformers(model, torch.bfloat16)
    prompt = np.random.default_rng(0).integers(0, 151936, (1, 512))
    engine, ids = Engine(model, kv_tokens=2048), torch.from_numpy(prompt)

    def ours() -> int:
        before = engine.stats()["computed"]
        sampled = extend_all(engine, prompt, 32, 16)
        computed = engine.stats()["computed"] - before
        unique = 512 + 16 * 31  # a branch's last token is not computed
        assert computed == unique, f"computed {computed} tokens, {unique} are unique"
        return sampled

    contenders: dict[str, Call] = {"engine": ours, "transformers generate": lambda: generate(peer, ids, 32, 16)}
    with llama_cpp(model, 16, 544, shared=True) as other:
        if other is not None:
            contenders["llama.cpp"] = partial(other.generate, prompt, 32, 16)
        return compare("prompt 512, 16 branches, 0.5B", 16, contenders, max(3, options.repetitions // 3))


def grow(engine: Engine, config: SearchConfig, prompts: np.ndarray, splitter: StepSplitter, max_tokens: int) -> int:
    """Grow trees with random rewards, derived from the tokens, so that scores and branching vary as in training."""
    engine.cache.index.clear()
    search = make_search(config, IBConfig(), splitter, max_tokens)
    sampling = Sampling(max_tokens=max_tokens)
    graded = engine.run(search, prompts, sampling, reward=lambda tree, leaf: float(leaf.tokens.sum() % 2))
    return sum(tree.num_sampled for _, tree in graded)


def trees(options: argparse.Namespace) -> list[Row]:
    policy = built_in_policy(0, dtype=torch.float32, device=CPU)
    splitter, rows = StepSplitter(policy.tokenizer, "\n"), []
    shapes = {
        f"IBTree (4, {1 + 8 // k}, {k}, 1)": SearchConfig(rounds=1 + 8 // k, nodes_per_round=k) for k in (1, 2, 4, 8)
    } | {"independent, 8": SearchConfig(method="independent", group_size=8)}
    for count in (24, 64, 256):
        prompts = np.random.default_rng(0).integers(1, 14, (count, 24))
        engine = Engine(policy.model, kv_tokens=256 * 16 * 96)
        contenders: dict[str, Call] = {
            name: partial(grow, engine, config, prompts, splitter, 64) for name, config in shapes.items()
        }
        rows += compare("trees, prompts", count, contenders, options.repetitions)
    return rows


def trees_large(options: argparse.Namespace) -> list[Row]:
    model = random_model("Qwen2.5-0.5B")
    splitter, rows = StepSplitter(built_in_policy(0, dtype=torch.float32, device=CPU).tokenizer, step_tokens=8), []
    shapes = {
        "IBTree (4, 9, 1, 1)": SearchConfig(),
        "IBTree (4, 9, 1, 1), 4 rounds under way": SearchConfig(lookahead=4),
        "IBTree (4, 2, 8, 1)": SearchConfig(rounds=2, nodes_per_round=8),
        "independent, 8": SearchConfig(method="independent", group_size=8),
    }
    for count in options.prompts:
        prompts = np.random.default_rng(0).integers(0, 151936, (count, 64))
        engine = Engine(model, kv_tokens=count * 12 * 128 + 4096)
        contenders: dict[str, Call] = {
            name: partial(grow, engine, config, prompts, splitter, 32) for name, config in shapes.items()
        }
        rows += compare("trees, prompts, 0.5B", count, contenders, max(1, options.repetitions // 3))
    return rows


def throughput(options: argparse.Namespace) -> list[Row]:
    draw, scale = random.Random(0), options.scale
    sizes = [
        (max(1, int(draw.randint(100, 1024) * scale)), max(1, int(draw.randint(100, 1024) * scale))) for _ in range(256)
    ]
    model = random_model("Qwen3-0.6B", max(1, round(28 * scale)))
    engine = Engine(model, kv_tokens=sum(i + o + 32 for i, o in sizes))
    prompts = [np.random.default_rng(i).integers(0, 10_000, size) for i, (size, _) in enumerate(sizes)]

    def ours() -> int:
        engine.cache.index.clear()
        trees = [engine.tree(prompt) for prompt in prompts]
        nodes = []
        for tree, (_, new) in zip(trees, sizes, strict=True):
            nodes += tree.root.fork()
            engine._submit(nodes[-1:], Sampling(temperature=0.6, max_tokens=new))
        while any(node.in_flight for node in nodes):
            engine._step()
        for tree in trees:
            tree.close()
        return sum(len(node) for node in nodes)

    peer = in_transformers(model, torch.bfloat16)
    new = [new for _, new in sizes]
    contenders: dict[str, Call] = {"engine": ours, "transformers generate": lambda: generate_padded(peer, prompts, new)}
    return compare("256 sequences, 100 to 1,024", scale, contenders, 1)


def graphs(options: argparse.Namespace) -> Iterator[Row]:
    device = torch.device("cuda")
    model = random_model("Qwen2.5-0.5B").to(device)
    peer = in_transformers(model, torch.bfloat16).to(device)
    for batch in (64, 256, 1, 8):  # most important first, in case time runs out
        prompts = np.random.default_rng(0).integers(0, 151936, (batch, 64))
        ids = torch.from_numpy(prompts).to(device)
        contenders: dict[str, Call] = {
            f"engine, {how}": partial(extend_all, Engine(model, kv_tokens=batch * 256, cuda_graphs=on), prompts, 64)
            for how, on in (("captured steps", True), ("plain steps", False))
        }
        exact = Engine(model, kv_tokens=batch * 256, cuda_graphs=True, parity="bitwise")
        contenders["engine, captured steps, parity bitwise"] = partial(extend_all, exact, prompts, 64)
        contenders["transformers generate"] = partial(generate, peer, ids, 64)
        repetitions = max(3, options.repetitions // 3)
        yield from compare("decode on a GPU, 0.5B", batch, contenders, repetitions, device=device)


CASES = {
    "decode": decode,
    "shared": shared,
    "trees": trees,
    "trees-large": trees_large,
    "throughput": throughput,
    "graphs": graphs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = f"which of {', '.join(CASES)}; default: decode shared trees"
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=which)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--repetitions", type=int, default=9, metavar="N")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16], metavar="N", help="of trees-large")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="of throughput's lengths and layers")
    options = parser.parse_args()
    rows: list[Row] = []
    device = torch.device("cuda" if options.cases == ["graphs"] else "cpu")
    for name in options.cases or ("decode", "shared", "trees"):
        for row in CASES[name](options):
            rows.append(row)
            write(options.out / "engine_peers.csv", rows, device)  # at once, so that an interruption loses no rows
    print(f"wrote {options.out / 'engine_peers.csv'}")


if __name__ == "__main__":
    main()
