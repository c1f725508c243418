"""What a resumed run may change, and what it may not.

A run is the same run as long as its policy, its problems and its beginning are the same. How it goes on from there -
budget, search, loss, rates, limits, hardware - may change; a run so changed is no longer that of its first
configuration, so each change is named.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ibtpo.config import TrainConfig
from ibtpo.config_io import load_yaml, merge
from ibtpo.disk import RunFolderError

CONFIG = "config.yaml"
FIXED = {
    "model": "the checkpoint holds the weights, the KL reference is the model the run began with",
    "dtype": "weights and optimizer state are saved in it",
    "seed": "problems, samples and what is held out hang on it",
    "task": "the problems would be others",
    "data": "the problems would be others",
    "digits": "the problems would be others",
    "jsonl.prompt_field": "the problems would be others",
    "jsonl.answer_field": "the problems would be others",
    "jsonl.eval_fraction": "held-out problems would be trained on",
    "lora": "the adapters and their optimizer state have this shape",
    "warm_start": "it is over",
}
"""Fields, and sections, that a resumed run must leave alone, each with the reason."""


def announce_changes(run: Path, config: TrainConfig, console: Console) -> None:
    """Say which settings differ from those of the run folder `run`.

    Raises:
        RunFolderError: one of them may not change.
    """
    path = run / CONFIG
    if not path.is_file():
        raise RunFolderError(f"resume: {run} is not a run folder (it has no {CONFIG}); check the path")
    before = _flat(asdict(merge(TrainConfig(), load_yaml(path), source=str(path))))
    changes = {name: value for name, value in _flat(asdict(config)).items() if before[name] != value}
    for name, value in changes.items():
        reason = FIXED.get(name) or FIXED.get(name.partition(".")[0])
        if reason is not None:
            raise RunFolderError(
                f"resume: {name} cannot change from {before[name]} to {value}, {reason}; leave it out, or begin a new "
                "run with --out"
            )
    if changes:
        listed = ", ".join(f"{name} {before[name]} -> {value}" for name, value in changes.items())
        console.print(f"goes on with other settings: {listed}", highlight=False, markup=False, soft_wrap=True)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
