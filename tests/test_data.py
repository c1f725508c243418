"""Data files: every layout and format gives the problems it holds; filters, splits and orders are what they say."""

from __future__ import annotations

import json
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import byte_tokenizer

from ibtpo.config import JsonlConfig
from ibtpo.tasks import Problem, format_prompt
from ibtpo.tasks.data import DataTask
from ibtpo.tasks.layouts import BOXED
from ibtpo.tasks.rows import open_rows

ALL = {"grade": "exact", "eval_fraction": 1.0}
VERL = {"prompt": [{"role": "user", "content": "Solve: 1+1"}], "reward_model": {"ground_truth": "34", "style": "rule"}}
ROWS: dict[str, tuple[dict[str, Any], Any, str]] = {  # layout -> row, prompt, answer
    "gsm8k": ({"question": "How many?", "answer": "5*300=<<5*300=1500>>1500\n#### 1,500"}, "How many?", "1500"),
    "math": (
        {"problem": "Find x.", "level": "Level 5", "type": "Algebra", "solution": r"So \\boxed{\\frac{1}{2}}."},
        "Find x.",
        r"\\frac{1}{2}",
    ),
    "dapo": (VERL | {"data_source": "math_dapo", "ability": "MATH"}, VERL["prompt"], "34"),
    "aime": ({"ID": "2024-I-1", "Problem": "Find n.", "Solution": "...", "Answer": 73}, "Find n.", "73"),
    "boxed": ({"problem": "Find y.", "answer": r"\sqrt{2}", "solution": "..."}, "Find y.", r"\sqrt{2}"),
    "plain": ({"prompt": "1+1", "answer": 2}, "1+1", "2"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def opened(path: Path, layout: str = "auto", seed: int = 0, **config: Any) -> DataTask:
    return DataTask(path, JsonlConfig(**{"grade": "exact"} | config), seed, layout=layout)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("told", [True, False])
def test_every_layout_is_read_by_name_and_by_its_fields(tmp_path: Path, name: str, told: bool) -> None:
    row, prompt, answer = ROWS[name]
    task = opened(write(tmp_path / "d.jsonl", [row]), name if told else "auto", **ALL)
    [problem] = task.eval_problems(9)
    shown = BOXED.replace("{prompt}", prompt) if name in ("gsm8k", "math", "aime", "boxed") else prompt
    assert (problem.prompt, problem.answer) == (shown, answer)
    assert any(f"layout {name}" in note for note in task.notes) == (not told and name != "plain")


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("gsm8k", {"question": "a", "answer": "7"}, 'line 2: field "answer" is not "#### "'),
        ("math", {"problem": "a", "solution": "7"}, r"line 2: field \"solution\" is not a solution with its answer in"),
        ("aime", {"problem": "a", "answer": "1/2"}, 'line 2: field "answer" is not an integer from 0 to 999'),
        ("dapo", {"prompt": "a", "reward_model": {}}, 'line 2: field "reward_model.ground_truth" is missing'),
        ("dapo", {"prompt": "a", "reward_model": {}}, r"line 2: .* \(fields found: 'prompt', 'reward_model'\)"),
        ("dapo", {"prompt": "a", "reward_model": {"style": 1}}, r"line 2: .* \(fields found: 'reward_model.style'\)"),
    ],
)
def test_a_row_of_another_layout_is_named(tmp_path: Path, layout: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "d.jsonl", [ROWS[layout][0], row]), layout, **ALL)


