"""The configuration: defaults, YAML, presets, the command line; what is wrong is named."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from rich.console import Console

from ibtpo.cli import main
from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, load_yaml, merge
from ibtpo.presets import PRESETS
from ibtpo.run_format import CONFIG
from ibtpo.runlog import RunFolder
from ibtpo.setup import default_folder

Field = tuple[tuple[str, ...], Any, Any]
OTHER_VALUES = {
    "jsonl.template": "Q: {prompt}",
    "jsonl.chat_template_options": ("enable_thinking=false", "date=today"),
    "device": "cpu",
    "log": "wandb",
    "task": "reasoning-gym:chain_sum",
    "search.separator": "###",
    "search.method": "random-tree",
}


def _fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[Field]:
    """(path, type, default) of every leaf of the tree of dataclasses."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _fields(value, (*path, field.name))
        else:
            yield (*path, field.name), hints[field.name], value


def _other_value(path: tuple[str, ...], hint: Any, default: Any) -> Any:
    """An allowed value of the field that is not its default."""
    if ".".join(path) in OTHER_VALUES:
        return OTHER_VALUES[".".join(path)]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    wanted = next(option for option in options if option is not type(None))
    if get_origin(wanted) is Literal:
        return next(value for value in get_args(wanted) if value != default)
    if get_origin(wanted) is tuple:
        return ("exact", "format:0.5")
    if wanted is bool:
        return not default
    if wanted is int:
        return 7 if default is None else default + 1
    if wanted is float:
        return default / 2 if default else 0.25
    return Path("somewhere") if wanted is Path else f"{default}-other"


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def _get(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


FIELDS = list(_fields(TrainConfig()))
GROUPS = ("search", "advantage", "loss", "ib")  # what belongs to a method


def _parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> TrainConfig:
    """What `ibtpo train ARGUMENTS` would run."""
    seen: list[TrainConfig] = []

    def stop(config: TrainConfig, console: Console, **how: object) -> Path:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("ibtpo.train.train", stop)
    assert main(["train", *arguments]) == 130
    return seen[0]


def test_defaults_are_those_of_the_paper_and_of_our_readings() -> None:
    """Paper, sections 3 to 5, and the table of what it leaves open."""
    config = TrainConfig()
    assert (config.search.initial_branches, config.search.rounds) == (4, 9)
    assert (config.search.nodes_per_round, config.search.branches_per_node) == (1, 1)
    assert config.search.trajectories == 12
    assert config.ib.beta == 5.0
    assert config.advantage.ib_weight == 0.1
    assert config.loss.kl_coef == 0.001
    assert config.optim.lr == 1e-6
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.top_k) == (0.7, 0.95, 0)
    assert config.sampling.max_tokens == 2048
    assert config.ib.step_probability == "geometric"
    assert config.ib.zero_parent == "one"
    assert config.ib.value == "leaf_mean"
    assert config.ib.duplicates == "separate"
    assert config.advantage.uniform_groups == "skip"
    assert config.advantage.pi_ref == "sampling"
    assert config.advantage.std == "population"
    assert config.advantage.std_eps == 1e-6
    assert config.loss.prefix_weight == "trajectory"
    assert config.loss.aggregation == "token"
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    assert config.search.separator == "\n\n"
    assert config.search.step_tokens is None
    assert config.search.branch_at_root is True
    assert config.search.method == "ibtree"
    assert config.advantage.kind == "ib-tpo"


def test_every_field_can_be_set_in_yaml(tmp_path: Path) -> None:
    for path, hint, default in FIELDS:
        value = _other_value(path, hint, default)
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(_nested(path, str(value) if isinstance(value, Path) else value)))
        changed = merge(TrainConfig(), load_yaml(file), source=str(file))
        assert _get(changed, path) == value, path
        assert type(_get(changed, path)) is type(value), path
        undone = merge(changed, _nested(path, str(default) if isinstance(default, Path) else default), source="")
        assert undone == TrainConfig(), path


