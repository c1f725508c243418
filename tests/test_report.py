"""The report is one self-contained page, whatever a run holds; the drawings say what the data says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibtpo.config import TrainConfig
from ibtpo.curves import Chart, Interval, Series, amount, draw_chart, nice_ticks, number
from ibtpo.draw import draw_tree, lay_out, short
from ibtpo.metrics import evaluation_metrics
from ibtpo.report import NOT_ACCURACY, pick_trees, summarize_run, write_report
from ibtpo.runlog import RunFolder
from ibtpo.svg import DASH, element

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;{{ 7*7 }}\u2028"


def node(parent: int | None, text: str, turn: int | None = 0, **more: Any) -> dict[str, Any]:
    return {"parent": parent, "text": text, "tokens": 6, "round": turn, "reward": None, "finish": None} | more


def leaf(parent: int, text: str, turn: int, reward: float, finish: str = "stop") -> dict[str, Any]:
    return node(parent, text, turn, reward=reward, finish=finish, value=reward, eta1=-0.2, eta2=0.9, score=None)


def small_tree(text: str = "7*8=6\n") -> list[dict[str, Any]]:
    """Depth first: prompt; a with leaves b (right), f (wrong, round 2); c with leaf d (cut off); e (partly right)."""
    return [
        node(None, "7*8-5=?\n", None, value=0.6, score=-0.7),
        node(0, text, 0, value=0.5, score=-1.04, eta1=0.1, eta2=0.8),
        leaf(1, "6-5=1\n", 0, 1.0),
        leaf(1, "6-5=2\n", 2, 0.0),
        node(0, "7*8=5\n", 0, value=0.0, score=-1.2),
        leaf(4, "5-5=0\n", 0, 0.0, "length"),
        leaf(0, "56-5", 1, 0.6),
    ]


def chain(length: int) -> list[dict[str, Any]]:
    inner = [node(i, f"step {i}\n", 0, value=1.0) for i in range(length)]
    return [node(None, "prompt", None), *inner, leaf(length, "end", 0, 1.0)]


class Page(HTMLParser):
    """Collects a page's tags and the data it embeds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text("utf-8")
        self.tags: list[str] = []
        self.links: list[str] = []
        self.embedded: list[str] = []
        self._embedding = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self._embedding = ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._embedding:
            self.embedded.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._embedding = False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a <b>run</b>"
    RunFolder.create(path, TrainConfig(model=f"models/{HOSTILE}")).close()
    return path