def test_a_file_of_integers_and_fractions_is_not_taken_for_aime(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": "7"}, {"problem": "b", "answer": "1/2"}]
    task = opened(write(tmp_path / "d.jsonl", rows), **ALL)
    assert [p.answer for p in task.eval_problems(2)] == ["7", "1/2"]
    assert "layout boxed" in task.notes[0]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"id": 0, "question": "q", "answer": "3159.0"}, "3159.0"),
        ({"question": "q", "final_answer": r"\infty", "difficulty": 5.0}, r"\infty"),
        ({"prompt": "q", "solution": "34", "reward_model": {"ground_truth": "34"}}, "34"),
    ],
)
def test_the_instruction_can_be_had_whatever_the_fields_are(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    task = opened(write(tmp_path / "d.jsonl", [row]), "boxed", **ALL)
    [problem] = task.eval_problems(9)
    assert (problem.prompt, problem.answer) == (BOXED.replace("{prompt}", "q"), answer)
    assert 'prompts are read from the field "' in task.notes[0]


def test_fields_of_a_published_set_may_be_numbers(tmp_path: Path) -> None:
    row = {"0": {"from": "human", "value": "q"}, "1": {"from": "assistant", "ground_truth": {"value": "5"}}}
    fields = {"prompt_field": "0.value", "answer_field": "1.ground_truth.value"}
    [problem] = opened(write(tmp_path / "d.jsonl", [row]), "boxed", **fields, **ALL).eval_problems(9)
    assert (problem.prompt, problem.answer) == (BOXED.replace("{prompt}", "q"), "5")


@pytest.mark.parametrize(
    ("layout", "row", "odd"),
    [
        ("math", {"problem": "a", "solution": r"\boxed 5"}, {"problem": "z", "solution": "unboxed"}),
        ("gsm8k", {"question": "a", "answer": "#### 5"}, {"question": "z", "answer": "unmarked"}),
    ],
)
def test_one_odd_row_does_not_make_another_layout_of_a_file(
    tmp_path: Path, layout: str, row: dict[str, Any], odd: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="line 20: .*choose another --layout"):
        opened(write(tmp_path / "d.jsonl", [row] * 19 + [odd]), **ALL)


def test_aime_is_read_from_other_fields_and_without_degrees(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(("070", r"336^\circ", 12.0))]
    task = opened(write(tmp_path / "d.jsonl", rows), "aime", prompt_field="question", **ALL)
    assert sorted(problem.answer for problem in task.eval_problems(3)) == ["12", "336", "70"]
    assert task.eval_problems(1)[0].prompt.endswith("\\boxed{}.")


def test_the_rows_of_the_page_are_read_as_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\*\*(\w+)\*\*: .*?^```json\n(.*?)\n```", page, flags=re.DOTALL | re.MULTILINE)
    answers = {
        "plain": "4",
        "gsm8k": "1005",
        "math": r"\frac{1}{2}",
        "dapo": "34",
        "aime": "343",
        "boxed": r"\frac{1}{2}",
    }
    assert [name for name, _ in shown] == list(answers)
    for name, row in shown:
        (tmp_path / "d.jsonl").write_text(row + "\n", encoding="utf-8")
        task = opened(tmp_path / "d.jsonl", **ALL)
        assert task.eval_problems(1)[0].answer == answers[name]
        assert any(f"layout {name}" in note for note in task.notes) == (name != "plain")


def test_parquet_and_saved_folders_hold_what_the_jsonl_file_holds(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [VERL | {"n": i, "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(2500)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=dataset.select([5, 3]), test=dataset).save_to_disk(tmp_path / "dict")
    for name in ("d.parquet", "saved", "saved/data-00000-of-00003.arrow"):
        found = open_rows(tmp_path / name)
        assert [found[i] for i in range(len(found))] == rows[: len(found)]
        assert len(found) == (834 if name.endswith(".arrow") else 2500)
    assert [row["n"] for row in map(open_rows(tmp_path / "dict").__getitem__, range(2))] == [5, 3]
    assert open_rows(tmp_path / "saved").where(7) == f"{tmp_path / 'saved'}, row 8"


def test_of_parquet_files_named_after_splits_the_training_ones_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def folder(name: str, *files: str) -> Path:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            parquet.write_table(arrow.table({"prompt": [file], "answer": ["1"]}), tmp_path / name / f"{file}.parquet")
        return tmp_path / name

    def read(path: Path) -> list[str]:
        rows = open_rows(path)
        return [rows[i]["prompt"] for i in range(len(rows))]

    shards = [f"{name}-0000{i}-of-00002" for name in ("train", "test") for i in (0, 1)]
    path = folder("hub/data", *shards)
    assert read(path) == read(path.parent) == shards[:2]
    note = f"{path}: the split train is read, not test; name a file to read another"
    assert open_rows(path).note == note and opened(path.parent, **ALL).notes[0] == note
    for files, taken in (
        (["part-0-of-2", "part-1-of-2"], ["part-0-of-2", "part-1-of-2"]),
        (["test-0", "test-1"], ["test-0", "test-1"]),
        (["gsm8k_dev", "gsm8k_train"], ["gsm8k_train"]),
        (["TRAIN", "validation.1", "validation.2"], ["TRAIN"]),
        (["test_sft-00000-of-00001", "train_sft-00000-of-00001-ab12"], ["train_sft-00000-of-00001-ab12"]),
    ):
        assert read(folder(files[0], *files)) == taken
    for files in (
        ["test", "validation"],
        ["more", "train"],
        ["train_gen-00000-of-00001", "train_sft-00000-of-00001"],
    ):
        path = folder(f"unclear {files[0]}", *files)
        with pytest.raises(ValueError, match=f"holds .*, and which to read is not clear; give one file: {path}/"):
            open_rows(path)
    folder("subsets/main", "train")
    folder("subsets/socratic", "train")
    with pytest.raises(ValueError, match="folders main, socratic; give one of them: .*main"):
        open_rows(tmp_path / "subsets")


def test_the_split_of_a_dataset_dict_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"prompt": "1+1", "answer": "2"}])
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "d")
    assert "the split train is read, not test" in opened(tmp_path / "d", **ALL).notes[0]


