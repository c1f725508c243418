"""Checkpoints of a run: written under a temporary name, flushed, renamed; verified before they are loaded.

::

    checkpoints/step-000010/          complete: renamed after all else
        ibtpo.json                    its format, see ibtpo/run_format.py
        checksums.json                size and SHA-256 of every other file, except
        README.md                     the model card, which later evaluations rewrite
        ...                           the trainer's files
    checkpoints/.step-000020.tmp/     being written, or being removed
    checkpoints/damaged-000020/       complete, but failed its checksums; set aside by a resume

The newest complete checkpoint is kept until the next one has its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibtpo.disk import RunFolderError, flush, flush_tree, no_space, remove, retire, unfinished, write_atomically
from ibtpo.printable import one_line
from ibtpo.run_format import check_format, is_run, write_format

CHECKPOINTS, CHECKSUMS = "checkpoints", "checksums.json"
_NAME, _ASIDE = "step-", "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path


def checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run folder, oldest first; their contents are not checked."""
    found = (run / CHECKPOINTS).glob(f"{_NAME}*")
    numbered = [(path.name.removeprefix(_NAME), path) for path in found if path.is_dir()]
    return sorted((Checkpoint(int(n), path) for n, path in numbered if n.isdecimal()), key=lambda c: c.step)


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The last complete checkpoint of a run folder, or None; its contents are not checked."""
    found = checkpoints(run)
    return found[-1] if found else None


def write_checkpoint(run: Path, step: int, write: Callable[[Path], object], *, keep: int) -> Path:
    """Save a checkpoint and delete all but the `keep` newest. An existing checkpoint of this step is not rewritten.

    Args:
        write: called with an empty folder to fill.

    Raises:
        RunFolderError: the disk is full; the partial checkpoint is removed, older ones are kept.
    """
    folder = run / CHECKPOINTS
    final = folder / f"{_NAME}{step:06d}"
    if not final.exists():
        last = latest_checkpoint(run)
        with no_space(run, "no checkpoint was there before" if last is None else f"{last.path}"):
            _write(final, write)
    for old in checkpoints(run)[:-keep]:
        if old.path != final:
            retire(old.path)
    return final


def _write(final: Path, write: Callable[[Path], object]) -> None:
    temporary = unfinished(final)
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        write_format(temporary)
        sums = {str(path.relative_to(temporary)): _sum(path) for path in _files(temporary)}
        write_atomically(temporary / CHECKSUMS, json.dumps(sums, indent=1))
        flush_tree(temporary)
        temporary.rename(final)
        flush(final.parent)
    except BaseException:
        remove(temporary)
        raise


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def _sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(checkpoint: Checkpoint) -> str | None:
    """The fault in a checkpoint's files, in a few words; None if all match their checksums."""
    try:
        sums = json.loads((checkpoint.path / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            path = checkpoint.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sum(path) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} or a file it names cannot be read ({one_line(error)})"
    return None


def intact_checkpoint(run: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest intact checkpoint, or None if the run has no checkpoints.

    Newer, damaged ones are set aside as damaged-NNNNNN.

    Args:
        say: called with a message about each damaged one.

    Raises:
        RunFolderError: every checkpoint is damaged, or the newest has a newer format.
    """
    faults: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(checkpoints(run)):
        fault = damage(checkpoint)
        if fault is None:
            check_format(checkpoint.path)
            for damaged, why in faults:
                say(f"{damaged.path} is damaged ({why}); set aside as {_set_aside(damaged).name}")
            return checkpoint
        faults.append((checkpoint, fault))
    if not faults:
        return None
    listed = "; ".join(f"{checkpoint.path}: {why}" for checkpoint, why in faults)
    raise RunFolderError(
        f"resume: every checkpoint is damaged ({listed}); restore one from a copy, or begin a new run with --out"
    )


def weights_of(model: Path, say: Callable[[str], object]) -> Path:
    """The folder of weights that `--model` names: `model` itself or, of a run folder, its newest intact checkpoint.

    The run folder is read without locking it, since the run may be in progress.

    Args:
        model: a checkpoint folder, or the folder of a run.
        say: called with messages: which checkpoint of a run was taken, and which are damaged.

    Raises:
        RunFolderError: the run has no intact checkpoint; the checkpoint is damaged or has a newer format; or the path
            is a run's folder of checkpoints, and not one of them.
    """
    if model.name == CHECKPOINTS and is_run(model.parent):
        raise RunFolderError(
            f"model: {model} holds the checkpoints of a run; give one of them, or {model.parent} for the newest"
        )
    check_format(model)
    found = checkpoints(model)
    if not found and is_run(model):
        raise RunFolderError(
            f"model: {model} is a run folder that has no checkpoint yet; wait for one, or continue the run: "
            f"ibtpo train --resume {model}"
        )
    for checkpoint in reversed(found):
        fault = damage(checkpoint)
        if fault is None:
            check_format(checkpoint.path)
            say(f"model: {checkpoint.path}, the newest checkpoint of the run")
            return checkpoint.path
        say(f"{checkpoint.path} is damaged ({fault}) and is not used")
    if found:
        raise RunFolderError(f"model: every checkpoint of {model} is damaged; restore one from a copy")
    if (model / CHECKSUMS).is_file() and (fault := damage(Checkpoint(0, model))):
        raise RunFolderError(
            f"model: {model} is damaged ({fault}); restore it from a copy, use another checkpoint or, if it was "
            f"changed on purpose, remove its {CHECKSUMS}"
        )
    return model


def _set_aside(checkpoint: Checkpoint) -> Path:
    aside = checkpoint.path.with_name(f"{_ASIDE}{checkpoint.path.name.removeprefix(_NAME)}")
    remove(aside)
    return checkpoint.path.rename(aside)
