"""What is left out and passed on: prompts by length, fields for rewards, splits; repeated flags; truncation."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer, save_additions, save_checkpoint

from ibtpo import setup
from ibtpo.cli import main
from ibtpo.config import JsonlConfig, TrainConfig
from ibtpo.config_io import load_yaml
from ibtpo.evaluation import Completion, Evaluation, sample_completions
from ibtpo.grow import Grading, Grower
from ibtpo.list_flags import LIST_FLAGS, join_repeated
from ibtpo.metrics import tree_metrics
from ibtpo.policy import load_policy
from ibtpo.setup import check_prompts
from ibtpo.tasks import Problem, format_prompt, make_task
from ibtpo.tasks.data import DataTask
from ibtpo.tasks.rows import open_rows
from ibtpo_engine import Engine, Sampling
from ibtpo_engine.tree import Node, Tree

ALL = {"grade": "exact", "eval_fraction": 1.0}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# ---- prompts by length -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [1, 7, 1000])
@pytest.mark.parametrize("chat", [True, False])
def test_the_shortcut_leaves_out_the_very_prompts_that_are_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: int, chat: bool
) -> None:
    """Past the first rows, most are known to be short from their bytes; the result is that of tokenizing all."""
    lengths = [3, 200, 24, 25, 26, 1, 90, 40, 41, 57, 58, 59, 60, 2, 23, 300, 10]
    texts = ["ü" * (n // 2) if n % 7 == 3 else "x" * n for n in lengths]
    prompts: list[Any] = [f"{i:02d}{text}" for i, text in enumerate(texts)]
    if chat:
        prompts[4:6] = [
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": t}] for t in prompts[4:6]
        ]
    path = write(tmp_path / "d.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in prompts])
    model = save_checkpoint(tmp_path / "model", context=1000, chat=chat)
    policy = load_policy(model, dtype=torch.float32, device=torch.device("cpu"))
    tokenized: list[Problem] = []

    def counted(tokenizer: Any, problem: Problem, config: JsonlConfig) -> list[int]:
        tokenized.append(problem)
        return format_prompt(tokenizer, problem, config)

    monkeypatch.setattr(setup, "_ALWAYS", always)
    monkeypatch.setattr(setup, "format_prompt", counted)
    for limit in (20, 61, 100, 250):
        tokenized.clear()
        config = TrainConfig(data=path, task="jsonl", jsonl=JsonlConfig(**ALL, max_prompt_tokens=limit))
        task = make_task(config)
        assert isinstance(task, DataTask)
        problems = task.eval_problems(99)
        tokens = [len(format_prompt(policy.tokenizer, problem, config.jsonl)) for problem in problems]
        short = [problem.prompt for problem, n in zip(problems, tokens, strict=True) if n <= limit]
        if not short:
            with pytest.raises(ValueError, match=f"every row has more than {limit} prompt tokens"):
                check_prompts(task, policy, config)
            continue
        notes = check_prompts(task, policy, config)
        assert [problem.prompt for problem in task.eval_problems(99)] == short
        left_out = len(prompts) - len(short)
        assert f"{left_out} row{'s' * (left_out > 1)} left out, with more than {limit}" in notes[-2]
        assert len(tokenized) <= len(prompts)
    assert (len(tokenized) < len(prompts)) == (always < 1000)  # at a limit of 250 the shortcut was taken, or not at all


# ---- fields and splits -----------------------------------------------------------------------------------------


def test_further_fields_reach_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def near(prompt, completion, answer, data):\n"
        "    return float(abs(int(completion) - int(answer)) <= data['tolerance'] * data['meta.scale'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = {"prompt": "1+1", "answer": 2, "tolerance": 3, "meta": {"scale": 2}, "unasked": "x"}
    path = write(tmp_path / "d.jsonl", [row])
    jsonl = JsonlConfig(eval_fraction=1.0, data_fields=("tolerance", "meta.scale"))
    task = make_task(TrainConfig(task="jsonl", data=path, jsonl=jsonl, reward=("own_reward:near",)))
    try:
        [problem] = task.eval_problems(1)
        assert problem.data == {"tolerance": 3, "meta.scale": 2, "where": f"{path}, line 1"}
        rewards = [task.grade(problem, text, False) for text in ("8", "9")]
        assert [reward.result(60) for reward in rewards if not isinstance(reward, float)] == [1.0, 0.0]
    finally:
        task.close()
    with pytest.raises(ValueError, match=r'line 1: field "level" is missing .*jsonl\.data_fields'):
        DataTask(path, JsonlConfig(**ALL, data_fields=("level",)))


def test_a_dataset_dict_without_a_train_split_names_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"prompt": "1+1", "answer": "2"}])
    datasets.DatasetDict(test=dataset, dev=dataset).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "one")
    with pytest.raises(
        ValueError, match=f"has the splits test, dev; give the folder of one: {tmp_path / 'two' / 'test'}"
    ):
        open_rows(tmp_path / "two")
    for name in ("two/dev", "one"):
        assert open_rows(tmp_path / name)[0] == {"prompt": "1+1", "answer": "2"}


# ---- flags -----------------------------------------------------------------------------------------------------


def test_every_field_of_several_values_may_be_repeated() -> None:
    found = []

    def look(config: Any, prefix: str) -> None:
        hints = get_type_hints(type(config))
        for field in fields(config):
            name = prefix + field.name.replace("_", "-")
            if is_dataclass(value := getattr(config, field.name)):
                look(value, f"{name}.")
            elif str(hints[field.name]).startswith("tuple["):
                found.append(name)

    look(TrainConfig(), "--")
    assert sorted(found) == sorted(LIST_FLAGS)


@pytest.mark.parametrize(
    ("arguments", "joined"),
    [
        ("--reward a --seed 1 --reward b:2", "--seed 1 --reward a b:2"),
        ("--reward a b --reward=c --quiet", "--quiet --reward a b c"),
        ("--jsonl.data_fields x --jsonl.data-fields y --reward z", "--jsonl.data-fields x y --reward z"),
        ("--seed 1 --reward", "--seed 1 --reward"),
        ("--model m --whole", "--model m --whole"),
    ],
)
def test_values_of_a_repeated_flag_are_joined(arguments: str, joined: str) -> None:
    assert join_repeated(arguments.split()) == joined.split()


def test_repeated_rewards_are_all_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag given twice must not silently mean the last one."""
    model = save_checkpoint(tmp_path / "model", context=64, teach=40)
    data = save_additions(tmp_path / "rows.jsonl", 4)
    command = ["eval", "--model", model, "--data", data, "--whole", "--samples", 2, "--sampling.max-tokens", 4]
    results = []
    for i, flags in enumerate((["--reward", "exact", "--reward", r"regex=\d:3"], ["--reward", "exact", r"regex=\d:3"])):
        out = tmp_path / str(i)
        assert main([*map(str, command), *flags, "--out", str(out)]) == 0
        results.append(json.loads((out / "summary.json").read_text())["accuracies"])
        assert load_yaml(out / "settings.json")["reward"] == ["exact", r"regex=\d:3"]
    assert results[0] == results[1]
    rows = [json.loads(line) for line in (tmp_path / "0" / "completions.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in rows} <= {0.0, 0.75, 1.0} and 0.75 in {row["reward"] for row in rows}
    assert main(["eval", "--model", str(model), "--reward", "exact"]) == 2
    assert "reward: digit-chain grades itself; leave --reward out" in capsys.readouterr().err


# ---- truncated trajectories ------------------------------------------------------------------------------------


class _Always:
    """Grades that would call everything right, and remember whether they were told of a truncation."""

    def __init__(self) -> None:
        self.truncated: list[bool] = []

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float:
        self.truncated.append(truncated)
        return 0.0 if truncated else 1.0

    def extract(self, problem: Problem, completion: str) -> str | None:
        return completion

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def _leaf(tree: Tree, finish: str) -> Node:
    ones = np.zeros(2)
    return tree.root.fork()[0].fill(np.array([65, 66]), ones, ones, ones, finish=finish)


@pytest.mark.parametrize("finish", ["length", "budget", "abort"])
def test_whatever_ends_a_trajectory_but_a_stop_token_truncates_it(finish: str) -> None:
    tree, grades = Tree([67], key=0), _Always()
    grading = Grading(grades, byte_tokenizer(), {0: Problem("?", "AB")})
    for end in ("stop", finish):
        leaf = _leaf(tree, end)
        reward = grading(tree, leaf)
        assert isinstance(reward, float)
        leaf.reward = reward
    assert grades.truncated == [False, True]
    values = tree_metrics([tree])
    assert (values["reward"], values["truncated_share"]) == (0.5, 0.5)
    rows = [Completion(0, i, "AB", r, "AB", f, 2) for i, (r, f) in enumerate([(1.0, "stop"), (0.0, finish)])]
    evaluation = Evaluation(1, 2)
    for row in (*rows, rows[0]._replace(sample=None)):
        evaluation.add(row)
    assert evaluation.metrics()["eval_truncated_share"] == 0.5


def test_truncated_samples_of_an_evaluation_are_wrong_and_do_not_vote(tmp_path: Path) -> None:
    policy = load_policy(save_checkpoint(tmp_path, context=64), dtype=torch.float32, device=torch.device("cpu"))
    grades, found = _Always(), list[Completion]()
    grower = Grower(Engine(policy.model, kv_tokens=2000, seed=0), grades, policy.tokenizer, JsonlConfig())
    sampling = Sampling(temperature=1.0, max_tokens=12, stop_tokens=tuple(range(64)))
    sample_completions(grower, [Problem("1+1", "2")], sampling, 40, found.append)
    assert len(found) == 41
    assert {completion.finish for completion in found} == {"stop", "length"}
    for completion in found:
        right = completion.finish == "stop"
        assert (completion.reward, completion.answer) == ((1.0, completion.text) if right else (0.0, None))


def test_an_evaluation_keeps_no_tree_whose_completions_are_graded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tokenizes a prompt when there is room for its tree."""
    policy = load_policy(save_checkpoint(tmp_path, context=64), dtype=torch.float32, device=torch.device("cpu"))
    engine = Engine(policy.model, kv_tokens=2000, max_branches=4)
    grower = Grower(engine, _Always(), policy.tokenizer, JsonlConfig())
    alive, most, ahead = weakref.WeakSet[Tree](), 0, 0

    def formatted(*arguments: Any) -> list[int]:
        nonlocal ahead
        ahead += 1
        return format_prompt(*arguments)

    def done(tree: Tree) -> None:
        nonlocal most, ahead
        alive.add(tree)
        gc.collect()
        most = max(most, len(alive), ahead)
        ahead -= 1

    monkeypatch.setattr("ibtpo.grow.format_prompt", formatted)

    found: list[Completion] = []
    sample_completions(grower, [Problem("1+1", "2")] * 32, Sampling(max_tokens=4), 2, found.append, on_prompt=done)
    assert len(found) == 32 * 3
    assert most < 12


# ---- the real reasoning-gym ------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("name", ["chain_sum", "leg_counting"])
def test_the_real_reasoning_gym_poses_and_grades(name: str) -> None:
    task = make_task(TrainConfig(task=f"reasoning-gym:{name}"))
    try:
        trained, held_out = [task.train_problem(i) for i in range(40)], task.eval_problems(40)
        assert not {p.prompt for p in trained} & {p.prompt for p in held_out}
        assert [p.prompt for p in trained] == [task.train_problem(i).prompt for i in range(40)]
        for problem in held_out[:5]:
            texts = (f"So it is <answer>{problem.answer}</answer>", "<answer>no idea</answer>")
            graded = [task.grade(problem, text, False) for text in texts]
            right, wrong = (reward.result(120) for reward in graded if not isinstance(reward, float))
            assert right == 1.0 and wrong < 0.5
            answer = task.extract(problem, texts[0])
            assert answer is not None and not isinstance(answer, str)
            assert answer.result(120) == problem.answer
        assert task.counts() == {"reward_timeouts": 0, "reward_failures": 0}
    finally:
        task.close()


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_real_reasoning_gym_suggests_names() -> None:
    with pytest.raises(ValueError, match='did you mean "chain_sum"'):
        make_task(TrainConfig(task="reasoning-gym:chainsum"))
