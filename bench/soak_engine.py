"""Random operations on an engine with a tiny pool; its bookkeeping is checked and its memory recorded.

python bench/soak_engine.py --operations 1_000_000

One row a run goes to bench/results/soak.csv. An operation is one of `OPERATIONS`, drawn by weight; one that is refused
for lack of pages or budget counts as refused, not as an error. Now and then a random finished node is compared with the
samples of a new engine.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ibtpo_engine import Budget, BudgetSpent, Engine, Model, ModelConfig, Node, OutOfPages, Sampling, Tree, initialise

RESULTS = Path(__file__).parent / "results" / "soak.csv"
VOCABULARY, POSITIONS = 17, 160
OPERATIONS = {
    "fork": 6, "extend": 5, "resume": 1, "split": 2, "drop": 3, "open": 1, "close": 1, "score": 2, "stream": 1,
    "run": 0.3, "weights_changed": 0.1, "release": 0.05,
}  # fmt: skip


class Soak:
    """An engine, its open trees, and counters."""

    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)
        config = ModelConfig.from_dict(
            {
                "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 16,
                "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 8, "max_position_embeddings": POSITIONS,
            }
        )  # fmt: skip
        self.model = Model(config).requires_grad_(False)
        initialise(self.model, seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(20)  # so that tokens depend on all before them, and a wrong key gives a wrong token
        self.random = np.random.default_rng(seed)
        self.engine = Engine(self.model, kv_tokens=16 * 28, max_branches=6, prefill_tokens=24, seed=seed)
        self.trees: list[Tree] = []
        self.pending: list[Node] = []
        self.given: set[int] = set()  # streams of given suffixes, whose tokens were not sampled
        self.count: Counter[str] = Counter()
        self.prompts = [self.random.integers(3, VOCABULARY, n) for n in (1, 9, 16, 20, 33, 48)]

    def operate(self) -> None:
        """One random operation."""
        names, weights = list(OPERATIONS), np.array(list(OPERATIONS.values()))
        name = names[int(np.searchsorted(np.cumsum(weights), self.random.random() * weights.sum()))]
        if not self.trees:
            name = "open"
        self.count[name] += 1
        try:
            getattr(self, name)()
        except (OutOfPages, BudgetSpent) as error:
            self.count[f"refused by {type(error).__name__}"] += 1
            self.close()  # make room
        self.pending = [node for node in self.pending if not node.dropped and node.is_pending and not node.tree.closed]

    def pick(self) -> Node:
        tree = self.trees[self.random.integers(len(self.trees))]
        nodes = tree.nodes()
        return nodes[self.random.integers(len(nodes))]

    def sampling(self, nodes: list[Node]) -> Sampling:
        deepest = max(node.start - node.tree.prompt_len for node in nodes)
        pause = (lambda tokens, new: tokens[-1] == 5) if self.random.random() < 0.3 else None
        return Sampling(max_tokens=max(deepest, 0) + int(self.random.integers(1, 9)), stop_tokens=(2,), pause=pause)

    def can_grow(self, node: Node) -> bool:
        return node.end < POSITIONS - 12

    def open(self) -> None:
        if len(self.trees) >= 5:
            self.close()
        budget = Budget(nodes=24, tokens=90, pages=14) if self.random.random() < 0.5 else None
        self.trees.append(self.engine.tree(self.prompts[self.random.integers(len(self.prompts))], budget=budget))

    def close(self) -> None:
        if self.trees:
            self.trees.pop(self.random.integers(len(self.trees))).close()

    def fork(self) -> None:
        node = self.pick()
        if self.can_grow(node):
            at = int(self.random.integers(1, len(node) + 1)) if self.random.random() < 0.5 else None
            self.pending += node.fork(int(self.random.integers(1, 3)), at=at)

    def resume(self) -> None:
        node = self.pick()
        is_last = not any(child.stream == node.stream for child in node.children)
        if is_last and node.stream != node.tree.root.stream and self.can_grow(node):
            self.pending.append(node.resume())

    def extend(self) -> None:
        if self.pending:
            self.engine.extend(self.pending, self.sampling(self.pending))

    def stream(self) -> None:
        if self.pending:
            for event in self.engine.stream(self.pending, self.sampling(self.pending)):
                if self.random.random() < 0.1 and event.node.in_flight:
                    self.count["abort"] += 1
                    self.engine.abort([event.node], keep=bool(self.random.random() < 0.5))

    def split(self) -> None:
        node = self.pick()
        node.split(int(self.random.integers(1, len(node) + 1)))

    def drop(self) -> None:
        node = self.pick()
        if node.stream != node.tree.root.stream:
            node.drop()

    def score(self) -> None:
        node = self.pick()
        if self.can_grow(node):
            suffixes = [self.random.integers(3, VOCABULARY, self.random.integers(1, 9)) for _ in range(2)]
            for score in self.engine.score(node, suffixes, keep=bool(self.random.random() < 0.2)):
                if score.node is not None:
                    self.given.add(score.node.stream)

    def run(self) -> None:
        def search(tree: Tree):
            nodes = yield tree.root.fork(2)
            yield nodes[0].fork(1, at=1)

        list(self.engine.run(search, self.prompts[:4], Sampling(max_tokens=8, stop_tokens=(2,))))

    def weights_changed(self) -> None:
        with torch.no_grad():
            self.model.model.norm.weight.mul_(1.0)  # the same weights, so that a new engine can be compared
        self.engine.weights_changed()

    def release(self) -> None:
        self.engine.release()
        self.engine.restore()

    def compare(self) -> None:
        """Compare a random node with the same path sampled alone by a new engine."""
        node = self.pick()
        if node.parent is None or node.stream in {*self.given, node.tree.root.stream}:
            return
        fresh = Engine(self.model, kv_tokens=16 * 12, seed=0)
        with fresh.tree(node.parent.prefix()) as tree:
            [branch] = tree.root.fork()
            branch.stream = node.stream
            fresh.extend([branch], Sampling(max_tokens=len(node)))
            assert branch.tokens.tolist() == node.tokens.tolist(), node
        self.count["compared"] += 1


def resident() -> int:
    """Bytes of memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def soak(operations: int, seed: int, seconds: float) -> dict[str, object]:
    """Run for `operations` or `seconds`, whichever ends first; returns the row to record."""
    run, begin, done, early = Soak(seed), time.perf_counter(), 0, 0
    while done < operations and time.perf_counter() - begin < seconds:
        run.operate()
        done += 1
        if done % 50 == 0:
            run.engine.check_integrity()
            run.count["checks"] += 1
        if done % 100 == 0 and run.trees:
            run.compare()
        if done == min(operations // 10, 5000):
            gc.collect()
            early = resident()
    gc.collect()
    late, elapsed = resident(), time.perf_counter() - begin
    for tree in run.trees:
        tree.close()
    run.engine.check_integrity()
    pool = run.engine.cache.pool
    assert pool.num_free + run.engine.cache.index.evictable() == pool.num_pages, "a page was lost"
    stats = run.engine.stats()
    return {
        "operations": done, "seconds": round(elapsed, 1), "seed": seed, "machine": platform.machine(),
        "native": run.engine.scheduler.runner.is_native,
        **{name: stats[name] for name in ("sampled", "computed", "reused", "copied", "evicted_pages", "preemptions")},
        "refused_pages": run.count["refused by OutOfPages"], "refused_budget": run.count["refused by BudgetSpent"],
        **{name: run.count[name] for name in (*OPERATIONS, "abort", "checks", "compared")},
        "resident_early_mib": early >> 20, "resident_late_mib": late >> 20,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop earlier; the row says how far it got")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    row = soak(arguments.operations, arguments.seed, arguments.seconds)
    is_new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