def run_two_steps(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.log(0, evaluation_metrics([[1, 0], [0, 0]], [1, 0]))
        for step in (1, 2):
            run.log(
                step,
                {
                    "reward": 0.5, "avg_rate": 0.5, "avg_rate_iid": 0.4, "eff_rate": step / 2, "cov_eta1_eta2": 0.02,
                    "trajectories": 24, "tokens_sampled": 1000, "tokens_computed": 1250, "sampling_efficiency": 1.6,
                    "sampling_seconds": 2, "reward_seconds": 0.5, "training_seconds": 1,
                },
            )  # fmt: skip
        run.log(2, evaluation_metrics([[1, 1], [1, 0]], [1, 1]))


# ---- the page ----


@pytest.mark.parametrize("length", ["nothing", "one step", "two steps"])
def test_a_report_is_written_for_a_run_of_any_length(folder: Path, length: str) -> None:
    if length == "one step":
        with RunFolder.open(folder) as run:
            run.log(1, {"reward": 0.25, "grad_norm": float("nan")})
    if length == "two steps":
        run_two_steps(folder)
    page = Page(write_report(folder))
    assert NOT_ACCURACY in page.text
    assert page.tags.count("figure") == {"nothing": 0, "one step": 1, "two steps": 5}[length]
    assert ("table" in page.tags) == (length == "two steps")
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


def test_a_report_needs_no_network(folder: Path) -> None:
    run_two_steps(folder)
    with RunFolder.open(folder, step=2) as run:
        run.add_tree(1, {"title": "t", "nodes": small_tree()})
    page = Page(write_report(folder))
    assert page.links == []
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest", page.text)
    assert "link" not in page.tags and "default-src 'none'" in page.text
    assert "prefers-color-scheme: dark" in page.text


def test_hostile_text_stays_text(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.add_tree(1, {"title": HOSTILE, "answer": HOSTILE, "nodes": small_tree(HOSTILE)})
        run.add_tree(2, {"title": "", "answer": "", "nodes": small_tree("x" * 50 + HOSTILE)})
    page = Page(write_report(folder))
    assert page.tags.count("script") == 1 + 2  # the page's own, and the data of two trees
    assert "img" not in page.tags and "b" in page.tags
    assert json.loads(page.embedded[0])[1]["text"] == HOSTILE
    assert page.text.count("onerror='") == 0 and "49" not in page.embedded[0]


def test_the_summary_is_what_was_logged(folder: Path) -> None:
    run_two_steps(folder)
    summary = summarize_run(folder)
    avg, passed, greedy = summary.accuracies
    assert (avg.name, passed.name, greedy.name) == ("Sampled, avg@2", "Sampled, pass@2", "Greedy")
    assert avg.before is not None and avg.after is not None
    assert (avg.before.value, avg.after.value, summary.steps) == (0.25, 0.75, 2)
    assert avg.before.low <= 0.25 <= avg.before.high
    amounts = {name: (value, note) for name, value, note in summary.amounts}
    assert amounts["Trajectories"][0] == "48"
    assert amounts["Tokens sampled"][0] == "2k"
    assert amounts["Tokens computed"] == ("2.5k", "1.60 trajectory tokens for each")
    assert "Tokens trained" not in amounts
    assert amounts["Eff-Rate"][0] == "0.75"
    assert amounts["Seconds"] == ("7", "sampling + reward + training: 4 + 1 + 2")


def test_an_interrupted_run_has_a_before_and_no_after(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.log(0, evaluation_metrics([[1, 0]], [1]))
    avg = summarize_run(folder).accuracies[0]
    assert avg.before is not None and avg.after is None
    assert "not evaluated" in write_report(folder).read_text("utf-8")


def test_picked_trees_are_spread_over_the_run_and_mixed() -> None:
    def row(step: int, *rewards: float) -> dict[str, Any]:
        return {"step": step, "nodes": [node(None, "p"), *(leaf(0, "x", 0, reward) for reward in rewards)]}

    rows = [row(1, 0, 0), row(2, 1, 0), row(3, 1, 1), row(4, 0, 0, 1), row(5, 1, 1), row(6, 0, 0)]
    assert [picked["step"] for picked in pick_trees(rows, 2)] == [2, 4]
    assert [picked["step"] for picked in pick_trees(rows, 9)] == [1, 2, 3, 4, 5, 6]
    assert pick_trees(rows, 0) == pick_trees([], 4) == []


# ---- trees ----


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def groups(svg: str, name: str) -> list[ET.Element]:
    return [g for g in parse(svg).iter() if name in g.get("class", "").split()]


def test_a_trajectory_keeps_its_row_and_branches_hang_below() -> None:
    boxes = lay_out(small_tree())
    assert [(box.column, box.row) for box in boxes] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 2), (2, 2), (1, 3)]


def test_every_step_is_drawn_with_value_score_and_outcome() -> None:
    svg = draw_tree(small_tree())
    drawn = groups(svg, "node")
    assert [g.get("data-nodes") for g in drawn] == [str(i) for i in range(7)]
    texts = ["|".join(t.text or "" for t in g.findall("text")) for g in drawn]
    assert texts[0] == "prompt|V .60|J \u2212.70" and texts[1] == "7*8=6|V .50|J \u22121.04" and texts[2] == "6-5=1|V 1"
    outcomes = [[m.get("class") for m in g.iter() if m.get("class", "").startswith("mark")] for g in drawn]
    assert outcomes == [[], [], ["mark right"], ["mark wrong"], [], ["mark cut"], ["mark right"]]
    shapes = {kind: groups(svg, kind)[0] for kind in ("right", "wrong", "cut")}
    assert shapes["right"].find("circle") is not None and shapes["wrong"].find("rect") is not None  # not colour alone
    assert "IB-Score J \u22121.04" in (drawn[1].findtext("title") or "")
    assert [t.text for g in groups(svg, "round") for t in g.findall("text")] == ["2", "1"]
    assert drawn[2].get("style") == "--w:100%" and "high" in drawn[2].get("class", "")
    assert "low" in drawn[4].get("class", "")


def test_a_deep_tree_is_folded_where_nothing_branches() -> None:
    nodes = chain(40)
    boxes = lay_out(nodes, fold=True)
    assert [box.members for box in boxes] == [[0], list(range(1, 42))]
    drawn = groups(draw_tree(nodes), "node")
    assert len(drawn) == 2 and drawn[1].findall("text")[0].text == "step 0 +40"
    assert len(groups(draw_tree(chain(5)), "node")) == 7


@given(st.lists(st.integers(0, 10**6), max_size=60), st.booleans())
def test_no_two_boxes_meet_in_a_random_tree(choices: list[int], fold: bool) -> None:
    children: list[list[int]] = [[]]
    for choice in choices:
        children[choice % len(children)].append(len(children))
        children.append([])
    nodes: list[dict[str, Any]] = []

    def flatten(i: int, parent: int | None) -> None:
        finish = None if children[i] else "stop"
        nodes.append(node(parent, f"s{i}\n", i % 3 if parent is not None else None, finish=finish, reward=1.0))
        here = len(nodes) - 1
        for child in children[i]:
            flatten(child, here)

    flatten(0, None)
    boxes = lay_out(nodes, fold=fold)
    assert len({(box.column, box.row) for box in boxes}) == len(boxes)
    assert sorted(i for box in boxes for i in box.members) == list(range(len(nodes)))
    for box in boxes[1:]:
        assert box.parent is not None
        above = boxes[box.parent]
        assert (box.column, box.row >= above.row) == (above.column + 1, True)
    parse(draw_tree(nodes))


def test_trees_without_estimates_are_drawn_without_them() -> None:
    svg = draw_tree([node(None, "prompt", None), node(0, "", 0, finish="stop", reward=1.0)])
    assert not groups(svg, "number") and len(groups(svg, "mark")) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.674, ".67"), (-1.036, "\u22121.04"), (1.0, "1"), (0.0, "0"), (-0.001, "0"), (0.6, ".60"), (12.5, "12.50")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


