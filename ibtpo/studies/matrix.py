"""A study as data: a YAML file of variants, seeds and tasks, expanded into cells, one process each.

::

    title: ...
    kind: train | samplers | bias      the work of a cell, see ibtpo/studies/measure.py
    baseline: grpo                     the variant with which the others are compared
    run: {...}                         settings of every cell, as in --config of `ibtpo train`
    tasks: {NAME: {...}, ...}          settings of each task; one nameless task if left out
    policies: [start, half]            kind samplers: policies to sample from; half: GRPO's after a third of the tokens
    variants:
      grpo: {}                         preset of the same name
      beta 1: {preset: ib-tpo, ib: {beta: 1}}

Variants share task, data, model and seeds, so they start from the same policies. A cell's folder is named after a hash
of everything that decides its result, including the contents of its files, so studies in the same folder share cells.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, load_yaml, merge
from ibtpo.presets import PRESETS
from ibtpo.studies.inputs import inputs
from ibtpo.validation import did_you_mean, suggest

Kind = Literal["train", "samplers", "bias"]
DEFAULTS: dict[str, Any] = {"sampled_tokens": 600_000, "eval": {"prompts": 192, "samples": 8, "every": 10}}
"""The budget unless the study or the user sets another."""
HALF_SHARE = 3  # the policy "half" is trained on the budget divided by this
_LONGEST_NAME = 80  # characters of the readable part of a folder's name; file systems allow 255 bytes
_OF_STUDY = {
    "seed": "is the study's to set; name seeds by --first-seed and --seeds",
    "out": "is the study's to set; name the folder of all cells by --out of `ibtpo study`",
    "resume": "is nothing a study takes; give the same command again, and it continues where it stopped",
}
_SHARED = dict.fromkeys(
    ("data", "task", "model"), "is shared by all variants, which are compared on it; put it into run, or into a task"
)
_FIELDS = ("title", "kind", "baseline", "run", "tasks", "policies", "variants")


@dataclass(frozen=True)
class Cell:
    """The work of one process."""

    kind: Literal["train", "samplers", "bias", "start"]
    variant: str
    task: str
    seed: int
    config: TrainConfig
    options: Mapping[str, Any]
    """Further arguments of `measure`: plain data."""
    policy: Cell | None = None
    """The cell whose policy this one starts from; None to start from `config.model`."""
    policy_name: str = ""

    @cached_property
    def id(self) -> str:
        """The folder's name: readable, and different for cells whose results may differ."""
        digest = hashlib.blake2b(json.dumps(self.spec(), sort_keys=True).encode(), digest_size=5).hexdigest()
        words = re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{self.kind}-{self.variant}").strip("-")[:_LONGEST_NAME]
        return f"{words}-seed{self.seed}-{digest}"

    def spec(self) -> dict[str, Any]:
        """Everything that decides the result, in JSON types."""
        config = json.loads(json.dumps(asdict(self.config), default=str))
        above = None if self.policy is None else self.policy.id
        spec = {"kind": self.kind, "config": config, "options": dict(self.options), "policy": above}
        read = inputs(self.config)
        return spec | {"inputs": read} if read else spec


