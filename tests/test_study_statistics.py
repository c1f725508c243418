"""What a study says of its numbers, against values worked out by hand."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console
from trees import chain

from ibtpo.commands.study import run as run_study
from ibtpo.studies import command, figures
from ibtpo.studies.figures import draw_figures
from ibtpo.studies.folders import CELLS
from ibtpo.studies.matrix import Cell, Study, load_study
from ibtpo.studies.measure import recursive_value, tree_numbers
from ibtpo.studies.results import Curve, collect, read_curve, train_numbers
from ibtpo.studies.statistics import area_under, paired_difference, seed_mean
from ibtpo.studies.tables import csv_text, markdown_text, rich_tables, sections
from ibtpo_engine.tree import Tree

GRPO = "{preset: grpo}"


def test_interval_of_two_seeds_is_known_in_full() -> None:
    """Two values: resampled means are a, (a+b)/2, b with chances 1/4, 1/2, 1/4, so the 95 % interval is [a, b]."""
    found = seed_mean([0.2, 0.6])
    assert found is not None
    assert (found.mean, found.low, found.high, found.seeds) == pytest.approx((0.4, 0.2, 0.6, 2))
    assert found.is_apart_from_zero


def test_one_seed_has_no_interval_and_none_no_estimate() -> None:
    alone = seed_mean([0.3, math.nan])
    assert alone is not None and (alone.mean, alone.seeds) == (0.3, 1)
    assert math.isnan(alone.low) and not alone.is_apart_from_zero
    assert seed_mean([]) is None


def test_differences_are_taken_within_seeds() -> None:
    """Seeds differ by .5, the variants within each by .1: paired, the interval is a point; other seeds drop out."""
    difference = paired_difference({0: 0.2, 1: 0.7, 2: 9.0}, {0: 0.1, 1: 0.6, 3: 5.0})
    assert difference is not None and difference.seeds == 2
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_area_is_the_mean_height_up_to_the_budget() -> None:
    """0 to 1 over 100 tokens, then flat: cut at 150 it is (50 + 50) / 150; a NaN is no point; the end is held."""
    assert area_under([0, 50, 100, 200, 300], [0.0, math.nan, 1.0, 1.0, 9.0], 150) == pytest.approx(100 / 150)
    assert area_under([0, 100], [0.0, 1.0], 200) == pytest.approx((50 + 100) / 200)
    assert math.isnan(area_under([0], [math.nan], 10))


def test_columns_of_a_run_come_from_its_log() -> None:
    rows = [
        {"step": 0, "eval_avg": 0.1, "eval_greedy": 0.3},
        {"step": 1, "tokens_sampled": 60, "step_seconds": 2.0, "eff_rate": 0.5},
        {"step": 2, "tokens_sampled": 40, "step_seconds": 3.0, "eff_rate": 0.7},
        {"step": 2, "eval_avg": 0.5, "eval_greedy": 0.9},
    ]
    numbers = train_numbers(read_curve(rows), 100)
    assert numbers["before"] == 0.1 and numbers["eval_avg"] == 0.5 and numbers["eval_greedy"] == 0.9
    assert numbers["area"] == pytest.approx(0.3)
    assert numbers["eff_rate"] == pytest.approx(0.6) and numbers["seconds"] == 5.0


def test_recursive_value_weighs_branches_alike() -> None:
    """Below the prompt a branch with leaves 1, 1, 1 and a chain with 0: (1 + 0)/2, not 3/4."""
    tree = Tree([0])
    first = chain(tree.root, [([1], -1.0), ([2], -1.0)], 1.0)
    for token in (3, 4):
        chain(first[0], [([token], -1.0)], 1.0)
    chain(tree.root, [([5], -1.0)], 0.0)
    assert recursive_value(tree) == 0.5


def test_shipped_studies_load_and_share_their_cells() -> None:
    """Every YAML makes cells; GRPO's cell of `main` is that of `ablation`; all methods of a seed share a start."""
    names = (
        "samplers",
        "main",
        "ablation",
        "beta",
        "lambda",
        "segmentation-noise",
        "open-points",
        "beyond",
        "plus",
        "bias",
        "rounds",
    )
    for name in names:
        study = load_study(name)
        cells = study.cells(range(2), prompts=100, changes={})
        assert len({cell.id for cell in cells}) == len(cells) > 1, name
        assert study.baseline in study.variants
    main, ablation = (load_study(name).cells(range(1), prompts=1, changes={}) for name in ("main", "ablation"))
    assert {c.id for c in main if c.variant == "grpo"} == {c.id for c in ablation if c.variant == "grpo"}
    starts = {cell.policy.id for cell in main if cell.policy is not None}
    assert len(starts) == 1  # every method begins with the same weights


