"""Tasks: where prompts come from and how completions are graded."""

from __future__ import annotations

from ibtpo.config import TrainConfig
from ibtpo.tasks.base import Grades, Problem, Task, TeachableTask, format_prompt, suggest
from ibtpo.tasks.digit_chain import DigitChain
from ibtpo.tasks.gym import PREFIX, GymTask
from ibtpo.tasks.jsonl import AnswerGrades, JsonlTask

__all__ = [
    "AnswerGrades",
    "DigitChain",
    "Grades",
    "JsonlTask",
    "Problem",
    "Task",
    "TeachableTask",
    "format_prompt",
    "make_task",
]

TASK_NAMES = (DigitChain.name, JsonlTask.name, PREFIX + "NAME")


def make_task(config: TrainConfig) -> Task:
    """The task a configuration names.

    Raises:
        ValueError: unknown task, or its data cannot be used; the message names the remedy.
    """
    if config.task == DigitChain.name:
        return DigitChain(config.digits, config.seed)
    if config.task == JsonlTask.name:
        if config.data is None:
            raise ValueError("task: jsonl needs a file of prompts and answers; give one with --data FILE.jsonl")
        return JsonlTask(config.data, config.jsonl, config.seed, config.search.separator)
    if config.task.startswith(PREFIX):
        return GymTask(config.task, config.seed, config.search.separator)
    raise ValueError(f"task: {config.task!r} is not known; {suggest(config.task, TASK_NAMES)}")
