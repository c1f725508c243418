"""Load a random checkpoint of Qwen3-1.7B's shape in a new process and sample from it; append the result to a CSV.

.venv/bin/python bench/load_model.py               # 3.4 GB in the temporary folder; --layers 2 for less

Columns: checkpoint size and largest shard in GB, seconds to load (the file cache is warm: the checkpoint was just
written), peak resident memory above that after imports, in GB and as a share of the weights, and tokens per second of 4
branches of 16 tokens on one prompt of 32, including the prompt's forward pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record_run import processor
from rows import append
from safetensors.torch import save_file

from ibtpo_engine import Engine, Model, ModelConfig, Sampling, load_model

RESULTS = Path(__file__).parent / "results" / "load_model.csv"
SHARD = 1 << 30
BRANCHES, NEW, PROMPT = 4, 16, 32

QWEN3_1_7B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
}


def write_checkpoint(folder: Path, raw: dict[str, object]) -> float:
    """Write random bf16 weights, a shard at a time; returns the checkpoint's size in GB."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Model(ModelConfig.from_dict(raw)).state_dict().items()}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total, number = 0, 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        shard[name] = values.bfloat16()
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total / 1e9


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(folder: Path) -> dict[str, object]:
    """Load and sample in this process."""
    with torch.device("meta"):
        Model(ModelConfig.from_folder(folder))  # torch imports 0.1 GB of its own for the first module there
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    resident = status("VmRSS")
    begin = time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter() - begin
    peak = status("VmHWM") - resident
    size = sum(parameter.nbytes for parameter in model.parameters())
    engine = Engine(model, kv_tokens=1024)
    begin = time.perf_counter()
    with engine.tree(range(PROMPT)) as tree:
        nodes = engine.extend(tree.root.fork(n=BRANCHES), Sampling(max_tokens=NEW))
    sampled = time.perf_counter() - begin
    assert [len(node) for node in nodes] == [NEW] * BRANCHES
    return {
        "load_seconds": round(loaded, 2),
        "peak_gb": round(peak / 1e9, 3),
        "peak_share": round(peak / size, 3),
        "process_gb": round(status("VmHWM") / 1e9, 3),
        "tokens": BRANCHES * NEW,
        "tokens_per_second": round(BRANCHES * NEW / sampled, 2),
    }


def main() -> None:
    """Write, measure in a new process, append."""
    parser = argparse.ArgumentParser(description="Load a random checkpoint of Qwen3-1.7B's shape and sample from it.")
    parser.add_argument("--layers", type=int, default=QWEN3_1_7B["num_hidden_layers"], help="transformer layers")
    parser.add_argument("--vocabulary", type=int, default=QWEN3_1_7B["vocab_size"], help="tokens, at least 32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("--measure", type=Path, help="only load and sample from this folder, and print JSON")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_checkpoint(
            Path(name), QWEN3_1_7B | {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
        )
        largest = max(path.stat().st_size for path in Path(name).glob("*.safetensors")) / 1e9
        command = [sys.executable, __file__, "--measure", name]
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    values = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": processor(),
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "layers": arguments.layers,
        "vocabulary": arguments.vocabulary,
        "checkpoint_gb": round(size, 3),
        "largest_shard_gb": round(largest, 3),
    } | measured
    append(arguments.out, values)


if __name__ == "__main__":
    main()
