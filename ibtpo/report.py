"""Results of a run from its metrics.jsonl: accuracy before and after, and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    return summarize_rows(list(read_rows(folder / METRICS)))


def summarize_rows(rows: Sequence[Row]) -> Summary:
    """The result of a run with these rows in its metrics.jsonl."""
    evaluations = [row for row in rows if _finite(row.get("eval_avg"))]
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    after = evaluations[-1] if evaluations and evaluations[-1] is not before else None
    ks = [int(row["eval_samples"]) if _finite(row.get("eval_samples")) else 0 for row in evaluations]
    k = (ks[-1] if ks else 0) or "k"
    begin = before if ks and ks[0] == ks[-1] else None  # a resumed run may use another k
    accuracies = []
    for key, name, meaning in _ACCURACIES:
        first, last = _estimate(begin if "{k}" in name else before, key), _estimate(after, key)
        if first is not None or last is not None:
            accuracies.append(Accuracy(name.format(k=k), meaning.format(k=k), first, last))
    return Summary(accuracies, _amounts(rows), max((row["step"] for row in rows), default=0))


def _amounts(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    total = {name: sum(row[name] for row in rows if _finite(row.get(name))) for name in _SUMMED}
    shown = [
        ("Trajectories", amount(total["trajectories"]), "leaves of all trees", "trajectories"),
        ("Tokens sampled", amount(total["tokens_sampled"]), "each counted once", "tokens_sampled"),
        (
            "Tokens computed",
            amount(total["tokens_computed"]),
            _per_token(rows, "sampling_efficiency", "tokens_computed"),
            "tokens_computed",
        ),
        (
            "Tokens trained",
            amount(total["tokens_trained"]),
            _per_token(rows, "training_efficiency", "tokens_trained"),
            "tokens_trained",
        ),
        ("Eff-Rate", _mean_of(rows, "eff_rate"), "groups with unequal rewards, mean", "eff_rate"),
        ("Cov(η₁, η₂)", _mean_of(rows, "cov_eta1_eta2"), "gain and confidence, mean", "cov_eta1_eta2"),
    ]
    seconds = [total[f"{part}_seconds"] for part in ("sampling", "reward", "training")]
    parts = " + ".join(f"{value:.0f}" for value in seconds)
    shown.append(("Seconds", f"{sum(seconds):.0f}", f"sampling + reward + training: {parts}", "sampling_seconds"))
    return [(name, value, note) for name, value, note, metric in shown if any(_finite(row.get(metric)) for row in rows)]


def _per_token(rows: Sequence[Row], efficiency: str, tokens: str) -> str:
    """A run's token efficiency, combined from those of its steps."""
    known = [
        (row[efficiency], row[tokens]) for row in rows if _finite(row.get(efficiency)) and _finite(row.get(tokens))
    ]
    total = sum(count for _, count in known)
    if not total:
        return "through the model"
    return f"{sum(ratio * count for ratio, count in known) / total:.2f} trajectory tokens for each"


def _mean_of(rows: Sequence[Row], name: str) -> str:
    values = [row[name] for row in rows if _finite(row.get(name))]
    return number(math.fsum(values) / len(values)) if values else number(None)


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
