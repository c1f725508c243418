"""report.html: what a run did, on one self-contained page, from what lies in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ibtpo.config import TrainConfig
from ibtpo.curves import Chart, Interval, Series, amount, draw_chart, number
from ibtpo.draw import draw_tree
from ibtpo.metrics import METRICS, RIGHT
from ibtpo.runlog import CONFIG, TREES, no_space, read_rows, write_atomically
from ibtpo.runlog import METRICS as METRICS_FILE

REPORT = "report.html"
NOT_ACCURACY = (
    "Reward under a guided tree is not accuracy: branching where the outcome looks promising changes the mean of the "
    "leaves. Accuracy here always comes from independent rollouts on held-out prompts."
)
_ACCURACIES = (
    ("eval_avg", "Sampled, avg@{k}", "mean of {k} independent samples a prompt"),
    ("eval_pass", "Sampled, pass@{k}", "at least one of {k} right"),
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
    """One accuracy before and after training; None where it was not evaluated."""

    name: str
    meaning: str
    before: Estimate | None
    after: Estimate | None


@dataclass(frozen=True)
class Summary:
    """The result of a run: what its closing table and the head of its report show.

    Attributes:
        accuracies: sampled avg@k, pass@k and greedy, before and after.
        amounts: name, value, and how it is meant, ready for reading.
        steps: training steps.
    """

    accuracies: list[Accuracy]
    amounts: list[tuple[str, str, str]]
    steps: int


def summarize_run(folder: Path) -> Summary:
    """The result of the run in `folder`, as far as it has come."""
    rows = list(read_rows(folder / METRICS_FILE))
    evaluations = [row for row in rows if _finite(row.get("eval_avg"))]
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    after = evaluations[-1] if evaluations and evaluations[-1] is not before else None
    k = next((int(row["eval_samples"]) for row in evaluations if _finite(row.get("eval_samples"))), 0) or "k"
    accuracies = [
        Accuracy(name.format(k=k), meaning.format(k=k), _estimate(before, key), _estimate(after, key))
        for key, name, meaning in _ACCURACIES
    ]
    return Summary(
        [a for a in accuracies if a.before or a.after], _amounts(rows), max((r["step"] for r in rows), default=0)
    )


def _amounts(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    total = {name: sum(row[name] for row in rows if _finite(row.get(name))) for name in _SUMMED}
    present = {name for row in rows for name in row if _finite(row[name])}
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
    return [(name, value, note) for name, value, note, metric in shown if metric in present]


def _per_token(rows: Sequence[Row], efficiency: str, tokens: str) -> str:
    """A run's token efficiency, from those of its steps."""
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


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder and return its path; works on a run of any length, still running or not."""
    rows = list(read_rows(folder / METRICS_FILE))
    config = yaml.safe_load((folder / CONFIG).read_text("utf-8")) if (folder / CONFIG).exists() else {}
    grown = [row for row in read_rows(folder / TREES) if row.get("nodes")]
    trees = [_tree(row) for row in pick_trees(grown, config.get("report_trees", TrainConfig.report_trees))]
    page = _template().render(
        title=folder.resolve().name,
        facts=_facts(config),
        summary=summarize_run(folder),
        not_accuracy=NOT_ACCURACY,
        charts=_charts(rows),
        trees=trees,
        config=yaml.safe_dump(config, sort_keys=False) if config else "",
        percent=lambda value: f"{100 * value:.1f}",
    )
    path = folder / REPORT
    with no_space(folder, "everything the report is made from"):
        write_atomically(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("ibtpo").joinpath("report_template.html").read_text("utf-8"))


def _facts(config: Mapping[str, Any]) -> list[str]:
    """What the run was, in a few words each."""
    if not config:
        return []
    search = config.get("search", {})
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


def pick_trees(rows: Sequence[Row], count: int) -> list[Row]:
    """Up to `count` trees spread over the run; of those that lie close, the one whose outcomes are the most mixed."""
    bounds = [round(i * len(rows) / count) for i in range(count + 1)] if count else [0]
    windows = [rows[a:b] for a, b in pairwise(bounds) if a < b]
    return [min(window, key=lambda row: abs(_share_right(row) - 0.5)) for window in windows]


def _share_right(row: Row) -> float:
    rewards = _leaf_rewards(row["nodes"])
    return sum(reward > RIGHT for reward in rewards) / len(rewards) if rewards else 0.0


def _leaf_rewards(nodes: Sequence[Row]) -> list[float]:
    return [node.get("reward") or 0.0 for node in nodes if node.get("finish") is not None]


@dataclass(frozen=True)
class _DrawnTree:
    prompt: str
    title: str
    answer: str
    right: int
    leaves: int
    svg: Markup
    nodes: list[dict[str, Any]]


def _tree(row: Row) -> _DrawnTree:
    nodes, rewards = row["nodes"], _leaf_rewards(row["nodes"])
    right = sum(reward > RIGHT for reward in rewards)
    title = row.get("title") or f"step {row['step']}"
    return _DrawnTree(
        nodes[0]["text"].strip(), title, row.get("answer", ""), right, len(rewards), draw_tree(nodes), nodes
    )


def _charts(rows: Sequence[Row]) -> list[tuple[Chart, Markup]]:
    steps = [row for row in rows if _finite(row.get("reward")) or _finite(row.get("tokens_sampled"))]
    if not steps:  # an old or foreign log: one point a row
        steps = [row for row in rows if "eval_avg" not in row]
    sampled, x = 0.0, []
    for row in steps:
        sampled += row["tokens_sampled"] if _finite(row.get("tokens_sampled")) else 1.0
        x.append(sampled)
    charts = [_reward_chart(rows, steps, x), *(_plain_chart(steps, *plain) for plain in _PLAIN_CHARTS)]
    return [(chart, draw_chart(chart, x)) for chart in charts if not chart.is_empty]


def _reward_chart(rows: Sequence[Row], steps: Sequence[Row], x: Sequence[float]) -> Chart:
    position = {row["step"]: at for row, at in zip(steps, x, strict=True)}
    intervals = []
    for row in rows:
        if (estimate := _estimate(row, "eval_avg")) is not None:
            at = max((place for step, place in position.items() if step <= row["step"]), default=0.0)
            intervals.append(Interval(at, estimate.value, estimate.low, estimate.high))
    series = [
        _series(steps, "all leaves", "avg_rate", "reward"),
        _series(steps, "independent rollouts", "avg_rate_iid"),
    ]
    note = "mean over the sampled trees, and evaluations"
    return Chart("Reward", note, _present(series), intervals, unit_range=True)


# title, note, lines (name, metrics: the first that was logged), where the y axis begins
_PLAIN_CHARTS: tuple[tuple[str, str, tuple[tuple[str, ...], ...], str], ...] = (
    ("Eff-Rate", "groups whose rewards are not all equal", (("Eff-Rate", "eff_rate"),), "unit"),
    ("Cov(η₁, η₂)", "does confidence sit on what leads to the answer?", (("Cov", "cov_eta1_eta2"),), "zero"),
    ("IB-Score", "mean over branched nodes", (("J", "ib_score"),), "zero"),
    ("Entropy", "nats a token, temperature 1", (("entropy", "sampler_entropy", "entropy"),), "zero"),
    ("Confidence", "η₂ = π(s), mean over steps", (("confidence", "confidence"),), ""),
    ("Response length", "tokens a trajectory", (("tokens", "response_length"),), ""),
    ("Truncated", "trajectories cut off at the length limit", (("share", "truncated_share"),), "unit"),
    ("Branch depth", "steps below the prompt, mean", (("steps", "branch_depth"),), "zero"),
    ("Sampler and trainer", "gap of log-probs", (("mean", "logprob_gap"), ("largest", "logprob_gap_max")), "zero"),
    ("KL", "nats a token", (("to the sampling policy", "kl_old_k3"), ("to the reference", "kl_ref_k3")), "zero"),
    ("Clipped", "share of the token weight", (("share", "clip_fraction"),), "zero"),
    ("Gradient norm", "before clipping", (("norm", "grad_norm"),), "zero"),
    ("Learning rate", "last optimizer step", (("lr", "lr"),), "zero"),
    ("Loss", "the objective that is minimised", (("loss", "loss"),), "zero"),
    (
        "Token efficiency",
        "trajectory tokens a token computed",
        (("sampling", "sampling_efficiency"), ("training", "training_efficiency")),
        "zero",
    ),
    ("Sampling speed", "tokens a second", (("tokens/s", "tokens_per_second"),), "zero"),
    (
        "Seconds a step",
        "wall clock",
        (("sampling", "sampling_seconds"), ("training", "training_seconds"), ("reward", "reward_seconds")),
        "zero",
    ),
)


def _plain_chart(steps: Sequence[Row], title: str, note: str, lines: Sequence[tuple[str, ...]], axis: str) -> Chart:
    series = _present(_series(steps, *line) for line in lines)
    return Chart(title, note, series, zero=axis == "zero", unit_range=axis == "unit")


def _series(rows: Sequence[Row], name: str, *metrics: str) -> Series:
    """The first of `metrics` that was logged at all."""
    assert all(metric in METRICS for metric in metrics)
    metric = next((m for m in metrics if any(_finite(row.get(m)) for row in rows)), metrics[0])
    return Series(name, [row[metric] if _finite(row.get(metric)) else None for row in rows])


def _present(series: Iterable[Series]) -> list[Series]:
    return [one for one in series if any(value is not None for value in one.values)]