# ---- curves ----


def test_a_chart_has_a_gap_where_a_value_is_missing() -> None:
    svg = draw_chart(Chart("t", "n", [Series("a", [1.0, float("nan"), None, 2.0, 3.0])]), [1, 2, 3, 4, 5])
    (line,) = groups(svg, "line")
    assert line.get("d", "").count("M") == 2 and line.get("d", "").count("L") == 1
    assert len(groups(svg, "dot")) == 3
    tips = json.loads(parse(svg).get("data-chart", ""))
    assert tips["series"][0]["values"] == ["1", None, None, "2", "3"]


def test_a_chart_of_one_point_and_of_evaluations_alone() -> None:
    assert len(groups(draw_chart(Chart("t", "n", [Series("a", [0.0])]), [0.0]), "dot")) == 1
    only = Chart("t", "n", [], [Interval(0.0, 0.5, 0.4, 0.6)], unit_range=True)
    assert not only.is_empty and len(groups(draw_chart(only, []), "interval")) == 1
    assert Chart("t", "n", [Series("a", [None, float("inf")])]).is_empty


def test_many_points_get_a_running_mean_over_the_raw_line() -> None:
    svg = draw_chart(Chart("t", "n", [Series("a", [float(i % 2) for i in range(30)])]), range(30))
    assert [line.get("class") for line in groups(svg, "line")] == ["line s0 raw", "line s0"]


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_are_round_and_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack


def test_numbers_for_reading() -> None:
    assert [amount(v) for v in (0, 950, 12_345, 400_000, 1_250_000, 2e9)] == [
        "0",
        "950",
        "12.3k",
        "400k",
        "1.25M",
        "2G",
    ]
    assert [number(v) for v in (0.25, -0.5, 1.2e-5, 5000, None)] == ["0.25", "\u22120.5", "1.2e\u22125", "5k", DASH]


def test_elements_escape_text_and_attributes() -> None:
    drawn = element("text", HOSTILE, class_='"><script>')
    assert "<script>" not in drawn
    assert parse(drawn).text == HOSTILE
