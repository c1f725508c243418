"""The run folder survives what happens to runs: kill -9, full disks, two runs at once; and the metric list is one."""

from __future__ import annotations

import errno
import gzip
import importlib
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from engine_helpers import work
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ibtpo import metrics
from ibtpo.checkpoints import checkpoints, latest_checkpoint
from ibtpo.config import IBConfig, TrainConfig
from ibtpo.disk import RunFolderError
from ibtpo.ib import IBEstimates
from ibtpo.loggers import check_installed
from ibtpo.metrics import accuracy_interval, bootstrap_interval, evaluation_metrics, pass_at_k, tree_metrics
from ibtpo.runlog import RunFolder, read_rows
from ibtpo.treelog import thin_trees, tree_record
from ibtpo_engine.tree import Node, Tree


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def save(text: str = "weights") -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_text(text)


def rows(path: Path) -> list[dict[str, object]]:
    return list(read_rows(path / "metrics.jsonl"))


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


# ---- folder ----


def test_a_new_folder_holds_the_resolved_config(path: Path) -> None:
    with RunFolder.create(path, TrainConfig(out=path, seed=7)):
        config = yaml.safe_load((path / "config.yaml").read_text())
    assert (config["seed"], config["search"]["rounds"], config["out"]) == (7, 9, str(path))


def test_a_folder_with_files_is_refused_and_left_alone(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "precious").write_text("mine")
    with pytest.raises(RunFolderError, match=r"already holds files; choose another folder with --out$"):
        RunFolder.create(path, TrainConfig())
    assert files(path) == {"precious"}
    (path.parent / "link").symlink_to("gone")
    with pytest.raises(RunFolderError, match="link is a link to gone, which does not exist; make it, or"):
        RunFolder.create(path.parent / "link", TrainConfig())
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(path / "precious", TrainConfig())
    with pytest.raises(RunFolderError, match="cannot be created"):
        RunFolder.create(path / "precious" / "below", TrainConfig())
    RunFolder.create(path.parent / "two", TrainConfig()).close()
    with pytest.raises(RunFolderError, match="--resume"):
        RunFolder.create(path.parent / "two", TrainConfig())


def test_two_runs_on_one_folder_are_refused(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()):
        with pytest.raises(RunFolderError, match="in use"):
            RunFolder.open(path)
        script = "import sys; from pathlib import Path; from ibtpo.runlog import *; RunFolder.open(Path(sys.argv[1]))"
        other = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
        assert "in use by another run" in other.stderr
    RunFolder.open(path).close()


def test_what_is_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", TrainConfig()).close()
    with pytest.raises(RunFolderError, match="give .*/run, the folder of the run"):
        RunFolder.open(tmp_path / "run" / "checkpoints" / "step-000001")
    for wrong in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunFolderError, match="not a run folder"):
            RunFolder.open(wrong)


# ---- metrics ----


