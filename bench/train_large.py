"""Train a random checkpoint of Qwen3-0.6B's shape for a few steps, compare its memory with the plan, append to a CSV.

OMP_NUM_THREADS=2 .venv/bin/python bench/train_large.py                         # every weight: 24 GiB of memory
OMP_NUM_THREADS=2 .venv/bin/python bench/train_large.py --rank 16               # adapters
OMP_NUM_THREADS=2 .venv/bin/python bench/train_large.py --layers 4 --vocabulary 4096 -- --gradient-checkpointing

Arguments after ``--`` are passed to `ibtpo train`. Columns: what was trained; parameters in millions; steps and seconds
of sampling and of updates a step; planned and measured peak memory of the process in GB, and their ratio; the script
fails unless it lies within 15 % of 1.
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
from load_model import QWEN3_1_7B, write_checkpoint
from record_run import processor
from rows import append
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "train_large.csv"
TRUE = 0.15  # largest relative error of the plan
STEPS, PROMPTS, BRANCHES, NEW = 3, 4, 8, 16
ENDS = 16  # every 16th token ends an answer
LENGTH = 10  # so an answer's average number of tokens
QWEN3_0_6B = QWEN3_1_7B | {"hidden_size": 1024, "intermediate_size": 3072}


def write_tokenizer(folder: Path, size: int) -> None:
    """One token for each byte and made-up words, `size` in total, including the end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"w{i}" for i in range(len(symbols), size - 1)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder
    )


def write_inputs(folder: Path, layers: int, vocabulary: int) -> None:
    """Write a checkpoint to `folder`/model, sums to data.jsonl, and a reward to rewards.py."""
    model = folder / "model"
    model.mkdir()
    write_tokenizer(model, vocabulary)
    ends = list(range(ENDS - 1, vocabulary, ENDS))  # random weights would hardly ever sample a single end token
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    shape = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    write_checkpoint(model, QWEN3_0_6B | shape)
    rows = [{"prompt": f"{a} + {b} = ", "answer": str(a + b)} for a in range(2, 9) for b in range(2, 9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rewards.py").write_text(
        '"""What random text gets about half of the time, so that there is something to learn from."""\n\n\n'
        "def even(prompt: object, completion: str, answer: str, data: dict) -> float:\n"
        '    """1 if the length is even."""\n'
        "    return float(len(completion) % 2 == 0)\n",
        encoding="utf-8",
    )


def train(folder: Path, steps: int, rank: int, more: list[str]) -> tuple[list[dict[str, float]], str]:
    """Run `ibtpo train`; returns the logged rows and the printed output."""
    flags = {
        "--model": folder / "model",
        "--data": folder / "data.jsonl",
        "--out": folder / "run",
        "--reward": "rewards:even",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--lora.rank": rank,
        "--prompts-per-step": PROMPTS,
        "--mini-batches": 1,
        "--search.method": "independent",
        "--search.group-size": BRANCHES,
        "--sampling.max-tokens": NEW,
        "--sampling.temperature": 1.0,
        "--sampling.top-p": 1.0,
        "--sampled-tokens": int((steps - 0.5) * PROMPTS * BRANCHES * LENGTH),
        "--micro-batch-tokens": 256,
        "--engine.kv-tokens": 4096,
        "--engine.max-branches": 32,
        "--engine.prefill-tokens": 256,
        "--eval.prompts": 1,
        "--eval.samples": 1,
        "--checkpoint-every": 1000,
    }
    command = [str(Path(sys.executable).with_name("ibtpo")), "train"]
    command += [text for name, value in flags.items() for text in (name, str(value))] + more
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nibtpo train ended with {done.returncode}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "peak_memory" in row], done.stdout


def main() -> None:
    """Write, train in a new process, compare, append."""
    parser = argparse.ArgumentParser(description="Train a random checkpoint and compare its memory with the plan.")
    parser.add_argument("--layers", type=int, default=QWEN3_0_6B["num_hidden_layers"], help="transformer layers")
    parser.add_argument("--vocabulary", type=int, default=QWEN3_0_6B["vocab_size"], help="tokens, at least 257")
    parser.add_argument("--rank", type=int, default=0, help="rank of adapters; 0 trains every weight")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("more", nargs="*", help="flags for ibtpo train, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), arguments.layers, arguments.vocabulary)
        size = sum(path.stat().st_size for path in (Path(name) / "model").glob("*.safetensors"))
        rows, printed = train(Path(name), arguments.steps, arguments.rank, arguments.more)
    print(printed)
    last = rows[-1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    values = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": processor(),
        "torch": torch.__version__,
        "trains": f"LoRA {arguments.rank}" if arguments.rank else "all",
        "flags": " ".join(arguments.more),
        "layers": arguments.layers,
        "vocabulary": arguments.vocabulary,
        "parameters_m": round(size / 2e6, 1),
        "steps": len(rows),
        "optimizer_steps": int(sum(row.get("optimizer_steps", 0) for row in rows)),
        "sampling_seconds": round(sum(row["sampling_seconds"] for row in rows) / len(rows), 2),
        "training_seconds": round(sum(row["training_seconds"] for row in rows) / len(rows), 2),
        "planned_gb": round(last["memory_planned"] / 1e9, 3),
        "measured_gb": round(last["peak_memory"] / 1e9, 3),
        "measured_to_planned": round(last["peak_memory"] / last["memory_planned"], 3),
    }
    append(arguments.out, values)
    if values["optimizer_steps"] == 0:
        raise SystemExit("every group had equal rewards, so nothing was trained; take more --steps")
    if abs(last["peak_memory"] / last["memory_planned"] - 1) > TRUE:
        raise SystemExit(f"the plan is off by more than {TRUE:.0%}")


if __name__ == "__main__":
    main()
