"""The presets that share GRPO's search: terms by hand, limits, a real step of each; and every open point."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from losses import policy_loss
from rich.console import Console
from test_loss import batch_of
from torch import Tensor
from trees import chain

from ibtpo.cli import main
from ibtpo.config import (
    AdvantageConfig,
    DigitChainConfig,
    IBConfig,
    LossConfig,
    SearchConfig,
)
from ibtpo.config_io import base_config, merge
from ibtpo.dynamic_sampling import grow_mixed
from ibtpo.grow import Grower
from ibtpo.loss import summarize
from ibtpo.pack import MicroBatch
from ibtpo.policy import built_in_policy
from ibtpo.presets import PRESET_NOTES, PRESETS
from ibtpo.runlog import METRICS, RunFolder, read_rows
from ibtpo.setup import make_engine
from ibtpo.studies.matrix import load_study
from ibtpo.tasks import DigitChain, Problem
from ibtpo.tasks.digit_chain import right_solution
from ibtpo.train import train
from ibtpo.trainer import Trainer
from ibtpo_engine import Sampling
from ibtpo_engine.tree import Tree

# ---- the entropy terms by hand -----------------------------------------------------------------------------------


def _two_rows() -> MicroBatch:
    """Three edges, the first two predicted by the same row: weights 1/2, 1/4, 1/4, advantages 2, -1, -3 times those."""
    batch = batch_of([1.0, 0.0, 0.0], [0.0, -0.25, -0.75], [0.5, 0.25, 0.25], [-1.0, -2.0, -3.0])
    return replace(batch, rows=torch.arange(2), edge_row=torch.tensor([0, 0, 1]))


def _loss(config: LossConfig) -> tuple[float, list[float], dict[str, float]]:
    """(loss, gradient by entropy, metrics) at ratio 1 and entropies 0.7 and 0.3."""
    batch = _two_rows()
    entropy = torch.tensor([0.7, 0.3], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(batch.old_logprob.clone(), entropy, batch, config)
    gradient = torch.autograd.grad(loss, entropy)[0].tolist() if loss.requires_grad else [0.0, 0.0]
    return loss.item(), gradient, summarize([metrics])


def test_an_entropy_bonus_is_the_weighted_mean_of_the_entropy():
    """Mean H = (1/2 + 1/4)*0.7 + 1/4*0.3 = 0.6; at ratio 1 the rest is -(1 - 0.25 - 0.75) = 0."""
    loss, gradient, metrics = _loss(LossConfig(kl_coef=0.0, entropy_coef=0.1))
    assert loss == pytest.approx(-0.1 * 0.6)
    assert gradient == pytest.approx([-0.1 * 0.75, -0.1 * 0.25])
    assert metrics["entropy"] == pytest.approx(0.6)
    assert "entropy_advantage" not in metrics


def test_ibro_raises_entropy_where_the_advantage_is_positive_and_lowers_it_where_not():
    """Sum of w*A by row: 1 - 0.25 = 0.75 and -0.75; their mean with H is 0.75*(0.7 - 0.3) = 0.3."""
    loss, gradient, metrics = _loss(LossConfig(kl_coef=0.0, entropy_advantage_coef=0.2))
    assert loss == pytest.approx(-0.2 * 0.3)
    assert gradient == pytest.approx([-0.2 * 0.75, +0.2 * 0.75])  # descent: up in the first row, down in the second
    assert metrics["entropy_advantage"] == pytest.approx(0.3)


def test_without_weights_no_gradient_reaches_the_entropy():
    loss, gradient, _ = _loss(LossConfig(kl_coef=0.0))
    assert (loss, gradient) == (0.0, [0.0, 0.0])


def test_clip_higher_lets_a_positive_advantage_pull_up_to_its_own_bound():
    """Ratio 1.25 lies outside 1.2 and inside 1.28; a negative advantage meets the lower bound, which is the same."""
    for high, gradient in ((0.2, 0.0), (0.28, -1.25)):
        batch = batch_of([1.0], [0.0], [1.0], [-1.0])
        logprob = (batch.old_logprob + math.log(1.25)).requires_grad_()
        loss, _ = policy_loss(logprob, torch.zeros(1), batch, LossConfig(kl_coef=0.0, clip_high=high))
        assert torch.autograd.grad(loss, logprob)[0].item() == pytest.approx(gradient)
    for high in (0.2, 0.28):
        batch = batch_of([0.0], [-1.0], [1.0], [-1.0])
        config = LossConfig(clip_high=high, kl_coef=0.0)
        loss, _ = policy_loss(batch.old_logprob + math.log(0.5), torch.zeros(1), batch, config)
        assert loss.item() == pytest.approx(0.8)


# ---- dynamic sampling --------------------------------------------------------------------------------------------


class _Script:
    """In place of a Grower: trees with two leaves of the rewards written for each key; remembers what was asked."""

    def __init__(self, mixed: Sequence[bool]) -> None:
        self.mixed = mixed
        self.asked: list[list[int]] = []

    def grow(self, problems: Sequence[Problem], keys: Sequence[int], *_: object) -> tuple[list[Tree], float]:
        assert [problem.prompt for problem in problems] == [str(key) for key in keys]
        self.asked.append(list(keys))
        return [self._tree(key) for key in keys], 0.5

    def _tree(self, key: int) -> Tree:
        tree = Tree([1], key=key)
        for reward in (0.0, float(self.mixed[key])):
            chain(tree.root, [([2], -1.0)], reward)
        return tree


def _draw(mixed: Sequence[bool], *, first: int = 0, count: int = 3, redraws: int) -> tuple[_Script, list[int], float]:
    script = _Script(mixed)
    trees, problems, seconds = grow_mixed(
        script,  # type: ignore[arg-type]
        lambda index: Problem(str(index), ""),
        lambda tree: iter(()),  # type: ignore[arg-type, return-value]
        Sampling(),
        first=first,
        count=count,
        redraws=redraws,
    )
    assert [problem.prompt for problem in problems] == [str(tree.key) for tree in trees]
    return script, [tree.key for tree in trees], seconds


def test_as_many_prompts_are_drawn_again_as_groups_were_lost():
    """Of 5, 6, 7 two are lost, of 8, 9 one, and 10 is mixed; all six come back in order, none twice."""
    mixed = [True] * 5 + [False, True, False, True, False, True, True]
    script, keys, seconds = _draw(mixed, first=5, redraws=9)
    assert script.asked == [[5, 6, 7], [8, 9], [10]]
    assert keys == [5, 6, 7, 8, 9, 10]
    assert seconds == 1.5


def test_redraws_are_bounded_and_none_are_made_where_none_are_needed():
    script, keys, _ = _draw([False] * 30, redraws=2)
    assert script.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(keys) == 9
    assert _draw([False] * 9, redraws=0)[0].asked == [[0, 1, 2]]
    assert _draw([True] * 9, redraws=5)[0].asked == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (
            "dapo",
            {"advantage": {"uniform_groups": "ib_only"}},
            r"search\.redraws: 9 .* set it to skip, or redraws to 0",
        ),
        ("vineppo", {"search": {"redraws": 2}}, r"search\.redraws: 2 .* advantage\.kind=vineppo learns"),
        ("treepo", {"advantage": {"uniform_groups": "ib_only"}}, r"advantage\.uniform_groups: ib_only would keep"),
        (
            "vineppo",
            {"advantage": {"uniform_groups": "ib_only"}},
            r"advantage\.uniform_groups: ib_only does not apply",
        ),
    ],
)
def test_settings_that_do_not_go_together(preset: str, changes: dict[str, Any], message: str, tmp_path: Path):
    changes = {"out": str(tmp_path / "run"), **changes}
    config = merge(base_config(task=None, preset=preset, file=None, run=None), changes, source="")
    with pytest.raises(ValueError, match=message):
        train(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()


# ---- a real training step ----------------------------------------------------------------------------------------


class _Coin(DigitChain):
    """Grades by a hash, so that an untrained policy meets both rewards; a third of the prompts can only be wrong."""

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float:
        prompt = str(problem.prompt)
        return float(zlib.crc32(prompt.encode()) % 3 > 0 and zlib.crc32(completion.encode()) % 2)


TINY = {
    "sampled_tokens": 600, "prompts_per_step": 6, "mini_batches": 3, "report_trees": 0,
    "search": {"group_size": 6, "rounds": 4, "step_tokens": 1},
    "sampling": {"max_tokens": 6}, "eval": {"prompts": 1}, "optim": {"lr": 1e-2, "warmup_steps": 0},
}  # fmt: skip
Run = tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, int]]


def _train(tmp_path: Path, preset: str, changes: dict[str, Any] | None = None) -> Run:
    """(log, weights, state) of two or three training steps of the built-in policy from random weights."""
    config = merge(base_config(task=None, preset=preset, file=None, run=None), TINY, source="")
    config = merge(config, changes or {}, source="")
    policy = built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))
    task = _Coin(config.digits)
    path = tmp_path / f"{preset}-{len(list(tmp_path.iterdir()))}"
    with RunFolder.create(path, config) as folder:
        trainer = Trainer(config, folder, policy, task, make_engine(config, policy), Console(quiet=True))
        trainer._train()
    rows = [row for row in read_rows(path / METRICS) if "tokens_sampled" in row]
    weights = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}
    return rows, weights, asdict(trainer.state)


def _same(left: Run, right: Run) -> bool:
    return all(torch.equal(weight, right[1][name]) for name, weight in left[1].items())


def _check(run: Run) -> None:
    rows, weights, state = run
    trained = [row for row in rows if row["optimizer_steps"]]
    assert trained
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in trained)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert state["next_problem"] == sum(row["prompts"] for row in rows)
    assert state["sampled_tokens"] == sum(row["tokens_sampled"] for row in rows)


@pytest.mark.parametrize(
    ("preset", "limit"),
    [
        ("grpo-clip-higher", {"loss": {"clip_high": 0.2}}),
        ("grpo-entropy", {"loss": {"entropy_coef": 0.0}}),
        ("ibro", {"loss": {"entropy_advantage_coef": 0.0}}),
        ("dapo", {"loss": {"clip_high": 0.2}, "search": {"redraws": 0}}),
    ],
)
def test_each_preset_trains_differs_from_grpo_and_is_grpo_in_its_limit(
    preset: str, limit: dict[str, Any], tmp_path: Path
):
    plain, run, limiting = _train(tmp_path, "grpo"), _train(tmp_path, preset), _train(tmp_path, preset, limit)
    for one in (plain, run, limiting):
        _check(one)
    assert max(row["clip_fraction"] for row in plain[0]) > 0
    assert not _same(run, plain)
    assert _same(limiting, plain)


def test_dapo_fills_its_steps_with_mixed_groups_and_counts_all_it_drew(tmp_path: Path):
    rows, _, state = run = _train(tmp_path, "dapo")
    _check(run)
    assert [row["prompts"] - row["groups_skipped"] for row in rows] == [6.0] * len(rows)
    assert max(row["prompts"] for row in rows) > 6
    for row in rows:
        assert row["trajectories"] == 6 * row["prompts"]
        assert row["eff_rate"] == pytest.approx(6 / row["prompts"])
    assert state["next_problem"] > 6 * len(rows)
    once = _train(tmp_path, "dapo", {"search": {"redraws": 0}})[0]
    assert max(row["groups_skipped"] for row in once) > 0
    assert {row["prompts"] for row in once} == {6}


def test_the_next_step_begins_after_all_prompts_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    grow = Grower.grow

    def spy(self: Grower, problems: Sequence[Problem], keys: Sequence[int], *rest: Any) -> Any:
        asked.extend(keys)
        return grow(self, problems, keys, *rest)

    monkeypatch.setattr(Grower, "grow", spy)
    _, _, state = _train(tmp_path, "dapo")
    assert asked == list(range(state["next_problem"]))


# ---- every reading of what the paper leaves open -----------------------------------------------------------------

OPEN_POINTS = {
    "ib": ("step_probability", "zero_parent", "value", "duplicates"),
    "advantage": ("pi_ref", "uniform_groups", "std"),
    "loss": ("prefix_weight", "aggregation"),
    "search": ("branch_at_root",),
}
CONFIGS = {"ib": IBConfig, "advantage": AdvantageConfig, "loss": LossConfig, "search": SearchConfig}


def _values(group: str, name: str) -> tuple[Any, ...]:
    hint = get_type_hints(CONFIGS[group])[name]
    return get_args(hint) if get_origin(hint) is Literal else (True, False)


OTHER_READINGS = [
    (group, name, value)
    for group, names in OPEN_POINTS.items()
    for name in names
    for value in _values(group, name)
    if value != getattr(CONFIGS[group](), name)
]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = _train(tmp_path_factory.mktemp("default"), "ib-tpo", {"advantage": {"ib_weight": 0.5}})
    _check(run)
    return run


@pytest.mark.parametrize(("group", "name", "value"), OTHER_READINGS)
def test_every_other_reading_trains_and_makes_a_difference(
    group: str, name: str, value: Any, default_run: Run, tmp_path: Path
):
    changes: dict[str, Any] = {"advantage": {"ib_weight": 0.5}}
    changes[group] = changes.get(group, {}) | {name: value}
    if name == "step_probability":  # all the same of steps of one token
        changes["search"] = {"step_tokens": 2}
        default_run = _train(tmp_path, "ib-tpo", changes | {"ib": {}})
    run = _train(tmp_path, "ib-tpo", changes)
    _check(run)
    assert not _same(run, default_run)


@pytest.mark.parametrize("changes", [{"shrinkage": 0.0, "value": "shrunk"}, {"score_bonus": 1e-12}])
def test_the_limits_of_what_goes_beyond_the_paper_are_the_paper(
    changes: dict[str, Any], default_run: Run, tmp_path: Path
):
    assert _same(_train(tmp_path, "ib-tpo", {"advantage": {"ib_weight": 0.5}, "ib": changes}), default_run)


@pytest.mark.parametrize("changes", [{"score_bonus": 2.0}, {"score_beta": "balanced"}])
def test_another_ranking_moves_the_branches(changes: dict[str, Any], default_run: Run, tmp_path: Path):
    run = _train(tmp_path, "ib-tpo", {"advantage": {"ib_weight": 0.5}, "ib": changes})
    _check(run)
    assert not _same(run, default_run)


def test_the_documentation_names_every_reading_of_every_open_point():
    """Each row of the table in docs/method.md: its settings exist, and all their values stand in the row."""
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.split("## What the paper leaves open")[1].split("\n## ")[0]
    documented = set()
    for row in table.splitlines():
        for group, name in re.findall(r"`(ib|advantage|loss|search)\.(\w+)`", row.rsplit(" | ", 1)[-1]):
            documented.add((group, name))
            assert name in get_type_hints(CONFIGS[group])
            for value in _values(group, name) if name in OPEN_POINTS[group] else ():
                assert isinstance(value, bool) or f"`{value}`" in row, (name, value)
    missing = {(group, name) for group, names in OPEN_POINTS.items() for name in names} - documented
    assert missing == set()
    assert {("search", "separator"), ("search", "step_tokens"), ("advantage", "std_eps")} <= documented


def test_every_other_reading_has_its_row_in_a_study():
    changes = [own for name in ("open-points", "beyond") for own in load_study(name).variants.values()]
    for group, name, value in OTHER_READINGS:
        assert any(one.get(group, {}).get(name) == value for one in changes), (group, name, value)


def test_what_is_cut_off_at_the_length_limit_earns_nothing():
    task = DigitChain(DigitChainConfig())
    problem = task.train_problem(0)
    right = right_solution(problem)
    assert task.grade(problem, right, truncated=False) == 1.0
    assert task.grade(problem, right, truncated=True) == 0.0


# ---- the presets themselves --------------------------------------------------------------------------------------


def test_the_presets_command_explains_every_preset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert PRESET_NOTES.keys() == PRESETS.keys()
    for name, changes in PRESETS.items():
        assert re.search(rf"│ {re.escape(name)} +│", out), name
        for group, fields in changes.items():
            assert all(f"{group}.{field} {value}" in out for field, value in fields.items())
    for explanation, source in PRESET_NOTES.values():
        assert explanation.split(",")[0] in out
        assert source.split(";")[0] in out


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_names_every_preset(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ",".join(PRESETS) in "".join(capsys.readouterr().out.replace("│", " ").split())


def test_dapo_has_its_papers_settings():
    dapo = base_config(task="jsonl", preset="dapo", file=None, run=None)
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.kl_coef) == (0.2, 0.28, 0.0)
    assert (dapo.loss.aggregation, dapo.search.method, dapo.advantage.kind) == ("token", "independent", "grpo")
    assert dapo.search.redraws == 9