def test_a_study_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean"):
        load_study("mian")
    file = tmp_path / "mine.yaml"
    file.write_text("variant: {grpo: {}}\n")
    with pytest.raises(ValueError, match="unknown field variant"):
        load_study(str(file))
    for text, message in (
        ("variants: {grpo: 3}", "variants: grpo must hold names and settings, not 3"),
        ("variants: [grpo]", "variants must hold names and settings"),
        ("variants: {grpo: {preset: [a]}}", r"variants: grpo: preset \"\['a'\]\" does not exist"),
        (
            "variants: {small: {search: {rounds: 2}}}",
            "preset 'small' does not exist; .*; set one by `preset: NAME`",
        ),
        ("variants: {grpo: {}, grop: {}}", "variants: grop: preset 'grop' does not exist; did you mean \"grpo\""),
        ("baseline: grpo", "variants are missing"),
        ("tasks: {a: 3}\nvariants: {grpo: {}}", "tasks: a must hold names and settings, not 3"),
        ("run: 3\nvariants: {grpo: {}}", "run must hold names and settings, not 3"),
        ("policies: 3\nvariants: {grpo: {}}", "policies 3 must be a list of start, half"),
        ("policies: start\nvariants: {grpo: {}}", "policies 'start' must be a list of start, half"),
        ("run: {seed: 3}\nvariants: {grpo: {}}", "run: seed is the study's to set; name seeds by --first-seed"),
        ("tasks: {a: {out: x}}\nvariants: {grpo: {}}", "tasks: a: out is the study's to set; name the folder"),
        ("variants: {grpo: {resume: x}}", "variants: grpo: resume is nothing a study takes; give the same command"),
        ("variants: {grpo: {seed: 3}}", "variants: grpo: seed is the study's to set"),
        ("variants: {grpo: {data: x}}", "variants: grpo: data is shared by all variants, .*; put it into run, or into"),
        ("variants: {grpo: {task: jsonl}}", "variants: grpo: task is shared by all variants"),
        ("variants: {grpo: {model: x}}", "variants: grpo: model is shared by all variants"),
        ("baseline: gone\nvariants: {grpo: {}}", "baseline 'gone' is not a variant; known: grpo"),
        ("kind: bias\nvariants: {grpo: {}}", r"task \(none given\): kind bias needs facts"),
        ("kind: bias\ntasks: {a: {facts: [2], depth: 1}}\nvariants: {grpo: {}}", "task a: kind bias needs facts"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_study(str(file))
    file.write_text("run: {eval: 3}\nvariants: {grpo: {}}")
    with pytest.raises(ValueError, match=r"study mine: grpo: eval must hold fields and values"):
        load_study(str(file)).cells([0], prompts=1, changes={})


def test_a_task_may_take_back_the_data_of_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("run: {data: x.jsonl}\ntasks: {a: {}, b: {data: null}}\nvariants: {grpo: {}}\n")
    cells = load_study(str(file)).cells([0], prompts=1, changes={})
    assert [(c.config.task, c.config.data) for c in cells] == [("jsonl", Path("x.jsonl")), ("digit-chain", None)]


def test_a_cell_is_another_when_its_files_have_changed(tmp_path: Path) -> None:
    """Data of the same size, held-out data, a folder of data, a newer checkpoint of the model, other weights in it."""
    data, held_out, model = tmp_path / "data", tmp_path / "held_out.jsonl", tmp_path / "model"
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"run: {{data: {data}, model: {model}, jsonl: {{eval_data: {held_out}}}}}\nvariants: {{grpo: {{}}}}\n"
    )

    def cell_id() -> str:
        [cell] = load_study(str(file)).cells([0], prompts=1, changes={})
        return cell.id

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    ids = [cell_id()]  # nothing is there: the cells say so when they run
    for number, change in enumerate(
        (
            lambda: write(data, "one"),
            lambda: write(data, "two"),
            lambda: write(held_out, "one"),
            lambda: (data.unlink(), write(data / "part", "one")),
            lambda: write(data / "part", "three"),
            lambda: write(model / "checkpoints/step-000001/checksums.json", "{}"),
            lambda: write(model / "checkpoints/step-000002/checksums.json", "{}"),
            lambda: write(model / "checkpoints/step-000002/checksums.json", "{ }"),
        )
    ):
        change()
        for path in (data, held_out, model / "checkpoints/step-000002/checksums.json"):
            if path.is_file():
                os.utime(path, ns=(number, number))  # a clock too coarse for this test
        ids.append(cell_id())
        assert cell_id() == ids[-1]
    assert len(set(ids)) == len(ids)


def test_names_of_any_length_and_letters_make_folders_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    long = "x" * 300
    file.write_text(
        "kind: bias\ntasks: {a: {facts: [0.5], depth: 1}}\n"
        f"variants: {{'a|b': {GRPO}, 'd[/b]': {GRPO}, {long}: {GRPO}}}"
    )
    study = load_study(str(file))
    cells = study.cells([0], prompts=1, changes={})
    for cell in cells:
        folder = tmp_path / CELLS / cell.id
        folder.mkdir(parents=True)
        numbers = {"avg_rate": 0.0, "recursive": 0.0, "avg_rate_iid": 0.0}
        (folder / "result.json").write_text(json.dumps({"prompts": [numbers], "exact": 0.5}))
    results = collect(study, cells, tmp_path)
    assert r"| a\|b | 0.5" in markdown_text(results)
    console = Console(file=io.StringIO(), width=400)
    console.print(*rich_tables(results, 400))
    assert "d[/b]" in console.file.getvalue()


def trained(tmp_path: Path, title: str, tasks: str) -> tuple[Study, list[Cell], Path]:
    """A study whose training runs have left results."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"title: {title}\ntasks: {tasks}\nvariants: {{'$g_': {GRPO}, ib-tpo: {{}}}}\n")
    study = load_study(str(file))
    cells = study.cells([0], prompts=1, changes={})
    rows = [{"step": 0, "eval_avg": 0.1}, {"step": 1, "tokens_sampled": 60, "step_seconds": 2.0, "eval_avg": 0.5}]
    for cell in cells:
        folder = tmp_path / CELLS / cell.id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps({"rows": rows, "budget": 60}))
    return study, cells, tmp_path


def test_any_name_of_a_task_is_one_of_a_figure(tmp_path: Path) -> None:
    """Slashes and words that differ in strange letters only; a dollar sign is no formula."""
    pytest.importorskip("matplotlib")
    study, cells, out = trained(tmp_path, "cost $\\alpha_$", "{a/b: {}, a b: {}, é: {}}")
    names = [path.name for path in draw_figures(collect(study, cells, out), out)]
    ends = ["-a-b", "-a-b_1", "_2"]
    assert [name for name in names if name.startswith("curves-tokens")] == [f"curves-tokens{end}.svg" for end in ends]
    assert all((out / name).stat().st_size > 200 for name in names)


def test_many_curves_can_be_told_apart() -> None:
    """By colour and dashes; and bands do not hide them."""
    pytest.importorskip("matplotlib")
    curve = Curve(tokens=[0.0, 60.0], seconds=[0.0, 2.0], values={"eval_avg": [0.1, 0.5]})
    for count, bands in ((6, 6), (7, 2), (20, 2)):
        names = ["grpo", "ib-tpo", *map(str, range(count - 2))]
        figure = figures._panels({name: {0: curve, 1: curve} for name in names}, (("eval_avg", ""),), "tokens", "")
        [plot] = figure.axes
        assert len(plot.collections) == bands
        assert len({(line.get_color(), line.get_linestyle()) for line in plot.lines}) == count


def test_figures_that_fail_cost_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(command, "draw_figures", fail)
    _, _, out = trained(tmp_path, "t", "{a: {}}")
    flags = ["--out", str(out), "--seeds", "1", "--report-only"]
    assert run_study([str(tmp_path / "mine.yaml"), *flags], Console()) == 0
    assert "no figures: no font; the tables are complete" in capsys.readouterr().out
    assert all((out / "mine" / name).is_file() for name in ("table.csv", "table.md", "study.html"))


def test_the_budget_is_the_nearest_that_is_named(tmp_path: Path) -> None:
    """Ours, then the study's for all, for a task, for a variant, then the user's; each evaluation field for itself."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "run: {eval: {samples: 4}}\n"
        "tasks: {a: {}, b: {sampled_tokens: 20, eval: {prompts: 3}}}\n"
        "variants: {grpo: {}, short: {preset: grpo, sampled_tokens: 10}}\n"
    )

    def budgets(**changes: object) -> dict[tuple[str, str], tuple[int, int, int, int]]:
        cells = load_study(str(file)).cells([0], prompts=1, changes=changes)
        return {
            (cell.task, cell.variant): (
                cell.config.sampled_tokens,
                cell.config.eval.prompts,
                cell.config.eval.samples,
                cell.config.eval.every,
            )
            for cell in cells
        }

    assert budgets() == {
        ("a", "grpo"): (600_000, 192, 4, 10),
        ("a", "short"): (10, 192, 4, 10),
        ("b", "grpo"): (20, 3, 4, 10),
        ("b", "short"): (10, 3, 4, 10),
    }
    assert set(budgets(sampled_tokens=7, eval={"every": 2}).values()) == {(7, 192, 4, 2), (7, 3, 4, 2)}


