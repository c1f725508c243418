"""Append the result of a training run to bench/results/make_train.csv: accuracies before and after, tokens, seconds.

make train ARGS="--out runs/demo" && .venv/bin/python bench/record_run.py runs/demo
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rows import append

from ibtpo.config_io import load_yaml
from ibtpo.runlog import read_rows
from ibtpo_kernels.roofline.machine import commit, processor

RESULTS = Path(__file__).parent / "results" / "make_train.csv"


def row(run: Path) -> dict[str, object]:
    """One line of the CSV."""
    rows = list(read_rows(run / "metrics.jsonl"))
    evaluations = [r for r in rows if "eval_avg" in r]
    before, after = evaluations[0], evaluations[-1]
    steps = [r for r in rows if "tokens_sampled" in r]
    seconds = sum(r.get("warm_start_seconds", 0) + r.get("evaluation_seconds", 0) for r in rows)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": processor(),
        "torch": torch.__version__,
        "seed": load_yaml(run / "config.yaml")["seed"],
        "warm_start_loss": next((round(r["warm_start_loss"], 4) for r in rows if "warm_start_loss" in r), ""),
        "sampled_before": round(before["eval_avg"], 4),
        "sampled_after": round(after["eval_avg"], 4),
        "greedy_before": round(before["eval_greedy"], 4),
        "greedy_after": round(after["eval_greedy"], 4),
        "trajectories": int(sum(r["trajectories"] for r in steps)),
        "tokens_sampled": int(sum(r["tokens_sampled"] for r in steps)),
        "tokens_computed": int(sum(r["tokens_computed"] for r in steps)),
        "tokens_trained": int(sum(r["tokens_trained"] for r in steps)),
        "sampling_seconds": round(sum(r["sampling_seconds"] for r in steps), 1),
        "training_seconds": round(sum(r["training_seconds"] for r in steps), 1),
        "all_seconds": round(seconds + sum(r["step_seconds"] for r in steps), 1),
    }


def main(run: Path) -> None:
    """Append, with a header if the file is new."""
    values = row(run)
    append(RESULTS, values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    main(parser.parse_args().run)
