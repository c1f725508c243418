"""Configurations from YAML files, presets and the command line, checked field by field."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ibtpo.config import TrainConfig
from ibtpo.presets import PRESETS
from ibtpo.printable import one_line
from ibtpo.run_format import CONFIG, check_run
from ibtpo.validation import as_path

Config = TypeVar("Config")


def merge(config: Config, changes: Mapping[str, Any], *, source: str, prefix: str = "") -> Config:
    """`config` with the fields of `changes` (nested like YAML) replaced.

    Raises:
        ValueError: an unknown field (the nearest known one is suggested), a wrong type, or a value out of range.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"{source}: {prefix.rstrip('.') or 'the file'} must hold fields and values")
    hints = get_type_hints(type(config))
    known = {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
    replaced: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known: {', '.join(known)}."
            raise ValueError(f"{source}: unknown field {prefix}{name}.{hint}")
        if is_dataclass(known[name]):
            replaced[name] = merge(known[name], value, source=source, prefix=f"{prefix}{name}.")
        else:
            replaced[name] = _convert(value, hints[name], f"{source}: {prefix}{name}")
    try:
        return replace(config, **replaced)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type in a field's hint without None, and whether None is allowed."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None)), type(None) in options


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert `value` to the field's type; numbers may be strings, since YAML reads 1e-6 without a dot as one."""
    wanted, is_optional = without_none(hint)
    if value is None and is_optional:
        return None
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, get_args(wanted)))}")
    if get_origin(wanted) is tuple:  # of strings; a single one may be given without a list
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise ValueError(f"{where}: {value!r} is not a list of texts")
    if wanted is Path and isinstance(value, str):
        return as_path(value, where)
    try:
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if wanted is int and isinstance(value, str):
            return int(value)
    except (TypeError, ValueError):
        pass
    if type(value) is wanted:
        return value
    raise ValueError(f"{where}: {value!r} is not of type {wanted.__name__}")


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file cannot be read, or is not YAML or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such configuration file; check the path") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a YAML file that can") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({one_line(error)})") from None
    if content is None:  # an empty file
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold fields and values, like `sampled_tokens: 100_000`")
    return content


def plain(value: Any) -> Any:
    """Convert containers and paths to YAML and JSON types."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return values


def preset_of(config: TrainConfig) -> str | None:
    """The preset whose settings `config` has; of several the one with the most settings, such as dapo, not grpo."""
    settings = flat(asdict(config)).items()
    presets = {name: flat(changes) for name, changes in PRESETS.items() if flat(changes).items() <= settings}
    return max(presets, key=lambda name: len(presets[name]), default=None)


class _Dumper(yaml.SafeDumper):
    r"""Writes texts with a newline in quotes, on one line: "\n\n"."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Fields as YAML, in their order, one a line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def dump_yaml(config: TrainConfig) -> str:
    """A configuration as the text of a YAML file for `load_yaml` and `merge`."""
    return to_yaml(plain(asdict(config)))


def base_config(
    *,
    task: str | None,
    preset: str | None,
    file: Path | None,
    run: Path | None,
    instead: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration before the command line's own flags: defaults, task file, preset, then `file`.

    Args:
        task: the task if a flag names one; the built-in one has settings of its own. With a task that reads no data
            file, that of `file` or `run` is ignored.
        preset: a name of `PRESETS`; None is "ib-tpo".
        file: a YAML file, or None.
        run: a run folder whose configuration replaces defaults, task file and preset, or None.
        instead: settings that replace the run's, nested like YAML.

    Raises:
        ValueError: an unknown preset, a preset besides a run, an invalid file, or a run folder of a newer format.
    """
    changes = {} if file is None else load_yaml(file)
    if task not in (None, "jsonl"):  # a data file would change the task to jsonl
        changes = changes | {"data": None}
    elif changes.get("task", "jsonl") != "jsonl":
        changes = {"data": None} | changes
    if run is not None:
        check_run(run, "resume")
        if preset is not None:
            raise ValueError(
                f"preset: {preset} would be ignored, since {run} has its own settings; leave --preset out, and change "
                "single settings by their flags"
            )
        path = run / CONFIG
        config = merge(merge(TrainConfig(), load_yaml(path), source=str(path)), instead or {}, source=str(path))
        return merge(config, changes, source=str(file))
    preset = preset or "ib-tpo"
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}.{hint}")
    config = TrainConfig()
    task = task or ("jsonl" if changes.get("data") else changes.get("task", config.task))
    if task == config.task:
        shipped = resources.files("ibtpo.configs") / "digit-chain.yaml"
        config = merge(config, yaml.safe_load(shipped.read_text(encoding="utf-8")), source="digit-chain.yaml")
    config = merge(config, PRESETS[preset], source=f"preset {preset}")
    return merge(config, changes, source=str(file))