def test_a_damaged_page_is_told_with_its_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a", "b"):
        parquet.write_table(arrow.table({"prompt": ["x"], "answer": ["1"]}), tmp_path / f"{name}.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file, or a damaged one \("):
        open_rows(tmp_path)


def test_a_table_of_text_is_told_how_to_become_rows(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,answer\n1+1,2\n")
    with pytest.raises(ValueError, match=r'd\.csv: a table, not JSONL; convert it: .*from_csv\(".*d\.csv"\)'):
        open_rows(tmp_path / "d.csv")


def test_numbers_are_read_as_a_person_writes_them(tmp_path: Path) -> None:
    numbers = [4.0, -0.5, 1e22, 3, 12345678901234567890, 5e-05, -0.0, 6.02e23]
    task = opened(write(tmp_path / "d.jsonl", [{"prompt": str(x), "answer": x} for x in numbers]), **ALL)
    assert [p.answer for p in task.eval_problems(9)] == [
        "4", "-0.5", "1" + "0" * 22, "3", "12345678901234567890", "0.00005", "0", "602" + "0" * 21,
    ]  # fmt: skip
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for answers, expected in (([Decimal("4.00"), Decimal("100.50")], ["4", "100.5"]), ([b"4", b"5"], "is bytes;")):
        parquet.write_table(arrow.table({"prompt": ["a", "b"], "answer": answers}), tmp_path / "d.parquet")
        if isinstance(expected, list):
            assert [p.answer for p in opened(tmp_path / "d.parquet", **ALL).eval_problems(2)] == expected
        else:
            with pytest.raises(ValueError, match=expected):
                opened(tmp_path / "d.parquet", **ALL)


def test_the_instruction_of_a_file_with_inputs_is_not_taken_silently(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    task = opened(write(tmp_path / "d.jsonl", [row]), **ALL)
    assert 'the field "input" is not shown' in task.notes[0]
    with pytest.raises(ValueError, match='1 different prompt.* look at what was read .*"input" is not shown'):
        opened(write(tmp_path / "d.jsonl", [row, row | {"input": "2+2", "output": "4"}]))


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_damaged_binary_file_is_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"not that at all, but long enough")
    with pytest.raises(ValueError, match=f"{name}: not a.* file"):
        open_rows(tmp_path / name)


def test_a_damaged_folder_of_datasets_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name, content, expected in [
        ("state.json", "{}", "state.json: not as datasets.*_data_files"),
        ("state.json", "oops", "state.json: not as datasets"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow is missing"),
        ("dataset_dict.json", "{}", "dataset_dict.json: not as datasets"),
        ("dataset_dict.json", '{"splits": []}', "has no splits; save it again"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=expected):
            open_rows(tmp_path)


def test_parquet_without_an_answer_without_rows_and_of_two_kinds_is_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def refused(expected: str, *tables: dict[str, Any]) -> None:
        folder = tmp_path / "d"
        folder.mkdir(exist_ok=True)
        for number, columns in enumerate(tables):
            parquet.write_table(arrow.table(columns), folder / f"{number}.parquet")
        with pytest.raises(ValueError, match=expected):
            opened(folder, **ALL)

    refused('row 2: field "answer" is nan', {"prompt": ["a", "b"], "answer": [1.0, float("nan")]})
    refused("d: has no rows", {"prompt": arrow.array([], arrow.string()), "answer": arrow.array([], arrow.string())})
    other = r"1.parquet: has other columns or types than 0.parquet \(answer\); write both alike"
    refused(other, {"prompt": ["a"], "answer": ["1"]}, {"prompt": ["a"]})
    refused(other, {"prompt": ["a"], "answer": ["1"]}, {"prompt": ["a"], "answer": [1]})


def test_a_value_that_python_cannot_hold_is_told_with_its_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = arrow.array([b"x", b"\xff"])
    for odd in (
        arrow.StringArray.from_buffers(2, *texts.buffers()[1:]),
        arrow.array([1, 10**9], arrow.date32()),
    ):
        parquet.write_table(
            arrow.table({"prompt": ["a", "b"], "answer": ["1", "2"], "odd": odd}), tmp_path / "d.parquet"
        )
        assert open_rows(tmp_path / "d.parquet")[0]["answer"] == "1"
        with pytest.raises(ValueError, match=r"d\.parquet, row 2: cannot be read \(.*leave that column out$"):
            opened(tmp_path / "d.parquet", **ALL)


def test_columns_of_every_encoding_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = arrow.array(["a", "b", "a"])
    for prompts in (texts, texts.dictionary_encode(), texts.cast(arrow.large_string())):
        table = arrow.table({"prompt": prompts, "answer": ["1", "2", "3"], "nothing": arrow.nulls(3)})
        parquet.write_table(table, tmp_path / "d.parquet")
        rows = open_rows(tmp_path / "d.parquet")
        found = [tuple(rows[i].values()) for i in range(3)]
        assert found == [("a", "1", None), ("b", "2", None), ("a", "3", None)]


def test_a_line_costs_two_numbers_to_find(tmp_path: Path) -> None:
    count = 50_000
    (tmp_path / "d.jsonl").write_bytes(b"{}\n" * count)
    tracemalloc.start()
    try:
        rows = open_rows(tmp_path / "d.jsonl")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == count and most < 40 * count  # while the index is made: two growing arrays and their copies


def test_filters_leave_rows_out_and_say_how_many(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i + 1), "answer": i, "rate": i / 20} for i in range(20)]
    path = write(tmp_path / "d.jsonl", rows + rows[5:7])
    config = {"pass_rate_field": "rate", "min_pass_rate": 0.2, "max_pass_rate": 0.8}
    task = opened(path, **ALL, **config)
    assert [p.answer for p in task.eval_problems(99)] == [str(i) for i in range(4, 17)]
    assert any("7 of 22 rows left out: pass rate outside [0.2, 0.8]" in note for note in task.notes)
    assert any("2 of 22 rows left out: same prompt and answer" in note for note in task.notes)
    task.keep(lambda problem: len(problem.prompt) <= 10, "more than 10 prompt tokens")
    assert [len(p.prompt) for p in task.eval_problems(99)] == [5, 6, 7, 8, 9, 10]
    assert "7 rows left out, with more than 10 prompt tokens" in task.notes[-2]
    assert [note for note in task.notes if "held out" in note] == [f"{path}: 6 prompts held out"]
    task.keep(lambda problem: len(problem.prompt) == 5, "another length")
    assert task.notes[-1] == f"{path}: 1 prompt held out"
    task = opened(write(path, [*rows[4:7], {"prompt": "a", "answer": "b", "rate": None}]), **ALL, **config)
    assert task.num_eval == 3 and any('1 of 4 rows left out: field "rate" is null' in note for note in task.notes)
    with pytest.raises(ValueError, match="jsonl.max_pass_rate: 0.8 needs .*--jsonl.pass-rate-field"):
        opened(path, **ALL, max_pass_rate=0.8)
    with pytest.raises(ValueError, match="line 1.*pass rate is a number from 0 to 1"):
        opened(write(path, [{"prompt": "a", "answer": "b", "rate": 2}]), **ALL, **config)


def test_rows_without_an_answer_are_refused_or_left_out_and_told(tmp_path: Path) -> None:
    """Proofs without a box, null, empty and absent answers, and what NuminaMath-1.5 writes for none."""
    boxes = [{"problem": f"{i}?", "solution": rf"It is $\boxed{{{i}}}$."} for i in range(10)]
    proof = {"problem": "Prove it.", "solution": "Trivial."}
    answers: list[Any] = [*range(10), None, "", " ", "proof", "Notfound", float("nan"), [1]]
    files = {
        "math": [*boxes, proof],
        "boxed": [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(answers)] + [{"problem": "?"}],
    }
    for layout, rows in files.items():
        path = tmp_path / f"{layout}.jsonl"
        path.write_text("".join(json.dumps(row).replace("NaN", "1e999") + "\n" for row in rows), "utf-8")
        with pytest.raises(ValueError, match="line 11: .*; --jsonl.unanswered drop leaves such rows out$"):
            opened(path, layout, **ALL)
        task = opened(path, layout, unanswered="drop", **ALL)
        assert [p.answer for p in task.eval_problems(99)] == [str(i) for i in range(10)]
        places = "line 11" if layout == "math" else "line 11, line 12, line 13, ..."
        assert f"{path}: {len(rows) - 10} of {len(rows)} rows left out: no answer can be read ({places})" in task.notes
        same = opened(write(tmp_path / "same.jsonl", rows[:10]), layout, **ALL)
        assert same.fingerprint == task.fingerprint
    refused = 'no row has an answer in the field "solution" in the form of layout math; .* another --layout'
    with pytest.raises(ValueError, match=refused):
        opened(write(tmp_path / "none.jsonl", [proof] * 3), "math", unanswered="drop", **ALL)
    with pytest.raises(ValueError, match="line 11: .*unanswered drop"):
        opened(tmp_path / "same.jsonl", "boxed", eval_data=tmp_path / "boxed.jsonl")
    task = opened(tmp_path / "same.jsonl", "boxed", eval_data=tmp_path / "boxed.jsonl", eval_fraction=0.5,
                  unanswered="drop")  # fmt: skip
    assert task.num_eval == 10 and any("boxed.jsonl: 8 of 18 rows left out: no answer" in note for note in task.notes)
    with pytest.raises(ValueError, match=r'line 2: field "prompt" is empty'):
        opened(write(tmp_path / "e.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "", "answer": 1}]), **ALL,
               unanswered="drop")  # fmt: skip


def test_a_row_without_an_answer_has_no_say_in_the_other_filters(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "answer": i if i else None, "rate": i / 4} for i in range(5)]
    config = {"pass_rate_field": "rate", "max_pass_rate": 0.8, "unanswered": "drop"}
    path = write(tmp_path / "d.jsonl", [*rows, rows[2]])
    task = opened(path, **ALL, **config)
    assert [p.answer for p in task.eval_problems(9)] == ["1", "2", "3"]
    assert [note.partition("left out: ")[2] for note in task.notes[:3]] == [
        "no answer can be read (line 1)", "pass rate outside [0, 0.8]", "same prompt and answer as an earlier row",
    ]  # fmt: skip
    assert "1 of 6" in task.notes[1]


def test_narrow_floats_of_parquet_files_are_the_numbers_that_were_written(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shares = [0.1, 0.3, 0.7, 0.9, 1.0]
    for kind, inner in ((np.float32, np.float16), (np.float16, np.float32)):
        rates = arrow.array(np.array(shares, inner))
        columns = {"prompt": ["a", "b", "c", "d", "e"], "answer": arrow.array(np.array(shares, kind))}
        columns["meta"] = arrow.StructArray.from_arrays([rates], ["rate"])
        parquet.write_table(arrow.table(columns), tmp_path / "d.parquet")
        limits = {"pass_rate_field": "meta.rate", "min_pass_rate": 0.3, "max_pass_rate": 0.9}
        task = opened(tmp_path / "d.parquet", **ALL, **limits)
        assert [p.answer for p in task.eval_problems(9)] == ["0.3", "0.7", "0.9"]


def test_a_file_whose_rows_are_all_held_out_says_what_to_change(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": str(i), "answer": i} for i in range(3)])
    with pytest.raises(ValueError, match=r"no row is left to train on; lower jsonl.eval_fraction"):
        opened(path, **ALL).train_problem(0)
    with pytest.raises(ValueError, match=r"no row is left to train on; give jsonl.eval_data other prompts"):
        opened(path, eval_data=path).train_problem(0)


def test_held_out_by_count_and_by_a_file_of_its_own(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "answer": i} for i in range(30)]
    path, other = (
        write(tmp_path / "d.jsonl", rows),
        write(tmp_path / "e.jsonl", [*rows[:4], {"prompt": "z", "answer": 0}]),
    )
    task = opened(path, eval_count=7)
    assert (task.num_train, task.num_eval) == (23, 7)
    task = opened(path, eval_data=other)
    assert [p.prompt for p in task.eval_problems(9)] == ["0", "1", "2", "3", "z"]
    assert {task.train_problem(i).prompt for i in range(60)} == {str(i) for i in range(4, 30)}
    with pytest.raises(ValueError, match="eval_count: 30 of the 30"):
        opened(path, eval_count=30)


def test_a_held_out_file_needs_no_pass_rates(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": str(i), "answer": i, "rate": i / 10} for i in range(10)])
    plain = write(tmp_path / "e.jsonl", [{"prompt": "x", "answer": 1}, {"prompt": "y", "answer": 2}])
    rated = write(
        tmp_path / "f.jsonl", [{"prompt": "x", "answer": 1, "rate": 0.9}, {"prompt": "y", "answer": 2, "rate": 0}]
    )
    filters = {"pass_rate_field": "rate", "max_pass_rate": 0.5}
    for held_out, prompts in ((plain, ["x", "y"]), (rated, ["y"])):
        task = opened(path, eval_data=held_out, **filters)
        assert [p.prompt for p in task.eval_problems(9)] == prompts
        assert task.num_train == 6
    with pytest.raises(ValueError, match='line 1: field "rate" is missing'):
        opened(plain, eval_data=path, **filters)


def test_the_index_alone_decides_the_problem_in_every_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": str(i), "answer": i} for i in range(40)])
    task, again = opened(path, seed=3), opened(path, seed=3)
    in_order = [task.train_problem(i).prompt for i in range(4 * task.num_train)]
    jumping = [again.train_problem(i).prompt for i in reversed(range(4 * task.num_train))][::-1]
    epochs = [tuple(in_order[i : i + 36]) for i in range(0, 144, 36)]
    assert in_order == jumping
    assert len(set(epochs)) == 4 and len({frozenset(epoch) for epoch in epochs}) == 1


def test_examples_and_templates_come_before_the_prompt(tmp_path: Path) -> None:
    row = ROWS["gsm8k"][0]
    shots = write(tmp_path / "shots.jsonl", [{"question": "One?", "answer": "#### 1"}])
    config = JsonlConfig(
        grade="exact", eval_fraction=1.0, few_shot=shots, template="Q: {prompt} {x}", system_prompt="S"
    )
    [problem] = DataTask(write(tmp_path / "d.jsonl", [row]), config).eval_problems(1)

    def text(chat: bool) -> str:
        tokenizer = byte_tokenizer(chat=chat)
        return str(tokenizer.decode(format_prompt(tokenizer, problem, config)))

    assert text(False) == "S\n\nQ: One? {x}\n\n#### 1\n\nQ: How many? {x}"
    turns = ("system\nS", "user\nQ: One? {x}", "assistant\n#### 1", "user\nQ: How many? {x}")
    assert text(True) == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    own = Problem([{"role": "system", "content": "mine"}, {"role": "user", "content": "?"}], "", {}, problem.examples)
    tokenizer = byte_tokenizer()
    assert str(tokenizer.decode(format_prompt(tokenizer, own, config))).startswith(
        "<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\nQ: One?"
    )
