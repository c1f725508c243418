"""Tasks: where prompts come from and how completions are graded."""

from __future__ import annotations

from ibtpo.config import TrainConfig
from ibtpo.rewards import GYM, parse_rewards
from ibtpo.tasks.base import Grades, Problem, Task, TeachableTask, format_prompt
from ibtpo.tasks.data import DataTask
from ibtpo.tasks.digit_chain import DigitChain
from ibtpo.tasks.grades import RewardGrades
from ibtpo.tasks.gym import GymTask
from ibtpo.validation import suggest

__all__ = [
    "DataTask",
    "DigitChain",
    "Grades",
    "Problem",
    "RewardGrades",
    "Task",
    "TeachableTask",
    "format_prompt",
    "make_task",
]

TASK_NAMES = (DigitChain.name, DataTask.name, GYM + "NAME")


def make_task(config: TrainConfig) -> Task:
    """The task a configuration names.

    Raises:
        ValueError: unknown task, or its data cannot be used; the message names the remedy.
        GraderError: a reward cannot be loaded.
    """
    rewards = parse_rewards(config.reward)
    if config.task == DigitChain.name:
        if rewards:
            raise ValueError("reward: digit-chain grades itself; leave --reward out, or set digits.grade")
        return DigitChain(config.digits, config.seed)
    separator = config.search.separator
    if config.task == DataTask.name:
        if config.data is None:
            raise ValueError("task: jsonl needs a file of prompts and answers; give one with --data FILE.jsonl")
        return DataTask(config.data, config.jsonl, config.seed, separator, layout=config.layout, rewards=rewards)
    if config.task.startswith(GYM):
        return GymTask(config.task, config.seed, separator, config=config.jsonl, rewards=rewards)
    raise ValueError(f"task: {config.task!r} is not known; {suggest(config.task, TASK_NAMES)}")