@dataclass(frozen=True)
class Study:
    """The variants, tasks and settings of a comparison."""

    name: str
    title: str
    kind: Kind
    baseline: str
    variants: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    run: Mapping[str, Any]
    policies: Sequence[str]

    def cells(self, seeds: Sequence[int], *, prompts: int, changes: Mapping[str, Any]) -> list[Cell]:
        """Every cell of these seeds, without the cells of their starting policies.

        Args:
            prompts: kinds samplers and bias: prompts a variant, over all seeds.
            changes: settings that override the study's.

        Raises:
            ValueError: settings that do not exist or are out of range.
        """
        made = []
        for seed in seeds:
            for task, settings in self.tasks.items():
                for variant, own in self.variants.items():
                    made += self._of(variant, own, task, settings, seed, -(-prompts // len(seeds)), changes)
        return made

    def _of(
        self,
        variant: str,
        own: Mapping[str, Any],
        task: str,
        settings: Mapping[str, Any],
        seed: int,
        prompts: int,
        changes: Mapping[str, Any],
    ) -> list[Cell]:
        options = {name: settings[name] for name in ("facts", "depth") if name in settings}
        settings = {name: value for name, value in settings.items() if name not in options}
        layers = (DEFAULTS, self.run, settings, changes)
        config = _configure(own, str(own.get("preset", variant)), layers, f"study {self.name}: {variant}", seed)
        if self.kind == "bias":
            return [Cell("bias", variant, task, seed, config, options | {"prompts": prompts})]
        start = _start(layers, self.name, seed)
        if self.kind == "train":
            return [Cell("train", variant, task, seed, config, {}, start)]
        policies = {"start": start, "half": _half(layers, self.name, seed, start)}
        return [
            Cell("samplers", variant, task, seed, config, {"prompts": prompts}, policies[name], name)
            for name in self.policies
        ]


def shipped_studies() -> dict[str, Path]:
    """The studies shipped with the package, by name."""
    ours = sorted(path.name for path in files(__package__).iterdir() if _is_yaml(path.name))
    return {name.removesuffix(".yaml"): Path(str(files(__package__) / name)) for name in ours}


def load_study(name: str) -> Study:
    """A study that ships with the package, or one in a YAML file.

    Raises:
        ValueError: no such study, or its file cannot be used.
    """
    path = _file_of(name)
    raw = load_yaml(path)
    if unknown := sorted(raw.keys() - set(_FIELDS)):
        raise ValueError(f"{path}: unknown field {unknown[0]}; {suggest(unknown[0], _FIELDS)}")
    if raw.get("kind", "train") not in get_args(Kind):
        raise ValueError(f"{path}: kind {raw['kind']!r} is not one of {', '.join(get_args(Kind))}")
    variants, tasks = _named(raw, "variants", path), _named(raw, "tasks", path) or {"": {}}
    run = _settings(raw.get("run"), f"{path}: run")
    refuse_settings_of_study(run, f"{path}: run")
    for task, settings in tasks.items():
        refuse_settings_of_study(settings, f"{path}: tasks: {task}")
    for variant, own in variants.items():
        _refuse(own, _OF_STUDY | _SHARED, f"{path}: variants: {variant}")
    if raw.get("kind") == "bias":
        for task, settings in tasks.items():
            _check_table(settings, f"{path}: task {task or '(none given)'}")
    if not variants:
        raise ValueError(f"{path}: variants are missing; give names and settings, such as variants: {{grpo: {{}}}}")
    for variant, own in variants.items():
        preset, unnamed = str(own.get("preset", variant)), "preset" not in own
        if preset not in PRESETS:
            raise ValueError(
                f"{path}: variants: {variant}: preset {preset!r} does not exist; {did_you_mean(preset, PRESETS)}"
                f"presets: {', '.join(PRESETS)}" + "; set one by `preset: NAME` in the variant" * unnamed
            )
    baseline = str(raw.get("baseline", next(iter(variants))))
    if baseline not in variants:
        raise ValueError(f"{path}: baseline {baseline!r} is not a variant; {suggest(baseline, list(variants))}")
    policies = raw.get("policies") or ["start"]
    if not isinstance(policies, list) or not all(policy in ("start", "half") for policy in policies):
        raise ValueError(f"{path}: policies {policies!r} must be a list of start, half")
    return Study(
        name=path.stem,
        title=str(raw.get("title", path.stem)),
        kind=raw.get("kind", "train"),
        baseline=baseline,
        variants=variants,
        tasks=tasks,
        run=run,
        policies=policies,
    )


def _file_of(name: str) -> Path:
    if _is_yaml(name):
        return Path(name)
    shipped = shipped_studies()
    if name not in shipped:
        raise ValueError(f"study: {name!r} is not known; {suggest(name, list(shipped))}; or give a FILE.yaml")
    return shipped[name]


def refuse_settings_of_study(settings: Mapping[str, Any], where: str) -> None:
    """Raise if settings for all cells contain fields that only the study may set."""
    _refuse(settings, _OF_STUDY, where)


def _refuse(settings: Mapping[str, Any], remedies: Mapping[str, str], where: str) -> None:
    for name, remedy in remedies.items():
        if name in settings:
            raise ValueError(f"{where}: {name} {remedy}")


def _named(raw: Mapping[str, Any], field: str, path: Path) -> dict[str, dict[str, Any]]:
    """Settings by name, as in `variants` and `tasks`."""
    found = _settings(raw.get(field), f"{path}: {field}")
    return {str(name): _settings(own, f"{path}: {field}: {name}") for name, own in found.items()}


def _settings(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{where} must hold names and settings, not {value!r}")
    return value or {}


def _check_table(settings: Mapping[str, Any], where: str) -> None:
    """Raise unless a task of kind bias describes a `TablePolicy`."""
    facts, depth = settings.get("facts"), settings.get("depth")
    shares = isinstance(facts, list) and facts and all(isinstance(f, int | float) and 0 <= f <= 1 for f in facts)
    if not (shares and isinstance(depth, int) and depth >= 1):
        raise ValueError(
            f"{where}: kind bias needs facts, a list of numbers from 0 to 1, and depth, at least 1; "
            f"for example {{facts: [0.95, 0.7, 0.3], depth: 4}}"
        )


def with_policies(cells: Sequence[Cell]) -> list[Cell]:
    """The cells and those of their starting policies, each once and after the cell it depends on."""
    ordered: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.policy is not None:
            add(cell.policy)
        ordered.setdefault(cell.id, cell)

    for cell in sorted(cells, key=lambda cell: cell.policy is None):
        add(cell)
    return list(ordered.values())


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _configure(
    own: Mapping[str, Any], preset: str, layers: Sequence[Mapping[str, Any]], source: str, seed: int
) -> TrainConfig:
    task = next((layer["task"] for layer in reversed(layers) if "task" in layer), None)
    data = next((layer["data"] for layer in reversed(layers) if "data" in layer), None)
    config = base_config(task="jsonl" if data and task is None else task, preset=preset, file=None, run=None)
    for layer in layers[:-1]:
        config = merge(config, layer, source=source)
    config = merge(config, {name: value for name, value in own.items() if name != "preset"}, source=source)
    config = merge(config, layers[-1], source=source)
    if data:
        config = replace(config, task="jsonl")
    return replace(config, seed=seed, report_trees=0, out=None, resume=None)


def _start(layers: Sequence[Mapping[str, Any]], name: str, seed: int) -> Cell | None:
    """The warm start of a seed, the same for every variant; None if the policy comes from a folder."""
    config = _configure({}, "grpo", layers, f"study {name}", seed)
    if config.model != "built-in":
        return None
    known = TrainConfig()  # fields that a warm start does not depend on keep their defaults
    kept = ("seed", "task", "dtype", "digits", "warm_start", "sampling")
    config = replace(known, **{field: getattr(config, field) for field in kept})
    return Cell("start", "policy", "", seed, config, {})


def _half(layers: Sequence[Mapping[str, Any]], name: str, seed: int, start: Cell | None) -> Cell:
    config = _configure({}, "grpo", layers, f"study {name}", seed)
    return Cell(
        "train", "grpo", "", seed, replace(config, sampled_tokens=config.sampled_tokens // HALF_SHARE), {}, start
    )
