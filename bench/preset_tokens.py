"""Tokens a prompt of every preset: one training step on the built-in task from the same warm-started policy.

.venv/bin/python bench/preset_tokens.py [--prompts N] [--out FOLDER]

The policy is that of `ibtpo train` with seed 0 before its first step. Writes preset_tokens.csv: trajectories a prompt,
tokens sampled, tokens of the trajectories, and the share of groups without a gradient.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rows import CPU, RESULTS

from ibtpo.checkpoints import latest_checkpoint
from ibtpo.cli import main as ibtpo
from ibtpo_kernels.roofline.machine import here

FEW = 16  # prompts for presets that sample tens of thousands of tokens for each
CASES: dict[str, list[str]] = {
    "grpo": [],
    "ib-tpo": [],
    "random-tree": [],
    "treerl": [],
    "treepo": [],
    "tree-grpo": [],
    "vineppo": [],
    "vineppo, K = 9, 8 chains": ["--search.value-rollouts", "9", "--search.group-size", "8"],
}
"""Additional flags of each preset."""


def step(folder: Path, preset: str, prompts: int, *flags: str) -> dict[str, float]:
    """Metrics of one step with a learning rate so small that no weight changes."""
    size = ["--prompts-per-step", str(prompts), "--sampled-tokens", "1", "--optim.lr", "1e-30"]
    evaluation = ["--eval.prompts", "1", "--eval.samples", "1"]
    if ibtpo(["train", "--preset", preset, "--out", str(folder), *size, *evaluation, *flags]) != 0:
        raise SystemExit(1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    [row] = [row for row in rows if "tokens_sampled" in row]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        runs, policy = Path(temporary), list[str]()
        for number, (name, flags) in enumerate(CASES.items()):
            prompts = FEW if flags else options.prompts
            found = step(runs / str(number), name.partition(",")[0], prompts, *policy, *flags)
            if not policy:
                checkpoint = latest_checkpoint(runs / str(number))
                assert checkpoint is not None
                policy = ["--model", str(checkpoint.path)]
            numbers = {
                "trajectories": found["trajectories"] / prompts,
                "tokens_sampled": found["tokens_sampled"] / prompts,
                "trajectory_tokens": found["trajectory_tokens"] / prompts,
                "groups_without_gradient": found["groups_skipped"] / prompts,
            }
            rows.append(asdict(here(CPU)) | {"preset": name, "prompts": prompts} | numbers)
    path = options.out / "preset_tokens.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
