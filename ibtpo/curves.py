"""Line charts of a run as inline SVG; colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ibtpo.svg import DASH, MINUS, element, join

_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 26
_SMOOTHED_FROM = 20  # points from which a running mean is drawn over the raw line
_WINDOW = 5


@dataclass(frozen=True)
class Series:
    """One line: a value for every x, NaN or None where there is none."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Interval:
    """A point with its interval: an evaluation."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A titled chart over a common x axis."""

    title: str
    note: str
    series: Sequence[Series]
    intervals: Sequence[Interval] = field(default_factory=tuple)
    intervals_name: str = "held-out accuracy"
    zero: bool = False
    """Show a line at 0, and make room for it."""
    unit_range: bool = False
    """Values lie between 0 and 1: the axis begins at 0."""

    @property
    def is_empty(self) -> bool:
        """Is there nothing to show?"""
        return not self.intervals and not any(_known(v) for series in self.series for v in series.values)


def draw_chart(chart: Chart, x: Sequence[float]) -> Markup:
    """A chart as an ``<svg>``, with ``data-chart`` for the page's tooltips.

    Args:
        chart: at least one known value (see `Chart.is_empty`).
        x: one position for every value of the series.
    """
    frame = _Frame(chart, x)
    lines = [_draw_series(series, i, x, frame) for i, series in enumerate(chart.series)]
    points = [_draw_interval(interval, frame) for interval in chart.intervals]
    tips = {
        "x": [round(frame.px(v), 1) for v in x],
        "label": [amount(v) for v in x],
        "series": [
            {"name": s.name, "values": [number(v) if _known(v) else None for v in s.values]} for s in chart.series
        ],
    }
    return element(
        "svg",
        _axes(chart, frame),
        join(lines),
        join(points),
        element("line", class_="cursor", x1=0, x2=0, y1=_TOP, y2=_HEIGHT - _BOTTOM),
        class_="chart",
        viewbox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{chart.title} against sampled tokens",
        data_chart=json.dumps(tips),
    )


class _Frame:
    """Maps values to places on the drawing."""

    def __init__(self, chart: Chart, x: Sequence[float]) -> None:
        values = [float(v) for s in chart.series for v in s.values if v is not None and _known(v)]
        values += [v for i in chart.intervals for v in (i.low, i.value, i.high) if _known(v)]
        low, high = min(values), max(values)
        if chart.zero or chart.unit_range:
            low, high = min(low, 0.0), max(high, 0.0)
        self.y_ticks = nice_ticks(low, high)
        self.low, self.high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        every_x = [*x, *(i.x for i in chart.intervals), 0.0]
        self.x_low, self.x_high = min(every_x), max(every_x)
        self.x_ticks = [tick for tick in nice_ticks(self.x_low, self.x_high) if tick <= self.x_high]

    def px(self, x: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return _LEFT + (x - self.x_low) / span * (_WIDTH - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        span = (self.high - self.low) or 1.0
        return _HEIGHT - _BOTTOM - (y - self.low) / span * (_HEIGHT - _TOP - _BOTTOM)


def _axes(chart: Chart, frame: _Frame) -> Markup:
    parts = []
    for tick in frame.y_ticks:
        y = frame.py(tick)
        name = "grid zero" if chart.zero and tick == 0 else "grid"
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_=name))
        parts.append(element("text", number(tick), x=_LEFT - 7, y=y + 3.5, class_="tick y"))
    for tick in frame.x_ticks:
        parts.append(element("text", amount(tick), x=frame.px(tick), y=_HEIGHT - 8, class_="tick x"))
    return join(parts)


def _draw_series(series: Series, index: int, x: Sequence[float], frame: _Frame) -> Markup:
    points = [
        (frame.px(a), frame.py(b)) if b is not None and _known(b) else None
        for a, b in zip(x, series.values, strict=True)
    ]
    smooth = sum(point is not None for point in points) >= _SMOOTHED_FROM
    lines = [element("path", d=_path(points), class_=f"line s{index} raw" if smooth else f"line s{index}")]
    if smooth:
        mean = _running_mean(series.values)
        placed = [(frame.px(a), frame.py(b)) if b is not None else None for a, b in zip(x, mean, strict=True)]
        lines.append(element("path", d=_path(placed), class_=f"line s{index}"))
    else:
        lines += [element("circle", cx=p[0], cy=p[1], r=2.6, class_=f"dot s{index}") for p in points if p is not None]
    return join(lines)


def _draw_interval(interval: Interval, frame: _Frame) -> Markup:
    x, y = frame.px(interval.x), frame.py(interval.value)
    title = f"held-out accuracy {interval.value:.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f}"
    bar = None
    if _known(interval.low) and _known(interval.high):
        bar = element("line", x1=x, x2=x, y1=frame.py(interval.low), y2=frame.py(interval.high))
    return element("g", element("title", title), bar, element("circle", cx=x, cy=y, r=4), class_="interval")


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Straight lines through the points; a gap where one is missing."""
    steps, pen_up = [], True
    for point in points:
        if point is not None:
            steps.append(f"{'M' if pen_up else 'L'}{point[0]:.1f} {point[1]:.1f}")
        pen_up = point is None
    return "".join(steps)


def _running_mean(values: Sequence[float | None]) -> list[float | None]:
    half = _WINDOW // 2
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None and _known(v)]
        means.append(sum(near) / len(near) if value is not None and _known(value) else None)
    return means


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def amount(value: float) -> str:
    """A count for reading: 950, 12.3k, 400k, 1.25M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:.0f}"


def number(value: float | None) -> str:
    """A value for reading, three significant digits: 0.25, 1.2e-05, 12.3k."""
    if value is None or not _known(value):
        return DASH
    text = amount(value) if abs(value) >= 1e3 else f"{float(f'{value:.3g}'):g}"
    return text.replace("e-0", "e-").replace("-", MINUS)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
