"""The engine's speed over the number of live branches, the shared part of paths, and the number of cached tokens.

python bench/engine_curves.py [branches sharing cached ...] [--out FOLDER] [--repetitions N]

Decodes with the built-in policy, with log-prob and entropy of every token; writes engine_curves.csv and .png.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rows import RESULTS, Row, compare, write

from ibtpo.policy import Policy, built_in_policy
from ibtpo_engine import Engine, Sampling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BRANCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARING = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
CACHED = (1_000, 10_000, 100_000, 1_000_000)
PATH, LIVE, NEW = 480, 64, 32


def random_prompts(count: int, length: int, seed: int) -> np.ndarray:
    """int [count, length], all different."""
    return np.random.default_rng(seed).integers(1, 14, (count, length))


def extend_all(engine: Engine, prompts: np.ndarray, new: int) -> int:
    """One branch on every prompt; the prompts stay in the index for the next call."""
    trees = [engine.tree(prompt) for prompt in prompts]
    nodes = engine.extend([tree.root.fork()[0] for tree in trees], Sampling(max_tokens=new))
    for tree in trees:
        tree.close()
    return sum(len(node) for node in nodes)


def anew(engine: Engine, prompts: np.ndarray, new: int) -> int:
    """`extend_all` without prefixes cached by earlier calls."""
    engine.cache.index.clear()
    return extend_all(engine, prompts, new)


def branches(policy: Policy, repetitions: int) -> list[Row]:
    """Prompts of 24 tokens that share nothing, 64 tokens each, prompts computed every time."""
    rows = []
    for count in BRANCHES:
        engine = Engine(policy.model, kv_tokens=count * 128, max_branches=1024)
        prompts = random_prompts(count, 24, seed=count)
        rows += compare("live branches", count, {"engine": partial(anew, engine, prompts, 64)}, repetitions)
    return rows


def sharing(policy: Policy, repetitions: int) -> list[Row]:
    """64 paths of 480 tokens that share a cached prefix of varying length; 32 new tokens on each."""
    rows = []
    for share in SHARING:
        prompts = random_prompts(LIVE, PATH, seed=1)
        prompts[:, : int(share * PATH)] = prompts[0, : int(share * PATH)]
        engine = Engine(policy.model, kv_tokens=LIVE * (PATH + NEW + 32))
        rows += compare(
            "shared part of each path", share, {"engine": partial(extend_all, engine, prompts, NEW)}, repetitions
        )
    return rows


def cached(policy: Policy, repetitions: int) -> list[Row]:
    """32 cached prompts, 32 new tokens on each, beside a growing number of cached tokens that are not used."""
    rows = []
    for count in CACHED:
        engine = Engine(policy.model, kv_tokens=count + 64 * 128)
        for first in range(0, count // 448, 64):
            extend_all(engine, random_prompts(min(64, count // 448 - first), 448, seed=2 + first), 1)
        prompts = random_prompts(32, 48, seed=1)
        rows += compare("cached tokens", count, {"engine": partial(extend_all, engine, prompts, NEW)}, repetitions)
    return rows


CURVES = {"branches": branches, "sharing": sharing, "cached": cached}


def plot(rows: list[Row], path: Path) -> None:
    """Tokens per second over the varied quantity, one panel per curve."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.4 * len(cases), 3.4), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], cases, strict=True):
        found = [row for row in rows if row.case == case and row.timing]
        x = [row.x for row in found]
        axis.plot(x, [row.tokens_per_second / 1e3 for row in found], "o-", color="#1f6f8b")
        low = [row.tokens / row.timing.p80 / 1e3 for row in found if row.timing]
        high = [row.tokens / row.timing.p20 / 1e3 for row in found if row.timing]
        axis.fill_between(x, low, high, color="#1f6f8b", alpha=0.2, linewidth=0)
        axis.set(xlabel=case, ylim=(0, None))
        if max(x) > 1:
            axis.set_xscale("log", base=2 if case == "live branches" else 10)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("thousand tokens per second")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "curves", nargs="*", choices=[*CURVES, []], metavar="CURVE", help=f"which of {', '.join(CURVES)}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--repetitions", type=int, default=15, metavar="N")
    options = parser.parse_args()
    policy = built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))
    rows = [row for name in options.curves or CURVES for row in CURVES[name](policy, options.repetitions)]
    write(options.out / "engine_curves.csv", rows)
    print(f"wrote {options.out / 'engine_curves.csv'}")
    plot(rows, options.out / "engine_curves.png")


if __name__ == "__main__":
    main()
