"""The roofline plot: useful operations a second over useful operations a byte, both logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ibtpo_kernels.roofline.problem import name_of
from ibtpo_kernels.roofline.roofs import Roofs
from ibtpo_kernels.roofline.rows import Row
from ibtpo_kernels.roofline.table import rate

_LINES: dict[torch.dtype, Any] = {torch.bfloat16: "-", torch.float32: "--"}
_MARKERS = {"bfloat16": "o", "float32": "s", "float16": "D"}


def draw(path: Path, rows: Sequence[Row], roofs: Roofs, title: str) -> None:
    """Write a PNG: ours filled, the best peer on the same problem hollow, joined by a line.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib  # optional, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = _points(rows)
    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    entries = _draw_roofs(axes, roofs, [x for x, _, _, _, _ in points])
    palette = [pyplot.colormaps["tab20"](i) for i in range(20)]
    palette = [*palette[::2], *palette[1::2]]  # strong ones first
    colours = {op: palette[i % 20] for i, op in enumerate(dict.fromkeys(op for _, _, _, op, _ in points))}
    for x, y, peer, op, dtype in points:
        style: dict[str, Any] = {
            "marker": _MARKERS.get(dtype, "^"),
            "markersize": 7,
            "color": colours[op],
            "linestyle": "none",
        }
        if peer is not None:
            axes.plot([x, x], [y, peer], color=colours[op], linewidth=0.8, alpha=0.6, zorder=2)
            axes.plot([x], [peer], **style, markerfacecolor="white", zorder=3)
        axes.plot([x], [y], **style, zorder=4)
    _label(axes, entries, colours, {dtype for _, _, _, _, dtype in points}, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


Point = tuple[float, float, float | None, str, str]  # intensity, ours and best peer in GFLOP/s, op, dtype


def _points(rows: Sequence[Row]) -> list[Point]:
    """A point for each problem that ours was measured on and that has operations to count."""
    found = []
    for row in rows:
        if row.kind != "ours" or row.gflops is None or not row.bytes:
            continue
        peers = [r.gflops for r in rows if r.problem == row.problem and r.kind == "peer" and r.gflops is not None]
        found.append((row.flops / row.bytes, row.gflops, max(peers, default=None), row.op, row.dtype))
    return found


def _draw_roofs(axes: Any, roofs: Roofs, intensities: Sequence[float]) -> list[Any]:
    """Draw the limits as lines; returns their legend entries."""
    from matplotlib.lines import Line2D

    slope = roofs.bytes_per_second / 1e9
    low = min([0.1, *(x / 2 for x in intensities)])
    high = max([1e3, *(x * 2 for x in intensities)])
    entries = [Line2D([], [], linestyle="none", label=f"memory: {rate(slope, 'B/s')}")]
    for dtype, line in _LINES.items():
        top = roofs.flops_per_second(dtype) / 1e9
        axes.plot([low, top / slope, high], [low * slope, top, top], line, color="black", linewidth=1.2, zorder=1)
        label = f"{name_of(dtype)} product: {rate(top, 'FLOP/s')}"
        entries.append(Line2D([], [], color="black", linestyle=line, label=label))
    axes.set_xlim(low, high)
    return entries


def _label(axes: Any, entries: list[Any], colours: dict[str, Any], dtypes: set[str], title: str) -> None:
    from matplotlib.lines import Line2D

    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("useful operations a byte")
    axes.set_ylabel("useful GFLOP/s")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    handles = [*entries]
    handles += [Line2D([], [], color=c, marker="o", linestyle="none", label=op) for op, c in colours.items()]
    handles += [
        Line2D([], [], color="grey", marker=_MARKERS.get(d, "^"), linestyle="none", label=d) for d in sorted(dtypes)
    ]
    handles.append(
        Line2D([], [], color="grey", marker="o", markerfacecolor="white", linestyle="none", label="best peer")
    )
    axes.legend(handles=handles, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