def test_metrics_are_logged_as_json_lines_and_events(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        run.log(1, {"reward": 0.25, "grad_norm": math.nan, "loss": math.inf})
        assert rows(path) == [{"step": 1, "reward": 0.25, "grad_norm": None, "loss": None}]  # on disk at once
        run.log(2, {"reward": np.float32(0.5)})
    events = EventAccumulator(str(path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert "grad_norm" not in events.Tags()["scalars"]


def test_only_rows_that_are_asked_for_are_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes looks for its evaluations."""
    with RunFolder.create(path, TrainConfig()) as run:
        for step in range(100):
            run.log(step, {"reward": 0.5} if step % 50 else {"eval_avg": 0.25})
    parsed: list[object] = []
    monkeypatch.setattr("ibtpo.runlog.json.loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    found = list(read_rows(path / "metrics.jsonl", "eval_avg"))
    assert found == [{"step": step, "eval_avg": 0.25} for step in (0, 50)] and len(parsed) == 2


def test_the_evaluations_of_a_run_are_known_without_reading_its_log_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint names them, and the log grows with the run."""
    with RunFolder.create(path, TrainConfig()) as run, monkeypatch.context() as patch:
        patch.setattr("ibtpo.runlog.read_rows", None)
        for step in range(4):
            run.log(step, {"reward": 0.5} if step % 2 else {"eval_avg": 0.25 if step else math.nan})
        assert run.evaluations == [{"step": 0, "eval_avg": None}, {"step": 2, "eval_avg": 0.25}]
    for last, known in ((3, 2), (1, 1)):
        with RunFolder.open(path, step=last) as run:
            assert [row["step"] for row in run.evaluations] == [0, 2][:known]


def test_unknown_metrics_are_refused(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        with pytest.raises(ValueError, match="unknown metrics rewrad"):
            run.log(1, {"rewrad": 1.0, "reward": 1.0})
        assert rows(path) == []


def test_the_documentation_is_the_list() -> None:
    """docs/metrics.md is what `python -m ibtpo.metrics` prints, and no name is listed twice."""
    document = Path(__file__).parents[1] / "docs" / "metrics.md"
    assert document.read_text("utf-8").rstrip() == metrics.documentation()
    assert len(metrics.METRICS) == sum(len(group.metrics) for group in metrics.GROUPS)
    assert all(metric.meaning.endswith(".") for metric in metrics.METRICS.values())


def test_resuming_drops_what_came_after_the_checkpoint(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        for step in range(1, 6):
            run.log(step, {"reward": step / 10})
            run.add_tree(step, {"nodes": []})
            if step == 3:
                run.checkpoint(step, save())
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    with RunFolder.open(path) as run:
        assert [row["step"] for row in rows(path)] == [1, 2, 3]
        assert [row["step"] for row in read_rows(path / "trees.jsonl")] == [1, 2, 3]
        run.log(4, {"reward": 0.9})
    assert [row["reward"] for row in rows(path)] == [0.1, 0.2, 0.3, 0.9]
    assert [e.value for e in EventAccumulator(str(path)).Reload().Scalars("reward")] == pytest.approx(
        [0.1, 0.2, 0.3, 0.9]
    )
    with RunFolder.open(path, step=1):
        assert [row["step"] for row in rows(path)] == [1]


# ---- checkpoints ----


def test_the_newest_checkpoints_are_kept(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        assert latest_checkpoint(path) is None
        for step in (5, 10, 15, 15):
            assert run.checkpoint(step, save(str(step)), keep=2).name == f"step-{step:06d}"
    last = latest_checkpoint(path)
    assert last is not None and last.step == 15
    assert (last.path / "model.safetensors").read_text() == "15"
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-000010", "step-000015"]


def test_the_latest_is_the_highest_number(path: Path) -> None:
    """Not the last name in the alphabet, and no file beside them that is no checkpoint."""
    with RunFolder.create(path, TrainConfig()) as run:
        for step in (999_999, 1_000_000, 1_000_001):
            run.checkpoint(step, save(), keep=2)
        (path / "checkpoints" / "step-notes").mkdir()
    last = latest_checkpoint(path)
    assert last is not None and last.step == 1_000_001
    assert [checkpoint.step for checkpoint in checkpoints(path)] == [1_000_000, 1_000_001]


@pytest.mark.parametrize("hurt", ["cut", "flip", "missing", "sums missing", "sums torn"])
def test_a_damaged_checkpoint_is_set_aside(path: Path, hurt: str) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        for step in (1, 2):
            run.log(step, {"reward": 0.5})
            run.checkpoint(step, save())
    last = path / "checkpoints" / "step-000002"
    weights, sums = last / "model.safetensors", last / "checksums.json"
    {
        "cut": lambda: weights.write_text("weig"),
        "flip": lambda: weights.write_text("weighty"),
        "missing": weights.unlink,
        "sums missing": sums.unlink,
        "sums torn": lambda: sums.write_text(sums.read_text()[:20]),
    }[hurt]()
    said: list[str] = []
    with RunFolder.open(path, say=said.append) as run:
        assert run.last is not None and run.last.step == 1
    assert len(said) == 1 and str(last) in said[0] and "set aside as damaged-000002" in said[0]
    assert [row["step"] for row in rows(path)] == [1]
    assert not last.exists() and (path / "checkpoints" / "damaged-000002").is_dir()
    (path / "checkpoints" / "step-000001" / "checksums.json").unlink()
    with pytest.raises(RunFolderError, match="every checkpoint is damaged .*step-000001: checksums.json is missing"):
        RunFolder.open(path)
    assert (path / "checkpoints" / "step-000001").is_dir()


def test_an_interrupted_checkpoint_is_ignored_and_cleaned(path: Path) -> None:
    """kill -9 in the middle of a write: the earlier checkpoint is the last one, and what was left is removed."""
    script = (
        "import os, sys; from pathlib import Path; from ibtpo.config import TrainConfig; from ibtpo.runlog import *\n"
        "run = RunFolder.create(Path(sys.argv[1]), TrainConfig())\n"
        "run.checkpoint(1, lambda folder: (folder / 'a').write_text('a'))\n"
        "run.checkpoint(2, lambda folder: ((folder / 'a').write_text('half'), os.kill(os.getpid(), 9)))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert (path / "checkpoints" / ".step-000002.tmp" / "a").exists()
    with RunFolder.open(path):
        last = latest_checkpoint(path)
        assert last is not None and last.step == 1
        assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-000001"]


def test_rows_are_dropped_without_holding_the_others(path: Path) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        run.log(1, {"reward": 0.5})
        run.checkpoint(1, save())
    line = json.dumps({"step": 1, "reward": 0.5, "loss": 0.1}) + "\n"
    (path / "metrics.jsonl").write_text(line * 20_000 + '{"step": 2}\n{"st')
    tracemalloc.start()
    try:
        with RunFolder.open(path):
            _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (path / "metrics.jsonl").read_text() == line * 20_000
    assert most < 10_000 * len(line)


def fill_disk(folder: Path) -> None:
    (folder / "part-1").write_text("half")
    with open("/dev/full", "w") as full:  # a real ENOSPC
        full.write("x" * 100)


def fill_disk_in_rust(folder: Path) -> None:
    (folder / "part-1").write_text("half")
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def fill_quota(folder: Path) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("write", [fill_disk, fill_disk_in_rust, fill_quota])
def test_a_full_disk_leaves_nothing_half_written(path: Path, write: Callable[[Path], None]) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        run.checkpoint(1, save())
        before = files(path)
        with pytest.raises(RunFolderError, match="no space left") as caught:
            run.checkpoint(2, write)
        assert files(path) == before
        for part in (str(path), "step-000001", "--resume"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_so_large_is_removed_and_said(path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "part-1").write_text("half")
        raise RuntimeError("Error while serializing: I/O error: File too large (os error 27)")  # as safetensors does

    with RunFolder.create(path, TrainConfig()) as run:
        before = files(path)
        with pytest.raises(RunFolderError, match=r"^a file is too large .*; raise the limit, then .*--resume"):
            run.checkpoint(1, write)
        assert files(path) == before


def test_a_full_disk_leaves_no_half_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(path, TrainConfig()) as run:
        (path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunFolderError, match="no space left"):
            run.log(1, {"reward": 1.0})
        (path / "metrics.jsonl").unlink()


def test_a_full_disk_at_the_start_leaves_no_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ibtpo.runlog.write_atomically", full)
    with pytest.raises(RunFolderError, match="no space left"):
        RunFolder.create(path, TrainConfig())
    assert not path.exists()


def test_other_errors_while_saving_pass_through_and_clean_up(path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise KeyError("layer 7")

    with RunFolder.create(path, TrainConfig()) as run:
        with pytest.raises(KeyError, match="layer 7"):
            run.checkpoint(1, broken)
        assert list((path / "checkpoints").iterdir()) == []


# ---- metrics of trees ----


def grow(branch: Node, tokens: list[int], finish: str | None, reward: float | None = None) -> Node:
    count = len(tokens)
    values = np.full(count, math.log(0.5))
    branch.fill(np.array(tokens), values, values, np.full(count, 0.3), finish=finish)
    branch.reward = reward
    return branch


def small_tree(rewards: tuple[float, float, float] = (1.0, 0.0, 1.0)) -> Tree:
    """Prompt [9, 9]; a = [1] with leaves b = [2, 3], d = [5]; c = [4] a leaf. b and c came first, d branched at a."""
    tree = Tree([9, 9])
    ib = IBEstimates(tree, IBConfig())
    first, second = tree.root.fork(2)
    a = grow(first, [1], None)
    b = grow(a.fork()[0], [2, 3], "stop", rewards[0])
    c = grow(second, [4], "length", rewards[1])
    ib.add_leaf([a, b])
    ib.add_leaf([c])
    d = grow(a.fork()[0], [5], "stop", rewards[2])
    ib.add_leaf([d])
    for node, turn in ((a, 0), (b, 0), (c, 0), (d, 1)):
        node.notes["round"] = turn
    tree.notes.update(ib=ib, iid_leaves=[b, c], branched=[(1, a, -0.6)])
    return tree


def test_tree_metrics_of_a_tree_worked_out_by_hand() -> None:
    values = tree_metrics([small_tree()])
    assert values["reward"] == values["avg_rate"] == pytest.approx(2 / 3)
    assert values["avg_rate_iid"] == 0.5
    assert values["eff_rate"] == 1.0
    assert (values["prompts"], values["trajectories"]) == (1, 3)
    assert (values["tokens_sampled"], values["trajectory_tokens"]) == (5, 3 + 1 + 2)
    assert (values["response_length"], values["response_steps"]) == (2.0, pytest.approx(5 / 3))
    assert values["truncated_share"] == pytest.approx(1 / 3)
    assert values["sampler_entropy"] == pytest.approx(0.3)
    assert values["confidence"] == pytest.approx(0.5)
    assert values["cov_eta1_eta2"] == pytest.approx(0.0)
    # root: ratios 1/(2/3) and 0; a: ratios 1 and 1; all at confidence 0.5, offset 1.2, six times the mean product
    assert values["ib_score"] == pytest.approx((6 / 2 * 0.5 * (1.5 - 1.2 - 1.2) + 6 * 0.5 * (1 - 1.2)) / 2)
    assert values["branch_depth"] == values["branch_depth_1"] == 1.0
    assert values["branch_depth_0"] == values["branch_depth_17_up"] == 0.0
    metrics.check_names(values)


def test_tree_metrics_average_over_trees_and_leave_out_what_is_unknown() -> None:
    plain = small_tree((1.0, 1.0, 1.0))
    plain.notes.clear()
    both = tree_metrics([small_tree(), plain])
    assert both["eff_rate"] == 0.5
    assert both["avg_rate"] == pytest.approx(5 / 6)
    alone = tree_metrics([plain])
    assert "ib_score" not in alone and "avg_rate_iid" not in alone and "branch_depth" not in alone
    ungraded = small_tree()
    ungraded.leaves()[0].reward = None
    with pytest.raises(ValueError, match="no reward"):
        tree_metrics([ungraded])
    with pytest.raises(ValueError, match="no trees"):
        tree_metrics([])


def test_tree_record_is_plain_data_with_parents_first() -> None:
    record = tree_record(small_tree(), lambda ids: "".join(map(str, ids)), answer="2")
    nodes = json.loads(json.dumps(record, allow_nan=False))["nodes"]
    assert [(node["parent"], node["text"], node["round"]) for node in nodes] == [
        (None, "99", None), (0, "1", 0), (1, "23", 0), (1, "5", 1), (0, "4", 0),
    ]  # fmt: skip
    assert nodes[0]["eta1"] is None and nodes[0]["score"] is not None
    assert (nodes[2]["score"], nodes[2]["reward"], nodes[4]["finish"]) == (None, 1.0, "length")
    plain = small_tree()
    plain.notes.clear()
    assert "value" not in tree_record(plain, str)["nodes"][0]


def test_tree_record_has_a_piece_and_figures_for_every_token() -> None:
    tree = small_tree()
    for node, kept in zip(tree.nodes(), tree_record(tree, lambda ids: "".join(map(str, ids)))["nodes"], strict=True):
        assert len(kept["pieces"]) == len(node.tokens) and "".join(kept["pieces"]) == kept["text"]
        assert len(kept["logprob"]) == len(kept["entropy"]) == (0 if node.parent is None else len(node.tokens))


def test_a_character_spread_over_tokens_belongs_to_the_one_that_completes_it() -> None:
    def decode(ids: list[int]) -> str:  # tokens are single bytes
        return bytes(ids).decode(errors="replace")

    tree = small_tree()
    tree.root.tokens = np.array(list("aé€".encode()), np.int32)
    assert tree_record(tree, decode)["nodes"][0]["pieces"] == ["a", "", "é", "", "", "€"]


@given(st.lists(st.sampled_from([*"a é€".encode(), *b"\xf0\x9f\x98\x80\xff"]), min_size=1, max_size=24))
def test_the_pieces_of_any_bytes_are_their_text(ids: list[int]) -> None:
    tree = Tree(ids)
    [prompt] = tree_record(tree, lambda ids: bytes(ids).decode(errors="replace"))["nodes"]
    assert len(prompt["pieces"]) == len(ids)
    assert prompt["text"] == bytes(ids).decode(errors="replace")


def test_a_long_text_with_a_rare_character_is_decoded_once() -> None:
    def decoded(ids: list[int]) -> int:
        lengths: list[int] = []

        def decode(part: list[int]) -> str:
            lengths.append(len(part))
            return bytes(part).decode(errors="replace")

        tree_record(Tree(ids), decode)
        return sum(lengths)

    for text in ("a", "é€", "\U0001f600"):
        short, long = (decoded([*"é".encode(), *(text * count).encode()]) for count in (64, 128))
        assert long < 2.1 * short
    assert decoded([0xF0] * 128) < 2.1 * decoded([0xF0] * 64)


def test_trees_are_kept_within_bounds_and_spread_over_the_run(path: Path) -> None:
    record = tree_record(small_tree(), lambda ids: "".join(map(str, ids)))
    with RunFolder.create(path, TrainConfig()) as run:
        run.add_tree(1, record)
        [first] = (path / "trees").iterdir()
        size = first.stat().st_size
        for step in range(2, 41):
            run.add_tree(step, record, most_bytes=10.5 * size)
    rows_ = list(read_rows(path / "trees.jsonl"))
    assert {row["file"] for row in rows_} == {file.name for file in (path / "trees").iterdir()}
    steps = [row["step"] for row in rows_]
    assert 5 <= len(steps) <= 11 and steps[0] == 1 and steps[-1] == 40
    assert max(b - a for a, b in pairwise(steps)) <= 20
    assert json.loads(gzip.decompress((path / "trees" / rows_[-1]["file"]).read_bytes()))["step"] == 40
    assert thin_trees(path, 1, 1) and len(list((path / "trees").iterdir())) == 2  # the first and the last stay


def test_thinning_trees_costs_a_step_the_same_in_short_and_long_runs(tmp_path: Path) -> None:
    def each(steps: int) -> float:
        folder = tmp_path / str(steps) / "trees"
        folder.mkdir(parents=True)
        for step in range(steps):
            (folder / f"step-{step:06d}-000.json.gz").write_bytes(b"0123456789")
        spent = work(lambda: thin_trees(folder.parent, 10 * steps - 1, 5 * steps))
        assert len(list(folder.iterdir())) == steps // 2
        return spent / steps

    assert each(256) < 1.2 * each(64)


# ---- loggers ----


class FakeTracker(types.ModuleType):
    """Stands in for wandb or trackio."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = False
        self.fails_at = fails_at

    def init(self, **options: Any) -> FakeTracker:
        self.started = options
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if self.fails_at is not None and values["step"] == self.fails_at:
            raise ConnectionError("the service is down")
        self.logged.append(values if step is None else {"step of trackio": step, **values})

    def finish(self) -> None:
        self.finished = True


def test_loggers_get_what_the_log_gets_and_never_end_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, trackio = FakeTracker("wandb", fails_at=2), FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with RunFolder.create(path, TrainConfig(log="wandb,trackio")) as run:
        run.log(1, {"reward": 0.5, "loss": float("nan")})
        with pytest.warns(RuntimeWarning, match="logging to wandb stopped .ConnectionError: the service is down"):
            run.log(2, {"reward": 0.6})
        run.log(3, {"reward": 0.7})
    assert (
        trackio.logged == [{"step of trackio": i, "reward": r} for i, r in ((1, 0.5), (2, 0.6), (3, 0.7))]
        and trackio.finished
    )
    assert len(wandb.logged) == 1 and wandb.started["config"]["search"]["rounds"] == TrainConfig().search.rounds
    assert [row["reward"] for row in rows(path)] == [0.5, 0.6, 0.7]
    assert len(EventAccumulator(str(path)).Reload().Scalars("reward")) == 3


REAL_LOGGER = """
import pathlib, sys, warnings
from ibtpo.config import TrainConfig
from ibtpo.runlog import RunFolder
warnings.simplefilter("error", UserWarning)  # trackio warns of names it changes
name, folders = sys.argv[1], [pathlib.Path(text) for text in sys.argv[2:]]
config = TrainConfig(log=name)
for folder in folders:
    with RunFolder.create(folder, config) as run:
        run.log(1, {"reward": 0.5, "loss": float("nan")})
        run.log(1, {"eval_avg": 0.25})
        run.checkpoint(1, lambda path: (path / "file").write_text("x"))
        run.log(2, {"reward": 0.75})
with RunFolder.open(folders[0], config) as run:
    run.log(2, {"reward": 1.0})
"""


def _log_for_real(module: str, tmp_path: Path) -> None:
    """Two runs in folders of the same name, the first one resumed, in a process that reaches no network."""
    pytest.importorskip(module)
    home = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", REAL_LOGGER, module, str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | home, timeout=120)
    assert done.returncode == 0 and "logging to" not in done.stderr, done.stderr


def test_trackio_itself_keeps_the_runs_apart_and_the_steps(tmp_path: Path) -> None:
    _log_for_real("trackio", tmp_path)
    [database] = (tmp_path / "trackio").glob("ibtpo*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    first, second = f"run-{(tmp_path / 'a/run/.run-id').read_text()}", f"run-{(tmp_path / 'b/run/.run-id').read_text()}"
    begin = [(1, {"reward": 0.5}), (1, {"eval_avg": 0.25}), (2, {"reward": 0.75})]
    expected = [*((first, *row) for row in begin), *((second, *row) for row in begin), (first, 2, {"reward": 1.0})]
    assert [(name, step, json.loads(metrics)) for name, step, metrics in found] == expected


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB, chunks of (CRC, length, kind, data)."""
    at, record = 7, b""  # behind the file's own header
    while at + 7 <= len(content):
        if -at % 32768 < 7:  # no room for a chunk in the rest of the block
            at += -at % 32768
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, last; first and middle are 2 and 3
            yield record
            record = b""


def test_wandb_itself_keeps_the_runs_apart_and_the_steps(tmp_path: Path) -> None:
    _log_for_real("wandb", tmp_path)
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    identities = set()
    for folder, sessions in (("a", 2), ("b", 1)):
        identity, logged = (tmp_path / folder / "run/.run-id").read_text(), []
        files = sorted((tmp_path / folder / "run/wandb").glob("offline-run-*/*.wandb"))
        assert [file.name for file in files] == [f"run-{identity}.wandb"] * sessions
        for file in files:
            for data in _wandb_records(file.read_bytes()):
                record = messages.Record.FromString(data)
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                logged += [{k: json.loads(v) for k, v in items.items() if not k.startswith("_")}] if items else []
        expected = [{"step": 1, "reward": 0.5}, {"step": 1, "eval_avg": 0.25}, {"step": 2, "reward": 0.75}]
        assert logged == expected + [{"step": 2, "reward": 1.0}] * (sessions - 1)
        identities.add(identity)
    assert len(identities) == 2


def test_loggers_that_are_unknown_or_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="log"):
        TrainConfig(log="wanbd")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log: trackio is not installed; pip install trackio"):
        check_installed("trackio")


# ---- evaluation ----


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = [any(i < c for i in subset) for subset in combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("count", [1, 2, 10, 100])
def test_an_interval_of_prompts_all_alike_leaves_room_for_those_not_seen(count: int) -> None:
    """Its end is the mean of the prompts that, but for a chance of 2.5 %, would have shown one that is otherwise."""
    unseen = 1 - 0.025 ** (1 / count)
    for value in (0.0, 0.3, 1.0):
        low, high = accuracy_interval([value] * count)
        assert low == pytest.approx((1 - unseen) * value, abs=1e-12)
        assert high == pytest.approx((1 - unseen) * value + unseen, abs=1e-12)
    low, high = accuracy_interval([1.0] * count)  # Clopper and Pearson: the chance of all right is 2.5 % there
    assert (low**count, high) == (pytest.approx(0.025), 1.0)
    assert accuracy_interval([1.0 + 2e-16] * count) == (low, high), "maj@k is a sum of many"


def test_an_interval_of_prompts_that_differ_is_the_bootstraps() -> None:
    assert accuracy_interval([0.5, 1.0, 0.25]) == bootstrap_interval([0.5, 1.0, 0.25])
    assert all(map(math.isnan, accuracy_interval([])))
    values = evaluation_metrics([[1.0, 1.0]] * 4, [0.0] * 4)
    for name, value in (("avg", 1.0), ("pass", 1.0), ("greedy", 0.0)):
        assert values[f"eval_{name}"] == value
        assert values[f"eval_{name}_high"] - values[f"eval_{name}_low"] == pytest.approx(1 - 0.025**0.25)


def test_bootstrap_interval_is_seeded_and_covers_like_the_normal_one() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.004),
        pytest.approx(values.mean() + half, abs=0.004),
    )
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
    assert all(map(math.isnan, bootstrap_interval([])))


def test_the_interval_of_many_prompts_takes_little_memory() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 11, 100_000) / 10, rng.random(20_000)):
        tracemalloc.start()
        low, high = bootstrap_interval(values)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 30e6  # [2000, P] would be 320 MB and more
        half = 1.96 * values.std() / math.sqrt(len(values))
        assert high - low == pytest.approx(2 * half, rel=0.1)


def test_evaluation_metrics_have_the_log_s_names() -> None:
    values = evaluation_metrics([[1, 0], [0, 0], [1, 1], [0, 1]], [1, 0, 1, 0])
    assert (values["eval_avg"], values["eval_pass"], values["eval_greedy"]) == (0.5, 0.75, 0.5)
    assert (values["eval_prompts"], values["eval_samples"]) == (4, 2)
    assert values["eval_avg_low"] < 0.5 < values["eval_avg_high"]
    metrics.check_names(values)
