"""What a run came to is what was logged; what is read of a growing run; the server and the command."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from engine_helpers import work
from run_folders import HOSTILE, add_tree, log_steps, make_run

from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.metrics import evaluation_metrics
from ibtpo.report import DASH, NOT_ACCURACY, Tally, amount, number, summarize_run
from ibtpo.runlog import RunFolder
from ibtpo.viewer import Viewer, export_page
from ibtpo.viewer.export import pick_trees
from ibtpo.viewer.page import embed
from ibtpo.viewer.run import GrowingLog, RunView, open_views


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


def test_the_summary_looks_at_no_more_names_than_it_shows() -> None:
    """A page that is open asks for it after every step, and rows have seventy names."""

    class Row(dict[str, float]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("all names were looked at")

    tally = Tally()
    for row in (Row(step=1, trajectories=24.0), Row(step=2, eval_avg=0.5)):
        tally.add(row)
    assert tally.summary().amounts == [("Trajectories", "24", "leaves of all trees")]


def test_an_accuracy_is_compared_with_one_of_the_same_k(folder: Path) -> None:
    run_two_steps(folder)
    with RunFolder.open(folder, step=2) as run:
        run.log(3, evaluation_metrics([[1, 1, 1, 0], [1, 0, 0, 0]], [1, 1]))
    avg, passed, greedy = summarize_run(folder).accuracies
    assert (avg.name, passed.name) == ("Sampled, avg@4", "Sampled, pass@4")
    assert avg.before is passed.before is None
    assert passed.after is not None and greedy.before is not None and greedy.after is not None


def test_an_interrupted_run_has_a_before_and_no_after(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.log(0, evaluation_metrics([[1, 0]], [1]))
    avg = summarize_run(folder).accuracies[0]
    assert avg.before is not None and avg.after is None


def test_picked_trees_are_spread_over_the_run_and_mixed() -> None:
    rows = [
        {"step": i + 1, "right": right, "leaves": n}
        for i, (right, n) in enumerate([(0, 2), (1, 2), (2, 2), (1, 3), (2, 2), (0, 2)])
    ]
    assert [picked["step"] for picked in pick_trees(rows, 2)] == [2, 4]
    assert [picked["step"] for picked in pick_trees(rows, 9)] == [1, 2, 3, 4, 5, 6]
    assert pick_trees(rows, 0) == pick_trees([], 4) == []


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


# ---- the page and its server ----


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_page_needs_no_network_and_is_written_for_a_run_of_any_length(folder: Path, steps: int) -> None:
    with RunFolder.open(folder) as run:
        log_steps(run, range(1, steps + 1))
        if steps:
            run.log(steps, {"grad_norm": float("nan")})
            add_tree(run, steps, prompt=HOSTILE)
    text = export_page([folder], folder / "report.html", trees=4).read_text("utf-8")
    assert NOT_ACCURACY in text and text.rstrip().endswith("</html>")
    assert not re.search(
        r"https?://(?!www.w3.org/2000/svg)|@import|url\(|<link|innerHTML|insertAdjacentHTML|eval\(", text
    )
    assert "default-src 'none'; script-src 'sha256-" in text.replace("&#x27;", "'")
    assert len(re.findall("</script", text)) == 2 and "<b>run" not in text
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


def test_embedded_data_reads_back() -> None:
    data = {"text": HOSTILE, "n": [1.5, None]}
    assert json.loads(embed(data)) == data
    assert not set("<>&\u2028") & set(embed(data))


def test_a_growing_log_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = GrowingLog(path)
    log.refresh()
    assert log.since("") == ([], True, "0.0")
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n{"st')
    log.refresh()
    rows, reset, cursor = log.since("0.0")
    assert ([row["step"] for row in rows], reset) == ([1, 2], True)
    with path.open("a") as file:
        file.write('ep": 3}\n')
    log.refresh()
    assert log.since(cursor) == ([{"step": 3}], False, "1.3")
    replacement = tmp_path / "new"
    replacement.write_text('{"step": 1}\n')
    replacement.replace(path)
    log.refresh()
    assert log.since("1.3") == ([{"step": 1}], True, "2.1")
    assert log.since("2.x") == log.since("nonsense") == log.since(f"2.{'1' * 5000}")
    with path.open("r+") as file:  # another file that has the number of the one before, and a longer one
        file.write('{"step": 7}\n{"step": 8}\n')
    log.refresh()
    assert log.since("2.1") == ([{"step": 7}, {"step": 8}], True, "3.2")
    path.unlink()
    log.refresh()
    log.refresh()
    assert log.since("3.2") == ([], True, "4.0") and log.since("4.0") == ([], False, "4.0")


def test_a_page_is_told_of_another_run_in_the_same_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, trees=1)
    view = RunView(run)
    first = view.poll()
    shutil.rmtree(run)
    gone = view.poll(first["metrics"]["cursor"])
    assert gone["metrics"]["reset"] and gone["metrics"]["steps"] == [] and gone["config"] == "{}\n"
    make_run(run, steps=3, trees=1, model="other")
    second = view.poll(first["metrics"]["cursor"])
    assert second["metrics"]["reset"] and second["metrics"]["steps"] == [0, 1, 2, 3, 3]
    assert "model: other" in second["config"] and "model: other" not in first["config"]
    assert "config" not in view.poll(second["metrics"]["cursor"])


def test_a_new_row_costs_the_same_in_a_short_and_a_long_run(tmp_path: Path) -> None:
    def spent(steps: int) -> int:
        run = make_run(tmp_path / str(steps), steps=steps, trees=1)
        view = RunView(run)
        cursors = {name: view.poll()[name]["cursor"] for name in ("metrics", "trees")}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": steps + 1, "trajectories": 1.0}) + "\n")
        answers = []
        count = work(lambda: answers.append(view.poll(**cursors)))
        assert answers[0]["summary"] == asdict(summarize_run(run)) and answers[0]["summary"]["steps"] == steps + 1
        return count

    assert spent(80) < 1.1 * spent(20)


def test_a_long_run_is_a_page_of_bounded_size_with_its_extremes_and_evaluations(tmp_path: Path) -> None:
    """Also its tokens and means; and what comes after the page was opened is shown step by step."""

    def written(steps: int) -> tuple[Path, RunView]:
        run = make_run(tmp_path / str(steps), steps=1, trees=0)
        lines = [{"step": s, "tokens_sampled": 10, "loss": math.sin(s), "kl": 9.0 if s == 4567 else 0.5}
                 for s in range(2, steps + 1)]  # fmt: skip
        for step in range(0, steps, 1000):
            lines.append({"step": step, "eval_avg": step / steps, "eval_avg_low": 0.0})
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return run, RunView(run)

    run, view = written(12_000)
    answer = view.poll()
    found, rows = answer["metrics"], view._metrics.rows
    values, steps = found["values"], found["steps"]
    assert steps == sorted(steps) and len(steps) < 2100
    for name in ("loss", "kl"):
        columns = values[name], found["means"][name]
        logged = [row[name] for row in rows if name in row]
        shown, means = ([value for value in column if value is not None] for column in columns)
        assert (min(shown), max(shown)) == pytest.approx((min(logged), max(logged)))
        assert sum(means) / len(means) == pytest.approx(sum(logged) / len(logged), abs=1e-3)
    assert abs(steps[values["kl"].index(9.0)] - 4567) <= 12
    assert sum(found["sampled"]) == sum(row.get("tokens_sampled", 0) for row in rows)
    evaluations = [(step, value) for step, value in zip(steps, values["eval_avg"], strict=True) if value is not None]
    logged_too = sorted((row["step"], row["eval_avg"]) for row in rows if "eval_avg" in row)
    assert sorted(evaluations) == [(step, pytest.approx(value)) for step, value in logged_too]
    assert "curves: lowest, highest and mean of every 12 steps" in answer["facts"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12001, "loss": 3.0}\n')
    assert view.poll(found["cursor"])["metrics"]["steps"] == [12001]
    short, long = (export_page([r], tmp_path / "x.html", trees=0).stat().st_size for r in (run, written(48_000)[0]))
    assert long < 1.2 * short


def test_the_names_of_metrics_are_held_once(tmp_path: Path) -> None:
    log = GrowingLog(make_run(tmp_path / "run", steps=3, trees=0) / "metrics.jsonl")
    log.refresh()
    first, second = (list(row) for row in log.rows[1:3])
    assert all(a is b for a, b in zip(first, second, strict=True))


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_the_server_gives_what_is_new_and_only_trees_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, trees=1)
    (tmp_path / "secret.json.gz").write_bytes(b"secret")
    with Viewer([run], 0) as viewer:
        thread = threading.Thread(target=viewer.serve)
        thread.start()
        try:
            first = json.loads(get(f"{viewer.url}api/run/0")[1])
            assert first["metrics"]["steps"] == [0, 1, 2, 2] and first["summary"]["steps"] == 2
            cursors = f"metrics={first['metrics']['cursor']}&trees={first['trees']['cursor']}"
            again = json.loads(get(f"{viewer.url}api/run/0?{cursors}")[1])
            assert again["metrics"]["steps"] == again["trees"]["rows"] == [] and "summary" not in again
            [row] = first["trees"]["rows"]
            status, tree = get(f"{viewer.url}api/run/0/tree/{row['file']}")
            assert status == 200 and len(json.loads(gzip.decompress(tree))["nodes"]) == 7
            for bad in (
                "api/run/1",
                "api/run/0/tree/..%2f..%2fsecret.json.gz",
                "api/run/0/tree/step-000009-000.json.gz",
                "x",
            ):
                assert get(viewer.url + bad)[0] == 404
            for host in ("evil.example:80", "evil.example", "localhost.evil.example", "evil.example:localhost", ""):
                assert get(viewer.url, Host=host)[0] == 403  # DNS rebinding
            for host in ("localhost", "127.0.0.1", "localhost:1"):  # browsers leave port 80 out
                assert get(viewer.url, Host=host)[0] == 200
        finally:
            viewer.stop()
            thread.join()


def test_a_run_folder_that_somebody_has_damaged_is_shown_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, trees=1)
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(
            b'{"step": 3, "reward": NaN, "loss": 1e999, "kl": "text"}\n\xff\n[4]\n{"step": 4, "reward": 0.5}\n{"st'
        )
    for config in ("a: [", "- 1", "search: 3", ""):
        (run / "config.yaml").write_text(config)
        answer = json.loads(json.dumps(RunView(run).poll(), allow_nan=False))
        assert answer["metrics"]["steps"] == [0, 1, 2, 2, 3, 4]
        assert answer["metrics"]["values"]["reward"][-2:] == [None, 0.5]
        assert export_page([run], tmp_path / "page.html", trees=1).stat().st_size > 50_000


def test_a_browser_that_leaves_and_one_that_asks_for_nonsense_are_no_trouble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=2, trees=1)
    with Viewer([run], 0) as viewer:
        thread = threading.Thread(target=viewer.serve)
        thread.start()
        try:
            port = int(viewer.url.rstrip("/").rpartition(":")[2])
            for line in (
                b"GET /api/run/\xb2 HTTP/1.1",
                b"GET /api/run/0?metrics=1.%C2%B2 HTTP/1.1",
                b"GET /api/run/0?metrics=1." + b"9" * 5000 + b" HTTP/1.1",
                b"GET /api/run/" + b"9" * 5000 + b" HTTP/1.1",
            ):
                with socket.create_connection(("127.0.0.1", port), 10) as connection:
                    connection.sendall(line + b"\r\nHost: localhost:1\r\nConnection: close\r\n\r\n")
                    assert connection.recv(12) in (b"HTTP/1.1 404", b"HTTP/1.1 200")
                    reset = struct.pack("ii", 1, 0)  # whoever closes with it has lost interest
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            assert get(viewer.url)[0] == 200
        finally:
            viewer.stop()
            thread.join()
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_exports_and_refuses_what_it_cannot_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=1, trees=1)
    assert main(["view", str(run), str(run), "--export", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 50_000
    for arguments, message in (
        ([tmp_path], "is not a run folder"), ([run, run, run], "give one run"), ([run, "--port", "70000"], "65535"),
        ([run, "--export", tmp_path / "no" / "page.html"], "is not a folder"), ([], "give one"),
        ([run, "--export", tmp_path], f"is a folder; name a file in it, such as {tmp_path}/page.html"),
    ):  # fmt: skip
        assert main(["view", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_taken_port_is_an_error_only_where_it_was_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, trees=0)
    with Viewer([run], 0) as first:
        port = int(first.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ValueError, match=f"port: {port} cannot be used"):
            Viewer([run], port)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    first, second, other = (make_run(tmp_path / name, steps=0, trees=0) for name in ("a/run", "b/run", "c"))
    assert [view.name for view in open_views([first, second])] == ["a/run", "b/run"]
    assert [view.name for view in open_views([first, other])] == ["run", "c"]


def test_a_tree_whose_file_is_gone_is_not_offered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, trees=2)
    view = RunView(run)
    assert len(view.trees()) == 2
    gone = next((run / "trees").iterdir())
    gone.unlink()
    assert len(view.trees()) == 1
    assert view.tree(gone.name) is None and view.tree(view.trees()[0]["file"]) is not None
