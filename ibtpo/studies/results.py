"""Results of a study's cells: a value for every variant, column and seed, and the curves of training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ibtpo.studies.folders import CELLS, RESULT
from ibtpo.studies.matrix import Cell, Study
from ibtpo.studies.statistics import area_under


@dataclass(frozen=True)
class Column:
    """A quantity a study reports."""

    name: str
    title: str
    meaning: str
    digits: int = 3
    compared: bool = True
    """Is the difference to the baseline reported?"""


TRAIN = (
    Column("eval_avg", "avg@k", "held-out accuracy after training, mean of k independent samples a prompt"),
    Column("eval_greedy", "greedy", "held-out accuracy of the most likely answer"),
    Column("eval_pass", "pass@k", "held-out prompts with at least one of k samples right"),
    Column("area", "area", "mean held-out avg@k from start to budget: area under the curve against sampled tokens"),
    Column("before", "avg@k before", "held-out accuracy of the policy all variants begin with", compared=False),
    Column("before_greedy", "greedy before", "... of the most likely answer", compared=False),
    Column("before_pass", "pass@k before", "... of at least one in k", compared=False),
    Column("eff_rate", "Eff-Rate", "groups whose rewards are not all equal, mean over training", compared=False),
    Column("ib_score", "IB-Score", "mean over training", compared=False),
    Column("cov_eta1_eta2", "Cov(η₁, η₂)", "mean over training", digits=4, compared=False),
    Column("sampler_entropy", "entropy", "nats a token, mean over training", compared=False),
    Column("seconds", "seconds", "of sampling, grading and updates, one thread", digits=1, compared=False),
)
SAMPLERS = (
    Column("trajectories", "G", "trajectories a prompt", digits=1, compared=False),
    Column("eff_rate", "Eff-Rate", "prompts whose rewards are not all equal"),
    Column("avg_rate", "Avg-Rate, all leaves", "mean reward of all leaves; biased under guided branching"),
    Column("avg_rate_iid", "Avg-Rate, i.i.d. roots", "mean reward of the independent first trajectories"),
    Column("recursive", "recursive value", "mean of the children's values, down to the leaves; less biased"),
    Column("tokens", "tokens", "sampled a prompt, each once", digits=0),
    Column("answers", "distinct answers", "different last lines a prompt", digits=2),
    Column("solutions", "distinct solutions", "different completions a prompt", digits=2),
)
BIAS = (
    Column("exact", "exact value", "of the table", digits=4, compared=False),
    Column("avg_rate", "error of the leaf mean", "mean over trees", digits=4, compared=False),
    Column("recursive", "error of the recursive value", "mean over trees", digits=4, compared=False),
    Column("avg_rate_iid", "error of the i.i.d. roots", "mean over trees", digits=4, compared=False),
)
COLUMNS = {"train": TRAIN, "samplers": SAMPLERS, "bias": BIAS}

BySeed = dict[int, float]


@dataclass
class Curve:
    """A training run's log: sampled tokens, seconds of training, and values at each point, NaN if unknown."""

    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Results:
    """The results of a study so far.

    Attributes:
        values: (task, policy, variant) -> column -> seed -> value.
        curves: (task, variant) -> seed -> the run.
        missing: cells without a result.
    """

    study: Study
    values: dict[tuple[str, str, str], dict[str, BySeed]] = field(default_factory=dict)
    curves: dict[tuple[str, str], dict[int, Curve]] = field(default_factory=dict)
    missing: list[Cell] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The seeds with any result."""
        return sorted({s for columns in self.values.values() for by_seed in columns.values() for s in by_seed})

    @property
    def sections(self) -> list[tuple[str, str]]:
        """(task, policy) of each table, in order."""
        return list(dict.fromkeys((task, policy) for task, policy, _ in self.values))


def collect(study: Study, cells: Sequence[Cell], out: Path) -> Results:
    """Read the results of the cells that are done."""
    results = Results(study)
    for cell in cells:
        path = out / CELLS / cell.id / RESULT
        if not path.is_file():
            results.missing.append(cell)
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        if study.kind == "train":
            curve = read_curve(found["rows"])
            results.curves.setdefault((cell.task, cell.variant), {})[cell.seed] = curve
            numbers = train_numbers(curve, found["budget"])
        else:
            numbers = _means(found["prompts"]) | ({"exact": found["exact"]} if "exact" in found else {})
        columns = results.values.setdefault((cell.task, cell.policy_name, cell.variant), {})
        for name, value in numbers.items():
            columns.setdefault(name, {})[cell.seed] = value
    return results


def read_curve(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """A run's log as a curve, one point a row, at the tokens sampled and seconds spent so far."""
    names = sorted({name for row in rows for name in row} - {"step", "tokens_sampled", "step_seconds"})
    return Curve(
        list(accumulate(float(row.get("tokens_sampled") or 0.0) for row in rows)),
        list(accumulate(float(row.get("step_seconds") or 0.0) for row in rows)),
        {name: [_number(row.get(name)) for row in rows] for name in names},
    )


def train_numbers(curve: Curve, budget: int) -> dict[str, float]:
    """The columns `TRAIN` of one run; the areas end at the budget."""

    def known(name: str) -> list[float]:
        return [value for value in curve.values.get(name, []) if math.isfinite(value)]

    numbers = {name: known(name)[-1] for name in ("eval_avg", "eval_greedy", "eval_pass") if known(name)}
    firsts = {"before": "eval_avg", "before_greedy": "eval_greedy", "before_pass": "eval_pass"}
    numbers |= {name: known(metric)[0] for name, metric in firsts.items() if known(metric)}
    means = ("eff_rate", "ib_score", "cov_eta1_eta2", "sampler_entropy")
    numbers |= {name: float(np.mean(known(name))) for name in means if known(name)}
    area = area_under(curve.tokens, curve.values.get("eval_avg", [math.nan] * len(curve.tokens)), budget)
    return numbers | {"area": area, "seconds": curve.seconds[-1] if curve.seconds else math.nan}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.nanmean(values)) for name in rows[0] if (values := _column(rows, name))}


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    values = [_number(row[name]) for row in rows]
    return values if any(map(math.isfinite, values)) else []


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