def test_tokens_of_dropped_rollouts_are_counted() -> None:
    """A sampler that throws rollouts away has paid for them: two tokens in the tree, five beside it."""
    tree = Tree([0])
    chain(tree.root, [([1], -1.0), ([2], -1.0)], 1.0)
    tree.notes["auxiliary_tokens"] = 5
    assert tree_numbers(tree, str)["tokens"] == 7


def test_seeds_are_those_that_are_named() -> None:
    """Cells of other seeds are other cells, and a study on fresh seeds shares none."""
    study = load_study("beyond")
    first, fresh = (study.cells(seeds, prompts=1, changes={}) for seeds in (range(2), range(5, 7)))
    assert {cell.seed for cell in fresh} == {5, 6}
    assert len(first) == len(fresh) and not {c.id for c in first} & {c.id for c in fresh}


def test_table_of_results_on_disk(tmp_path: Path) -> None:
    """Bias results of two seeds: means over trees, then over seeds; a cell without a result is said to be missing."""
    study = load_study("bias")
    cells = [c for c in study.cells(range(2), prompts=2, changes={}) if c.task == "easy"]
    for cell in cells[:-1]:
        folder = tmp_path / CELLS / cell.id
        folder.mkdir(parents=True)
        errors = [{"avg_rate": e + cell.seed, "recursive": 0.0, "avg_rate_iid": None} for e in (0.0, 0.2)]
        (folder / "result.json").write_text(json.dumps({"prompts": errors, "exact": 0.5}))
    results = collect(study, cells, tmp_path)
    assert results.missing == cells[-1:]
    [section] = sections(results)
    leaf_mean = section.rows["independent 12"][[c.name for c in section.columns].index("avg_rate")].value
    assert leaf_mean is not None and leaf_mean.mean == pytest.approx(0.6) and leaf_mean.seeds == 2
    assert "easy,independent 12,avg_rate,0.6" in csv_text(results)
    assert "Cells without a result yet: 1" in markdown_text(results)