def test_every_field_can_be_set_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and each arrives at its own place."""
    values = {path: _other_value(path, hint, default) for path, hint, default in FIELDS}
    del values[("resume",)]  # takes the configuration of the run it names
    values[("task",)] = "jsonl"  # what --data implies
    arguments = []
    for path, value in values.items():
        flag = ".".join(path).replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{'.'.join([*path[:-1], '' if value else 'no-'])}{path[-1]}".replace("_", "-"))
        else:
            arguments += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    config = _parsed(monkeypatch, *arguments)
    for path, value in values.items():
        assert _get(config, path) == value, path
    assert len(values) == len(FIELDS) - 1 > 60


def test_flags_win_over_the_file_over_the_preset_over_the_task_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 5e-5, beta2: 0.9}\nsearch: {group_size: 3}\nadvantage: {ib_weight: 0.3}\n")
    config = _parsed(monkeypatch, "--preset", "grpo", "--config", str(file), "--optim.lr", "7e-5")
    assert config.optim.lr == 7e-5
    assert config.optim.beta2 == 0.9
    assert (config.search.method, config.advantage.kind, config.search.group_size) == ("independent", "grpo", 3)
    assert config.advantage.ib_weight == 0.3
    assert config.sampling.temperature == 1.0  # the built-in task's own
    assert config.search.separator == "\n"


def test_data_means_the_jsonl_task_with_the_papers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _parsed(monkeypatch, "--data", "rows.jsonl", "--model", "somewhere")
    assert config.task == "jsonl"
    assert config == replace(TrainConfig(), data=Path("rows.jsonl"), model="somewhere", task="jsonl")


def test_data_in_the_file_means_the_jsonl_task_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: rows.jsonl\nmodel: somewhere\n")
    config = _parsed(monkeypatch, "--config", str(file))
    assert (config.task, config.search.separator, config.optim.lr) == ("jsonl", "\n\n", 1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_differ_from_the_default_in_method_alone(name: str) -> None:
    config = base_config(task="jsonl", preset=name, file=None, run=None)
    named = (PRESETS[name]["search"]["method"], PRESETS[name]["advantage"]["kind"])
    assert (config.search.method, config.advantage.kind) == named
    for path, _, default in FIELDS:
        named = PRESETS[name].get(path[0], {})
        if path[-1] not in named and path != ("task",):
            assert _get(config, path) == default, path
    assert [(group, field) for group, fields in PRESETS[name].items() for field in fields if group not in GROUPS] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serch": {"rounds": 3}}, r"f\.yaml: unknown field serch\. Did you mean search\?"),
        ({"search": {"round": 3}}, r"f\.yaml: unknown field search\.round\. Did you mean search\.rounds\?"),
        ({"optim": {"xyzzy": 3}}, r"unknown field optim\.xyzzy\. Known: lr, beta1"),
        ({"search": 3}, r"f\.yaml: search must hold fields and values"),
        ({"search": None}, r"f\.yaml: search must hold fields and values"),
        ({"seed": "many"}, r"f\.yaml: seed: 'many' is not of type int"),
        ({"seed": 1.5}, r"seed: 1\.5 is not of type int"),
        ({"seed": True}, r"seed: True is not of type int"),
        ({"seed": None}, r"seed: None is not of type int"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr: 'fast' is not of type float"),
        ({"optim": {"lr": [1e-6]}}, r"optim\.lr: \[1e-06\] is not of type float"),
        ({"optim": {"lr": True}}, r"optim\.lr: True is not of type float"),
        ({"search": {"branch_at_root": 1}}, r"search\.branch_at_root: 1 is not of type bool"),
        ({"search": {"method": "mcts"}}, r"search\.method: 'mcts' is not one of 'ibtree', 'independent'"),
        ({"dtype": "float16"}, r"dtype: 'float16' is not one of 'float32', 'bfloat16'"),
        ({"data": 3}, r"data: 3 is not of type Path"),
        ({"model": 3}, r"model: 3 is not of type str"),
    ],
)
def test_unknown_fields_and_wrong_types_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(TrainConfig(), changes, source="f.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ib": {"beta": 0}}, r"ib\.beta: 0\.0 lies outside \(0\.0, inf\)"),
        ({"search": {"rounds": 0}}, r"search\.rounds: 0 lies outside \[1, inf\)"),
        ({"search": {"initial_branches": 0}}, r"search\.initial_branches: 0 lies outside \[1, inf\)"),
        ({"search": {"nodes_per_round": 0}}, r"search\.nodes_per_round: 0 lies outside \[1, inf\)"),
        ({"search": {"branches_per_node": -1}}, r"search\.branches_per_node: -1 lies outside \[1, inf\)"),
        ({"search": {"step_tokens": 0}}, r"search\.step_tokens: 0 lies outside \[1, inf\)"),
        ({"search": {"separator": ""}}, r"search\.separator: \"\" has no character"),
        ({"search": {"separator": r"\n"}}, r"a backslash and the letter n, not a newline; write \$'\\n' in the shell"),
        ({"advantage": {"ib_weight": -0.1}}, r"advantage\.ib_weight: -0\.1 lies outside \[0\.0, inf\)"),
        ({"loss": {"clip_low": 1.5}}, r"loss\.clip_low: 1\.5 lies outside \[0\.0, 1\.0\]"),
        ({"loss": {"kl_coef": float("nan")}}, r"loss\.kl_coef: nan lies outside"),
        ({"optim": {"lr": 0}}, r"optim\.lr: 0\.0 lies outside \(0\.0, inf\)"),
        ({"optim": {"beta2": 1}}, r"optim\.beta2: 1\.0 lies outside \[0\.0, 1\.0\)"),
        ({"sampling": {"top_p": 0}}, r"sampling\.top_p: 0\.0 lies outside \(0\.0, 1\.0\]"),
        ({"sampling": {"min_p": 2}}, r"sampling\.min_p: 2\.0 lies outside \[0\.0, 1\.0\]"),
        ({"sampling": {"temperature": -1}}, r"sampling\.temperature: -1\.0 lies outside \[0\.0, inf\)"),
        ({"sampling": {"max_tokens": 0}}, r"sampling\.max_tokens: 0 lies outside \[1, inf\)"),
        ({"engine": {"kv_tokens": 15}}, r"engine\.kv_tokens: 15 lies outside \[16, inf\)"),
        ({"eval": {"prompts": 0}}, r"eval\.prompts: 0 lies outside \[1, inf\)"),
        ({"jsonl": {"eval_fraction": 2}}, r"jsonl\.eval_fraction: 2\.0 lies outside \[0\.0, 1\.0\]"),
        ({"digits": {"min_ops": 5, "max_ops": 4}}, r"digits\.max_ops: 4 lies outside \[5, inf\)"),
        ({"warm_start": {"max_updates": 0}}, r"warm_start\.max_updates: 0 lies outside \[1, inf\)"),
        ({"sampled_tokens": 0}, r"sampled_tokens: 0 lies outside \[1, inf\)"),
        ({"prompts_per_step": 2, "mini_batches": 3}, r"mini_batches: 3 lies outside \[1, 2\]"),
    ],
)
def test_values_out_of_range_name_field_value_and_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(TrainConfig(), changes, source="f.yaml")


def test_a_choice_made_in_code_is_checked_against_the_type_of_its_field() -> None:
    config, checked = TrainConfig(), 0
    for section in [config, *(value for name in vars(config) if is_dataclass(value := getattr(config, name)))]:
        for name, hint in get_type_hints(type(section)).items():
            if get_origin(hint) is Literal:
                with pytest.raises(ValueError, match=rf"(^|\.){name}: 'other' is not one of '{get_args(hint)[0]}', "):
                    replace(section, **{name: "other"})
                checked += 1
    assert checked > 20


def test_numbers_may_be_written_the_way_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('sampled_tokens: 100_000\noptim: {lr: 1e-6, weight_decay: 0}\nsearch: {separator: "\\n"}\n')
    config = merge(TrainConfig(), load_yaml(file), source=str(file))
    assert config.sampled_tokens == 100_000
    assert config.optim.lr == 1e-6
    assert type(config.optim.weight_decay) is float
    assert config.search.separator == "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such configuration file"),
        (b"a: [1,", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"- 1\n- 2\n", "must hold fields and values"),
        (b"just words", "must hold fields and values"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        base_config(task=None, preset="ib-tpo", file=file, run=None)
    assert str(file) in str(error.value)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="directory") as error:
        load_yaml(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\n")
    assert load_yaml(file) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_default_folder_is_named_after_the_preset(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "now")
    config = base_config(task=None, preset=preset, file=None, run=None)
    assert default_folder(config) == Path(f"runs/digit-chain-{preset}-now")
    search, advantage = replace(config.search, method="independent"), replace(config.advantage, kind="treerl")
    assert default_folder(replace(config, search=search, advantage=advantage)) == Path("runs/digit-chain-treerl-now")


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"is not one of ib-tpo, ib-tpo\+, grpo, .*\. Did you mean grpo\?"):
        base_config(task=None, preset="grop", file=None, run=None)


def test_the_configuration_of_a_run_folder_reads_back_equal(tmp_path: Path) -> None:
    """With every field set to another value than its default, paths and newlines included."""
    changed = TrainConfig()
    for path, hint, default in FIELDS:
        value = "\n \t#: 'x'" if path == ("search", "separator") else _other_value(path, hint, default)
        changed = merge(changed, _nested(path, str(value) if isinstance(value, Path) else value), source="")
    for number, config in enumerate((TrainConfig(), changed)):
        folder = tmp_path / str(number)
        RunFolder.create(folder, config).close()
        assert merge(TrainConfig(), load_yaml(folder / CONFIG), source="") == config
        assert base_config(task=None, preset=None, file=None, run=folder) == config
    assert all(a != b for a, b in zip(_leaves(asdict(changed)), _leaves(asdict(TrainConfig())), strict=True))


def _leaves(tree: dict[str, Any]) -> list[Any]:
    return [leaf for v in tree.values() for leaf in (_leaves(v) if isinstance(v, dict) else [v])]
