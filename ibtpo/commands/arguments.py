"""Settings from a command's arguments: flags override --config, --preset and the settings of a run or task, in turn."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, load_yaml
from ibtpo.list_flags import join_repeated
from ibtpo.presets import PRESETS
from ibtpo.run_format import CONFIG, is_run
from ibtpo.validation import as_path

Arguments = TypeVar("Arguments")
Flat = tyro.conf.arg(name="")  # the fields of the run are flags without a prefix
Preset = Annotated[
    str,
    tyro.conf.arg(
        help=f"Method: {', '.join(PRESETS)}; `ibtpo presets` explains them. --config and flags override its settings."
    ),
]
_NO_FILTER = {"max_prompt_tokens": None, "pass_rate_field": None, "min_pass_rate": 0.0, "max_pass_rate": 1.0}


_TRAINING = (
    *("resume", "distributed", "distributed_timeout", "sampled_tokens", "prompts_per_step", "mini_batches"),
    *("micro_batch_tokens", "gradient_checkpointing", "checkpoint_every", "trees_per_step", "trees_megabytes"),
    *("report_trees", "log", "advantage", "loss", "optim", "lora", "warm_start", "safeguards"),
)
_HIDDEN: Any = Annotated[Arguments, tyro.conf.Suppress, tyro.conf.Fixed]  # from help, and from completion
UNUSED_BY_EVAL = (*_TRAINING, "ib")
UNUSED_BY_SAMPLE = (*_TRAINING, "out", "eval")


def without(config: TrainConfig, names: Sequence[str]) -> TrainConfig:
    """The same configuration, of a type that has no flags for the fields in `names`."""
    values = {own.name: getattr(config, own.name) for own in fields(TrainConfig)}
    hints: Any = get_type_hints(TrainConfig)
    hidden: list[Any] = [(name, _HIDDEN[hints[name]], field(default=values[name])) for name in names]
    kind = make_dataclass(TrainConfig.__name__, hidden, bases=(TrainConfig,), frozen=True, kw_only=True)
    same: TrainConfig = kind(**values)
    return same


def check_used(program: str, unused: Sequence[str], arguments: list[str]) -> None:
    """Raise ValueError if a flag is of a field in `unused`."""
    for word in arguments:
        flag = word.partition("=")[0]
        name = flag.partition(".")[0].replace("-", "_").removeprefix("__").removeprefix("no_")
        if flag.startswith("--") and name in unused:
            remedy = "name the run with --model" if name == "resume" else "leave it out"
            raise ValueError(f"{flag}: `{program}` does not use it; {remedy}")


def parse(kind: type[Arguments], default: Arguments, program: str, arguments: list[str]) -> Arguments:
    """Parse the flags of a command; exits if they are invalid, or to print its help."""
    return _parse(kind, default, program, join_repeated(arguments))


def parse_alone(kind: type[Arguments], program: str, arguments: list[str]) -> Arguments:
    """Parse the flags of a command without settings of a run."""
    return _parse(kind, tyro.constructors.MISSING_NONPROP, program, arguments)


def _parse(kind: type[Arguments], default: Any, program: str, arguments: list[str]) -> Arguments:
    parsed: Arguments = tyro.cli(
        kind,
        default=default,
        prog=program,
        args=arguments,
        description=_wrapped(inspect.getdoc(kind) or ""),
        use_underscores=False,
        registry=_REGISTRY,
    )
    return parsed


def _wrapped(text: str) -> str:
    """Paragraphs as wide as the terminal; tyro does not wrap them, and keeps only breaks before an indented line."""
    width = shutil.get_terminal_size().columns
    return "\n\n".join(textwrap.fill(part, width, subsequent_indent="  ") for part in text.split("\n\n"))


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _text(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """Texts, whose defaults help prints with a newline as "\\n"."""
    if info.type is not str:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda text: [text.replace("\n", "\\n")],
    )


@_REGISTRY.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Path | None] | None:
    """Paths that may not be empty, and perhaps None."""
    is_optional = info.type == Path | None
    if not is_optional and info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH" if is_optional else "PATH",
        instance_from_str=lambda words: None if is_optional and words[0] == "None" else as_path(words[0]),
        is_instance=lambda value: isinstance(value, Path) or (is_optional and value is None),
        str_from_instance=lambda path: [str(path)],
    )


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
        parser.add_argument(name, type=as_path, default=None)
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
