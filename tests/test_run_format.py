"""Run folders and checkpoints carry a format: a newer one is refused with what to do, one without a number is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import save_additions, save_checkpoint
from endings import assert_same_end, last_checkpoint

from ibtpo.checkpoints import checkpoints, weights_of
from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.disk import RunFolderError
from ibtpo.run_format import FORMAT, FORMAT_FILE, check_format, check_run
from ibtpo.runlog import RunFolder

SETTINGS = [
    "--jsonl.grade", "exact", "--sampled-tokens", "150", "--prompts-per-step", "4", "--search.rounds", "2",
    "--sampling.max-tokens", "6", "--eval.prompts", "3", "--eval.samples", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with at least three checkpoints, made in one thread, as the tests that resume it are."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    model, data = save_checkpoint(folder / "model", teach=10), save_additions(folder / "rows.jsonl")
    flags = ["--model", model, "--data", data, *SETTINGS, "--checkpoint-every", 1, "--out", folder / "run"]
    assert main(["train", *map(str, flags)]) == 0
    assert len(checkpoints(folder / "run")) >= 3
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _number(folder: Path, number: object = FORMAT + 1) -> None:
    (folder / FORMAT_FILE).write_text(json.dumps({"format": number, "version": "9.8.7"}))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def _damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"not what was written")


# ---- the number --------------------------------------------------------------------------------------------------


def test_a_run_and_each_of_its_checkpoints_carry_the_number(trained: Path) -> None:
    for folder in (trained, *(checkpoint.path for checkpoint in checkpoints(trained))):
        assert json.loads((folder / FORMAT_FILE).read_text())["format"] == FORMAT
        check_format(folder)


@pytest.mark.parametrize("command", ["resume", "config", "view", "eval", "sample", "train"])
def test_a_newer_run_is_refused_and_left_alone(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its configuration has fields that nobody here knows: the number is looked at first."""
    _number(run)
    with (run / "config.yaml").open("a") as config:
        config.write("field_of_the_future: 1\n")
    arguments = {
        "resume": ["train", "--resume", run],
        "config": ["config", "--resume", run],
        "view": ["view", run, "--export", tmp_path / "page.html"],
        "eval": ["eval", "--model", run, "--out", tmp_path / "out"],
        "sample": ["sample", "--model", run],
        "train": ["train", "--model", run, *SETTINGS, "--out", tmp_path / "out"],
    }[command]
    before = _files(tmp_path)
    assert main([*map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert f"{run} has format {FORMAT + 1}, this ibtpo (" in message
    assert f"reads up to {FORMAT}; update it to 9.8.7, which wrote the folder, or later" in message
    assert _files(tmp_path) == before


@pytest.mark.parametrize("command", ["resume", "eval", "eval of it"])
def test_a_newer_checkpoint_is_refused_not_set_aside(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = last_checkpoint(run)
    _number(last)
    sums = json.loads((last / "checksums.json").read_text())
    del sums[FORMAT_FILE]
    (last / "checksums.json").write_text(json.dumps(sums))
    model = run if command == "eval" else last
    arguments = ["train", "--resume", run] if command == "resume" else ["eval", "--model", model]
    assert main([*map(str, arguments)]) == 2
    assert f"{last} has format {FORMAT + 1}" in capsys.readouterr().err
    assert last.is_dir()


def test_a_run_without_a_number_is_read_and_gets_one(run: Path, trained: Path, tmp_path: Path) -> None:
    """As folders were before there were numbers."""
    for path in run.rglob(FORMAT_FILE):
        path.unlink()
    for checkpoint in checkpoints(run):
        sums = json.loads((checkpoint.path / "checksums.json").read_text())
        (checkpoint.path / "checksums.json").write_text(json.dumps({n: s for n, s in sums.items() if n != FORMAT_FILE}))
    assert main(["view", str(run), "--export", str(tmp_path / "page.html")]) == 0
    assert main(["eval", "--model", str(run), "--limit", "1", "--samples", "1"]) == 0
    shutil.rmtree(last_checkpoint(run))
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_end(run, trained)
    assert json.loads((run / FORMAT_FILE).read_text())["format"] == FORMAT


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "new"}', '{"format": null}', "\udcff"])
def test_a_number_that_cannot_be_read_is_no_number(content: str, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", TrainConfig()):
        pass
    (tmp_path / "run" / FORMAT_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunFolderError, match=r"ibtpo\.json holds no format number; restore it from a copy"):
        check_run(tmp_path / "run", "resume")


def test_a_run_killed_before_it_had_a_configuration_leaves_a_free_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _number(tmp_path / "run", FORMAT)
    RunFolder.create(tmp_path / "run", TrainConfig()).close()


# ---- a run as --model --------------------------------------------------------------------------------------------


def test_the_newest_intact_checkpoint_of_a_run_is_taken(run: Path) -> None:
    *_, before, last = checkpoints(run)
    said: list[str] = []
    assert weights_of(run, said.append) == last.path
    _damage(last.path)
    said.clear()
    assert weights_of(run, said.append) == before.path
    assert "is damaged (model.safetensors has" in said[0] and str(last.path) in said[0]
    assert last.path.is_dir()  # the run may be under way: what is only read is not moved
    assert weights_of(before.path, said.append) == before.path


@pytest.mark.parametrize("command", ["eval", "sample", "train"])
def test_a_damaged_checkpoint_is_refused_by_its_own_path_too(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of right size and format, with numbers that are not those of the training."""
    last = last_checkpoint(run)
    content = bytearray((last / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "model.safetensors").write_bytes(content)
    rest = ["--data", load_yaml(run / "config.yaml")["data"], *SETTINGS] if command == "train" else []
    out = [] if command == "sample" else ["--out", str(tmp_path / "out")]
    assert main([command, "--model", str(last), *rest, *out]) == 2
    message = capsys.readouterr().err
    assert f"model: {last} is damaged (model.safetensors is not what was written); restore it from a copy" in message
    (last / "checksums.json").unlink()  # changed on purpose
    assert weights_of(last, print) == last


def test_what_is_no_checkpoint_says_which_path_to_give(run: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(RunFolderError, match=message):
            weights_of(path, print)

    refused(run / "checkpoints", f"give one of them, or {run} for the newest")
    for checkpoint in checkpoints(run):
        _damage(checkpoint.path)
    refused(run, "every checkpoint of .*run is damaged")
    shutil.rmtree(run / "checkpoints")
    refused(run, f"has no checkpoint yet; wait for one, or continue the run: ibtpo train --resume {run}")


def test_a_run_begins_with_the_newest_intact_checkpoint_of_another(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named in its configuration, so that it stays the KL reference when the other run goes on."""
    *_, before, last = checkpoints(run)
    _damage(last.path)
    rest = ["--data", load_yaml(run / "config.yaml")["data"], *SETTINGS, "--loss.kl-coef", 0.1]
    assert main(["train", *map(str, ["--model", run, *rest, "--out", tmp_path / "a"])]) == 0
    printed = capsys.readouterr().out
    assert f"model: {before.path}, the newest checkpoint of the run" in printed and f"{last.path} is damaged" in printed
    needed = f"the run needs {before.path} as the reference policy until it ends"
    assert needed in printed
    assert load_yaml(tmp_path / "a" / "config.yaml")["model"] == str(before.path)
    assert main(["train", *map(str, ["--model", before.path, *rest, "--out", tmp_path / "b"])]) == 0
    assert needed in capsys.readouterr().out
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_an_evaluation_takes_the_newest_intact_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, before, last = checkpoints(run)
    _damage(last.path)
    flags = ["--limit", "2", "--samples", "1", "--out", str(tmp_path / "out")]
    assert main(["eval", "--model", str(run), *flags]) == 0
    assert f"model: {before.path}, the newest" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["model"] == str(before.path)


def test_an_evaluation_carries_the_number_and_a_newer_one_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    evaluate = ["eval", "--model", str(run), "--limit", "2", "--samples", "1", "--out", str(out)]
    assert main(evaluate) == 0
    assert json.loads((out / FORMAT_FILE).read_text())["format"] == FORMAT
    (out / FORMAT_FILE).write_text(json.dumps({"format": FORMAT + 1, "version": "9.0"}))
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(evaluate) == 2
    assert f"has format {FORMAT + 1}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / FORMAT_FILE).unlink()  # an evaluation from before there was a number
    assert main(evaluate) == 0
