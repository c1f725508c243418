"""A grown tree as an inline SVG: a box a step, left to right, a row a trajectory.

::

    prompt --- step --- step --- leaf o      a trajectory goes straight on along its row;
                 |(2)-- step --- leaf x      what branched off it in round 2 hangs below, marked with the round

A box is coloured by the value of its step and holds the step's text, value V and IB-Score J. Whether a leaf is right is
told by shape and colour. Sizes are in SVG units, which are pixels on screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ibtpo.metrics import RIGHT
from ibtpo.svg import MINUS, element, join

Record = dict[str, Any]
"""A node of a tree record (see `ibtpo.runlog.tree_record`)."""

_HEIGHT, _ROW, _GAP, _MARGIN = 36, 46, 27, 6
_NARROW, _WIDE = 80, 176  # box widths: for steps of a few characters, for text
_NARROW_LETTERS, _WIDE_LETTERS = 9, 22
_LEAST_SCALE = 0.8  # a tree wider than the page shrinks to fit, down to this; then it scrolls
_MOST_COLUMNS = {_NARROW: 18, _WIDE: 9}  # deeper trees have their unbranched runs of steps folded into one box


@dataclass
class Box:
    """What is drawn as one box: a node, or a run of nodes with nothing branching off between them."""

    members: list[int]
    parent: int | None
    children: list[int] = field(default_factory=list)
    column: int = 0
    row: int = 0


def draw_tree(nodes: Sequence[Record]) -> Markup:
    """The tree of a record as an ``<svg>``; nodes carry ``data-nodes``, the indices they stand for."""
    narrow = all(len(node["text"].strip()) <= _NARROW_LETTERS for node in nodes[1:])
    fold = _depth(nodes) > _MOST_COLUMNS[_NARROW if narrow else _WIDE]
    width, letters = (_NARROW, _NARROW_LETTERS) if narrow and not fold else (_WIDE, _WIDE_LETTERS)
    boxes = lay_out(nodes, fold=fold)
    labels = [_label(nodes, box) for box in boxes]
    columns, rows = max(box.column for box in boxes) + 1, max(box.row for box in boxes) + 1
    total_width = columns * (width + _GAP) + 2 * _MARGIN
    total_height = (rows - 1) * _ROW + _HEIGHT + 2 * _MARGIN
    edges = [_edge(nodes, boxes, box, width) for box in boxes if box.parent is not None]
    drawn = [_draw_box(nodes, box, _shorten(label, letters), width) for box, label in zip(boxes, labels, strict=True)]
    return element(
        "svg",
        join(edges),
        join(drawn),
        class_="tree",
        viewbox=f"0 0 {total_width} {total_height}",
        width=total_width,
        height=total_height,
        style=f"min-width: {_LEAST_SCALE * total_width:.0f}px",
        role="img",
        aria_label=f"A tree of {len(nodes) - 1} steps and {rows} trajectories",
    )


def lay_out(nodes: Sequence[Record], *, fold: bool = False) -> list[Box]:
    """Boxes with their columns (depth) and rows (trajectory), parents first; `fold` joins unbranched runs of steps."""
    boxes = _fold(nodes) if fold else _one_each(nodes)
    for i, box in enumerate(boxes):
        if box.parent is not None:
            boxes[box.parent].children.append(i)
            box.column = boxes[box.parent].column + 1
    rows = 0
    for box in boxes:  # depth first, so a first child follows its parent at once
        above = None if box.parent is None else boxes[box.parent]
        if above is not None and boxes[above.children[0]] is box:
            box.row = above.row
        else:
            box.row, rows = rows, rows + 1
    return boxes


def _one_each(nodes: Sequence[Record]) -> list[Box]:
    return [Box([i], node["parent"]) for i, node in enumerate(nodes)]


def _fold(nodes: Sequence[Record]) -> list[Box]:
    """Join every node to its parent where it is the only child and was sampled along with it."""
    children = [0] * len(nodes)
    for node in nodes[1:]:
        children[node["parent"]] += 1
    boxes: list[Box] = []
    box_of: dict[int, int] = {}
    for i, node in enumerate(nodes):
        parent = node["parent"]
        if parent and children[parent] == 1 and node.get("round") == nodes[parent].get("round"):
            box_of[i] = box_of[parent]
            boxes[box_of[i]].members.append(i)
        else:
            box_of[i] = len(boxes)
            boxes.append(Box([i], None if parent is None else box_of[parent]))
    return boxes


def _depth(nodes: Sequence[Record]) -> int:
    depths: list[int] = []
    for node in nodes:
        depths.append(1 if node["parent"] is None else depths[node["parent"]] + 1)
    return max(depths)


def _label(nodes: Sequence[Record], box: Box) -> str:
    if box.parent is None:
        return "prompt"
    first = " ".join(nodes[box.members[0]]["text"].split()) or "⏎"
    more = len(box.members) - 1
    return first if more == 0 else f"{_shorten(first, _WIDE_LETTERS - 4)} +{more}"


def _shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _left(box: Box, width: int) -> int:
    return _MARGIN + box.column * (width + _GAP)


def _top(box: Box) -> int:
    return _MARGIN + box.row * _ROW


def _edge(nodes: Sequence[Record], boxes: Sequence[Box], box: Box, width: int) -> Markup:
    """A line from the parent through the gutter beside it, which no box ever covers."""
    assert box.parent is not None
    above = boxes[box.parent]
    begin, end = _left(above, width) + width, _left(box, width)
    y0, y1 = _top(above) + _HEIGHT // 2, _top(box) + _HEIGHT // 2
    bend = begin + 9
    curve = 6 if y1 > y0 else 0
    path = f"M{begin} {y0}H{bend - curve}q{curve} 0 {curve} {curve}V{y1 - curve}q0 {curve} {curve} {curve}H{end}"
    turn = nodes[box.members[0]].get("round")
    branched = bool(turn) and turn != nodes[above.members[-1]].get("round")
    line = element(
        "path", d=path if y1 > y0 else f"M{begin} {y0}H{end}", class_="edge branched" if branched else "edge"
    )
    badge = _badge(turn, end - 10, y1) if turn and branched else Markup("")
    return element("g", line, badge, data_nodes=" ".join(map(str, box.members)))


def _badge(turn: int, x: int, y: int) -> Markup:
    circle = element("circle", cx=x, cy=y, r=8)
    return element("g", circle, element("text", str(turn), x=x, y=y + 3.5), class_="round")


def _draw_box(nodes: Sequence[Record], box: Box, label: str, width: int) -> Markup:
    x, y = _left(box, width), _top(box)
    last = nodes[box.members[-1]]
    value, score = last.get("value"), last.get("score")
    shape = element("rect", x=x, y=y, width=width, height=_HEIGHT, rx=7)
    parts = [element("title", _title(nodes, box)), shape]
    parts.append(element("text", label, x=x + 8, y=y + 15, class_="step"))
    if value is not None:
        parts.append(element("text", f"V {short(value)}", x=x + 8, y=y + 29, class_="number"))
    if score is not None:
        parts.append(element("text", f"J {short(score)}", x=x + width - 7, y=y + 29, class_="number score"))
    if last.get("finish") is not None:
        parts.append(_outcome(last, x + width + 14, y + _HEIGHT // 2))
    name = "node prompt" if box.parent is None else "node"
    style = None
    if value is not None:  # 0 to 1: from the colour of wrong over neutral to that of right
        name += " high" if value > 0.5 else " low"
        style = f"--w:{200 * abs(value - 0.5):.0f}%"
    return element("g", join(parts), class_=name, style=style, tabindex="0", data_nodes=" ".join(map(str, box.members)))


def _outcome(leaf: Record, x: int, y: int) -> Markup:
    """Right: a disc with a tick; wrong: a square with a cross; cut off: a triangle; in between: a diamond."""
    reward = leaf.get("reward")
    if leaf.get("finish") == "length":
        return element("path", d=f"M{x - 8} {y + 7}L{x} {y - 8}L{x + 8} {y + 7}Z", class_="mark cut")
    if reward is None or 0.0 < reward < 1.0:
        diamond = element("path", d=f"M{x} {y - 9}L{x + 9} {y}L{x} {y + 9}L{x - 9} {y}Z")
        return element("g", diamond, class_="mark right" if reward is not None and reward > RIGHT else "mark part")
    if reward >= 1.0:
        tick = element("path", d=f"M{x - 3.8} {y + 0.3}l2.8 2.9l5 -6", class_="sign")
        return element("g", element("circle", cx=x, cy=y, r=8.5), tick, class_="mark right")
    cross = element("path", d=f"M{x - 3.2} {y - 3.2}l6.4 6.4m0 -6.4l-6.4 6.4", class_="sign")
    return element("g", element("rect", x=x - 8, y=y - 8, width=16, height=16, rx=2), cross, class_="mark wrong")


def _title(nodes: Sequence[Record], box: Box) -> str:
    last = nodes[box.members[-1]]
    names = {"value": "value V", "score": "IB-Score J", "eta1": "eta1", "eta2": "eta2", "reward": "reward"}
    known = [f"{name} {short(last[key])}" for key, name in names.items() if last.get(key) is not None]
    return "".join(nodes[i]["text"] for i in box.members).strip("\n") + "\n" + " · ".join(known)


def short(value: float) -> str:
    """A number in as few characters as two decimals take: ".67", "1", with a proper minus sign."""
    text = f"{abs(value):.2f}"
    text = text.removesuffix(".00").removeprefix("0") if text != "0.00" else "0"
    return f"{MINUS}{text}" if value < 0 and text != "0" else text
