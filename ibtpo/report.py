"""Results of a run from its metrics.jsonl: accuracy before and after, and cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibtpo.runlog import METRICS, read_rows

DASH, MINUS = "\u2013", "\u2212"
NOT_ACCURACY = (
    "Reward under a guided tree is not accuracy: branching where the outcome looks promising changes the mean of the "
    "leaves. Accuracy here always comes from independent rollouts on held-out prompts."
)
_ACCURACIES = (
    ("eval_avg", "Sampled, avg@{k}", "mean of {k} independent samples a prompt"),
    ("eval_pass", "Sampled, pass@{k}", "at least one of {k} right"),
    ("eval_maj", "Sampled, maj@{k}", "the answer most of {k} give"),
    ("eval_greedy", "Greedy", "the most likely token each time"),
)
_SUMMED = (
    "trajectories", "tokens_sampled", "tokens_computed", "tokens_trained",
    "sampling_seconds", "reward_seconds", "training_seconds",
)  # fmt: skip

_AVERAGED = ("eff_rate", "cov_eta1_eta2")
_EFFICIENCIES = {"sampling_efficiency": "tokens_computed", "training_efficiency": "tokens_trained"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Accuracy:
    """One accuracy before and after training; None where it was not evaluated, or with another k."""

    name: str
    meaning: str
    before: Estimate | None
    after: Estimate | None


@dataclass(frozen=True)
class Summary:
    """The result of a run, as shown in the final table and at the top of the page.

    Attributes:
        accuracies: sampled avg@k, pass@k, maj@k and greedy, before and after.
        amounts: name, formatted value and explanation of each cost.
        steps: training steps.
    """

    accuracies: list[Accuracy]
    amounts: list[tuple[str, str, str]]
    steps: int


def summarize_run(folder: Path) -> Summary:
    """The result so far of the run in `folder`."""
    tally = Tally()
    for row in read_rows(folder / METRICS):
        tally.add(row)
    return tally.summary()


class Tally:
    """The result of a run from the rows of its metrics.jsonl, which may come one after another."""

    def __init__(self) -> None:
        self._steps = 0
        self._first: Row | None = None  # evaluation
        self._last: Row | None = None
        self._count = Counter[str]()  # of the rows with each metric
        self._total = Counter[str]()
        self._weighted = Counter[str]()

    def add(self, row: Row) -> None:
        """Count a row; only the metrics shown are looked at."""
        self._steps = max(self._steps, row["step"])
        if _finite(row.get("eval_avg")):
            self._first, self._last = self._first or row, row
        for name in (*_SUMMED, *_AVERAGED):
            if _finite(row.get(name)):
                self._count[name] += 1
                self._total[name] += row[name]
        for name, tokens in _EFFICIENCIES.items():
            if _finite(row.get(name)) and _finite(row.get(tokens)):
                self._total[name] += row[tokens]
                self._weighted[name] += row[name] * row[tokens]

    def summary(self) -> Summary:
        """The result of the rows so far."""
        before = self._first if self._first and self._first["step"] == 0 else None
        after = self._last if self._last is not before else None
        begin_k, k = map(_samples, (self._first, self._last))
        begin = before if begin_k == k else None  # a resumed run may use another k
        accuracies = []
        for key, name, meaning in _ACCURACIES:
            first, last = _estimate(begin if "{k}" in name else before, key), _estimate(after, key)
            if first is not None or last is not None:
                accuracies.append(Accuracy(name.format(k=k or "k"), meaning.format(k=k or "k"), first, last))
        return Summary(accuracies, self._amounts(), self._steps)

    def _amounts(self) -> list[tuple[str, str, str]]:
        total = self._total
        computed, trained = map(self._per_token, _EFFICIENCIES)
        seconds = [total[f"{part}_seconds"] for part in ("sampling", "reward", "training")]
        parts = " + ".join(f"{value:.0f}" for value in seconds)
        shown = [
            ("Trajectories", amount(total["trajectories"]), "leaves of all trees", "trajectories"),
            ("Tokens sampled", amount(total["tokens_sampled"]), "each counted once", "tokens_sampled"),
            ("Tokens computed", amount(total["tokens_computed"]), computed, "tokens_computed"),
            ("Tokens trained", amount(total["tokens_trained"]), trained, "tokens_trained"),
            ("Eff-Rate", self._mean("eff_rate"), "groups with unequal rewards, mean", "eff_rate"),
            ("Cov(η₁, η₂)", self._mean("cov_eta1_eta2"), "gain and confidence, mean", "cov_eta1_eta2"),
            ("Seconds", f"{sum(seconds):.0f}", f"sampling + reward + training: {parts}", "sampling_seconds"),
        ]
        return [(name, value, note) for name, value, note, metric in shown if self._count[metric]]

    def _per_token(self, name: str) -> str:
        """A run's token efficiency, combined from those of its steps."""
        if not self._total[name]:
            return "through the model"
        return f"{self._weighted[name] / self._total[name]:.2f} trajectory tokens for each"

    def _mean(self, name: str) -> str:
        return number(self._total[name] / self._count[name] if self._count[name] else None)


def _samples(evaluation: Row | None) -> int:
    """Its k; 0 if it is not known."""
    return int(evaluation["eval_samples"]) if evaluation and _finite(evaluation.get("eval_samples")) else 0


def _estimate(row: Row | None, name: str) -> Estimate | None:
    if row is None or not _finite(row.get(name)):
        return None
    low, high = (row[bound] if _finite(row.get(bound := f"{name}_{end}")) else row[name] for end in ("low", "high"))
    return Estimate(row[name], low, high)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def describe_run(config: Mapping[str, Any]) -> list[str]:
    """The run's main settings, in a few words each."""
    if not config:
        return []
    search = config.get("search")
    search = search if isinstance(search, Mapping) else {}
    method = str(search.get("method", ""))
    if method == "independent":
        method += f" · {search.get('group_size')} chains"
    elif method:
        names = ("initial_branches", "rounds", "nodes_per_round", "branches_per_node")
        method += f" (B₀, L, K, B) = ({', '.join(str(search.get(name)) for name in names)})"
    model = Path(str(config.get("model", ""))).name
    data = config.get("data")
    task = Path(str(data)).name if data else str(config.get("task", ""))
    return [part for part in (f"model {model}", f"task {task}", method, f"seed {config.get('seed')}") if part]


def amount(value: float) -> str:
    """A count in short form: 950, 12.3k, 400k, 1.25M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:.0f}"


def number(value: float | None) -> str:
    """A value with three significant digits: 0.25, 1.2e-05, 12.3k."""
    if value is None or not _finite(value):
        return DASH
    text = amount(value) if abs(value) >= 1e3 else f"{float(f'{value:.3g}'):g}"
    return text.replace("e-0", "e-").replace("-", MINUS)
