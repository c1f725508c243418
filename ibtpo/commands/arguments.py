"""Settings from a command's arguments: flags override --config, --preset and the settings of a run or task, in turn."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, load_yaml
from ibtpo.list_flags import join_repeated
from ibtpo.presets import PRESETS
from ibtpo.run_format import CONFIG, is_run

Arguments = TypeVar("Arguments")
Flat = tyro.conf.arg(name="")  # the fields of the run are flags without a prefix
Preset = Annotated[
    str,
    tyro.conf.arg(
        help=f"Method: {', '.join(PRESETS)}; `ibtpo presets` explains them. --config and flags override its settings."
    ),
]
_NO_FILTER = {"max_prompt_tokens": None, "pass_rate_field": None, "min_pass_rate": 0.0, "max_pass_rate": 1.0}


def parse(kind: type[Arguments], default: Arguments, program: str, arguments: list[str]) -> Arguments:
    """Parse the flags of a command; exits if they are invalid, or to print its help."""
    return tyro.cli(kind, default=default, prog=program, args=join_repeated(arguments), use_underscores=False)


def parse_alone(kind: type[Arguments], program: str, arguments: list[str]) -> Arguments:
    """Parse the flags of a command without settings of a run."""
    return tyro.cli(kind, prog=program, args=arguments, use_underscores=False)


def base_of_training(arguments: list[str]) -> TrainConfig:
    """The configuration before flags: that of the run to --resume, of --config, --preset and the task."""
    early = _early(arguments)
    return _base(early, run=early.resume)


def base_of_model(arguments: list[str]) -> TrainConfig:
    """The configuration before flags; if --model is a run or a run's checkpoint, the run's."""
    early = _early(arguments)
    model, data = _named(early, "model"), _named(early, "data")
    folders = [] if model is None else [model, model.absolute().parent.parent]
    run = next(filter(is_run, folders), None)
    instead = None if run is None else instead_of_training(run, data, whole=early.whole)
    return _base(early, run=run, instead=instead)


def instead_of_training(run: Path, data: Path | None, *, whole: bool) -> dict[str, Any]:
    """Settings, nested like YAML, that replace the run's folder and its choice of training rows.

    For a file other than the run's the layout is detected, prompts are held out of the file itself, not taken from the
    run's `jsonl.eval_data`, and with `whole` no row is filtered out.

    Args:
        data: the file to evaluate on; None for the run's own.
    """
    own = load_yaml(run / CONFIG).get("data")
    other = data is not None and (own is None or data.resolve() != Path(own).resolve())
    rows = ({"eval_data": None} if other else {}) | (_NO_FILTER if whole else {})
    return {"out": None} | ({"layout": "auto"} if other else {}) | ({"jsonl": rows} if rows else {})


def with_data(config: TrainConfig) -> TrainConfig:
    """Set the task to jsonl if --data is given."""
    return replace(config, task="jsonl") if config.data is not None else config


def _early(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags that decide the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default=None)
    parser.add_argument("--task", default=None)
    for name in ("--config", "--resume", "--data", "--model"):
        parser.add_argument(name, type=Path, default=None)
    parser.add_argument("--whole", action="store_true")
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # a flag without its value: the full parser reports it
        return parser.parse_known_args([])[0]


def _named(early: argparse.Namespace, field: str) -> Path | None:
    """The path given for a field by a flag or else by the file of --config; None if neither gives one."""
    given = getattr(early, field)
    if given is None and early.config is not None:
        given = load_yaml(early.config).get(field)
    return Path(given) if isinstance(given, str | Path) else None


def _base(early: argparse.Namespace, *, run: Path | None, instead: Mapping[str, Any] | None = None) -> TrainConfig:
    task = early.task or ("jsonl" if early.data is not None else None)
    return base_config(task=task, preset=early.preset, file=early.config, run=run, instead=instead)
