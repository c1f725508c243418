"""Learning curves and diagnostics of training runs, if matplotlib is installed (extra "study")."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ibtpo.studies.results import Curve, Results

try:
    from matplotlib.figure import Figure
except ImportError:  # tables and page do not need it
    Figure = None  # type: ignore[assignment, misc]

AVAILABLE = Figure is not None
MISSING = 'no figures: matplotlib is not installed; pip install "ibtpo[study]"'
_LONGEST_NAME = 80  # characters of a task's name in a file name
_POINTS = 60  # of the grid on which the curves of several seeds are averaged
_ACCURACIES = (("eval_avg", "held-out avg@k"), ("eval_greedy", "held-out greedy"))
_AXES = {"tokens": "sampled tokens", "seconds": "seconds, one thread", "steps": "steps"}
_DIAGNOSTICS = (
    ("eval_avg", "held-out avg@k"),
    ("avg_rate_iid", "reward of i.i.d. rollouts"),
    ("cov_eta1_eta2", "Cov(η₁, η₂)"),
    ("ib_score", "IB-Score"),
    ("eff_rate", "Eff-Rate"),
    ("sampler_entropy", "entropy, nats a token"),
)
_HIGHLIGHT = {"grpo": "#1c2126", "ib-tpo": "#c2560c"}
_COLORS = ("C0", "C2", "C3", "C4", "C6", "C7", "C8", "C9")  # without colours close to the highlights
_MOST_BANDS = 6  # with more curves only highlighted ones have a band: many bands hide the curves


def draw_figures(results: Results, folder: Path) -> list[Path]:
    """Write the study's figures as SVG and PNG; returns the SVGs, none without data or matplotlib."""
    if Figure is None or not results.curves:
        return []
    made: dict[str, Any] = {}
    ends = _ends(list(dict.fromkeys(task for task, _ in results.curves)))
    for task, end in ends.items():
        curves = {variant: by_seed for (t, variant), by_seed in results.curves.items() if t == task}
        title = f"{results.study.title}: {task}" if task else results.study.title
        for axis in ("tokens", "seconds"):
            made[f"curves-{axis}{end}"] = _panels(curves, _ACCURACIES, axis, title)
        made[f"diagnostics{end}"] = _panels(curves, _DIAGNOSTICS, "tokens", "Diagnostics over training")
        pair: dict[str, dict[int, Curve]] = {name: curves[name] for name in ("grpo", "ib-tpo") if name in curves}
        if len(pair) == 2:
            title = "The paper's figure 3: is confidence where the answer is?"
            made[f"figure-3{end}"] = _panels(pair, (("cov_eta1_eta2", "Cov(η₁, η₂)"),), "steps", title)
    return [_save(figure, folder / name) for name, figure in made.items()]


def _ends(tasks: Sequence[str]) -> dict[str, str]:
    """Suffix of each task's file names: its name in safe characters, and its index if two would be the same."""
    ends: dict[str, str] = {}
    for place, task in enumerate(tasks):
        words = re.sub(r"[^A-Za-z0-9.+-]+", "-", task).strip("-")[:_LONGEST_NAME]
        end = f"-{words}" if words else ""
        taken = end.lower() in {other.lower() for other in ends.values()} or bool(task and not words)
        ends[task] = f"{end}_{place}" if taken else end
    return ends


def mean_curve(
    runs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Several runs' (x, y) on one grid up to the shortest run's end: x, mean, standard error (0 for one run)."""
    known = [[(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)] for x, y in runs]
    known = [points for points in known if points]
    if not known:
        nothing = np.zeros(0)
        return nothing, nothing, nothing
    grid = np.linspace(max(p[0][0] for p in known), min(p[-1][0] for p in known), _POINTS)
    values = np.array([np.interp(grid, [a for a, _ in points], [b for _, b in points]) for points in known])
    spread = values.std(axis=0, ddof=1) / math.sqrt(len(known)) if len(known) > 1 else np.zeros(_POINTS)
    return grid, values.mean(axis=0), spread


def _panels(curves: Mapping[str, Mapping[int, Curve]], panels: Sequence[tuple[str, str]], axis: str, title: str) -> Any:
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 1.8, 3.3 * rows + 0.5), layout="constrained")
    for place, (metric, label) in enumerate(panels):
        plot = figure.add_subplot(rows, columns, place + 1)
        plot.set_title(label, loc="left", fontsize=10)
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(color="#e4e1da", linewidth=0.7)
        plot.set_xlabel(_AXES[axis], fontsize=9)
        plot.tick_params(labelsize=8)
        if metric in ("cov_eta1_eta2", "ib_score"):
            plot.axhline(0, color="#8b949c", linewidth=0.8)
        for index, (variant, by_seed) in enumerate(curves.items()):
            band = len(curves) <= _MOST_BANDS or variant in _HIGHLIGHT
            _line(plot, variant, index, [_xy(curve, metric, axis) for curve in by_seed.values()], band=band)
    handles, names = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    heading = figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for text in (heading, *legend.get_texts()):
        text.set_parse_math(False)  # names may contain a $
    return figure


def _xy(curve: Curve, metric: str, axis: str) -> tuple[list[float], list[float]]:
    values = curve.values.get(metric, [math.nan] * len(curve.tokens))
    if axis == "steps":
        values = [value for value in values if math.isfinite(value)]
        return [float(step + 1) for step in range(len(values))], values
    return (curve.tokens if axis == "tokens" else curve.seconds), values


def _line(plot: Any, variant: str, index: int, runs: Sequence[tuple[list[float], list[float]]], *, band: bool) -> None:
    x, mean, error = mean_curve(runs)
    color = _HIGHLIGHT.get(variant, _COLORS[index % len(_COLORS)])
    style = "-" if variant in _HIGHLIGHT else ("-", "--", ":")[index // len(_COLORS) % 3]
    plot.plot(x, mean, style, color=color, label=variant, linewidth=2.0 if variant in _HIGHLIGHT else 1.3)
    if band and len(runs) > 1:
        plot.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=130)  # a task's name may contain a dot
    figure.savefig(path.with_name(f"{path.name}.svg"))
    return path.with_name(f"{path.name}.svg")
