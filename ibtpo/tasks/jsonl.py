"""A task read from a JSONL file: one object a line with a prompt and a reference answer."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from ibtpo.config import JsonlConfig
from ibtpo.grading import Grader
from ibtpo.tasks.base import Problem, seeded

_SPLIT, _ORDER = range(2)  # streams of random numbers


class AnswerGrades:
    """Grades completions against a reference answer, whoever posed the problem.

    With ``config.grade == "math"`` worker processes run until `close`.
    """

    def __init__(self, config: JsonlConfig) -> None:
        self.config = config
        self.grader = Grader(config.grade_workers, config.grade_timeout) if config.grade == "math" else None

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float | Future[float]:
        """1 if the completion's final answer equals the reference (math-verify, or the stripped last line), else 0."""
        if truncated:
            return 0.0
        if self.grader is None:
            return float(last_line(completion) == problem.answer.strip())
        return self.grader.submit(problem.answer, completion)

    def close(self) -> None:
        """End the grading processes."""
        if self.grader is not None:
            self.grader.close()


class JsonlTask(AnswerGrades):
    """Prompts and answers of a file, divided by seed into training and evaluation rows.

    Rows with the same prompt always land on the same side. Training passes over its rows in a new seeded order every
    epoch. With ``config.grade == "math"`` worker processes run while the task is open.

    Raises:
        ValueError: the file is missing or something in it is not as it should be; file, line and field are named.
    """

    name = "jsonl"

    def __init__(self, path: Path, config: JsonlConfig, seed: int = 0, separator: str = "\n\n") -> None:
        self.separator = separator
        self.seed = seed
        self._train, self._eval = _divide(read_problems(path, config), config.eval_fraction, seed, path)
        self._epoch, self._order = -1, self._shuffled(0)
        super().__init__(config)

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index; every ``num_train`` indices are one pass over the rows."""
        epoch, row = divmod(index, len(self._train))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._train[self._order[row]]

    @property
    def num_train(self) -> int:
        """Number of training rows."""
        return len(self._train)

    def eval_problems(self, n: int) -> list[Problem]:
        """The first `n` held-out rows, or all where there are fewer."""
        return self._eval[:n]

    def _shuffled(self, epoch: int) -> list[int]:
        return [int(i) for i in seeded(self.seed, _ORDER, epoch).permutation(len(self._train))]


def last_line(text: str) -> str:
    """The last line of a text that is not blank, stripped; "" if there is none."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def read_problems(path: Path, config: JsonlConfig) -> list[Problem]:
    """Read and check every row of a JSONL file, line by line; blank lines are skipped.

    Raises:
        ValueError: names the file, the line, the field, and what to do.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --data a JSONL file with one prompt and answer a line")
    problems = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                problems.append(_parse(line, _Row(path, number), config))
    if not problems:
        raise ValueError(
            f"{path}: the file is empty; write one JSON object a line, such as "
            f'{{"{config.prompt_field}": "What is 2+2?", "{config.answer_field}": "4"}}'
        )
    return problems


class _Row:
    """Where we are in the file, for error messages."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def fail(self, problem: str, remedy: str) -> NoReturn:
        raise ValueError(f"{self.path}, line {self.number}: {problem}; {remedy}") from None


def _parse(line: bytes, row: _Row, config: JsonlConfig) -> Problem:
    record = _parse_object(line, row)
    for field, option in ((config.prompt_field, "prompt_field"), (config.answer_field, "answer_field")):
        if field not in record:
            found = ", ".join(map(repr, record)) or "none"
            row.fail(
                f'field "{field}" is missing (fields found: {found})', f"add it, or name another in jsonl.{option}"
            )
    prompt = _check_prompt(record[config.prompt_field], config.prompt_field, row)
    answer = _check_answer(record[config.answer_field], config.answer_field, row)
    return Problem(prompt, answer, {"line": row.number})


def _parse_object(line: bytes, row: _Row) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: row.fail(
            f"{name} is not JSON", "write a number or a string"))  # fmt: skip
    except UnicodeDecodeError as error:
        row.fail(f"not UTF-8 text (byte {error.start} of the line)", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        hint = "a JSONL file holds one complete JSON object a line, no array around them and no comma between them"
        row.fail(f"malformed JSON at column {error.colno} ({error.msg})", hint)
    except RecursionError:
        row.fail("JSON nested too deeply", "a row is a flat object")
    if not isinstance(record, dict):
        row.fail(f"expected an object, found {_kind(record)}", 'write {"prompt": ..., "answer": ...}')
    return record


def _check_prompt(prompt: Any, field: str, row: _Row) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            row.fail(f'field "{field}" is empty', "give every row a prompt, or remove the row")
        return prompt
    if not isinstance(prompt, list):
        row.fail(f'field "{field}" is {_kind(prompt)}', "it must be a string or a list of chat messages")
    if not prompt:
        row.fail(f'field "{field}" is an empty list of messages', "give every row a prompt, or remove the row")
    for i, message in enumerate(prompt):
        well_formed = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not well_formed:
            row.fail(
                f'message {i} of field "{field}" is not a chat message', 'write {"role": "user", "content": "..."}'
            )
    if not prompt[-1]["content"].strip():
        row.fail(f'the last message of field "{field}" is empty', "give it content, or remove the row")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _check_answer(answer: Any, field: str, row: _Row) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        row.fail(f'field "{field}" is {_kind(answer)}', "it must be a string or a number")
    if not str(answer).strip():
        row.fail(f'field "{field}" is empty', "give every row an answer, or remove the row")
    return str(answer)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _divide(problems: list[Problem], fraction: float, seed: int, path: Path) -> tuple[list[Problem], list[Problem]]:
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(json.dumps(problem.prompt), []).append(problem)
    if len(groups) < 2:
        raise ValueError(
            f"{path}: {len(problems)} row(s) with {len(groups)} different prompt(s); at least 2 different prompts are "
            "needed, one to train on and one to hold out for evaluation: add rows"
        )
    num_eval = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    shuffled = seeded(seed, _SPLIT).permutation(len(groups))
    prompts = list(groups)
    held_out = {prompts[i] for i in shuffled[:num_eval]}
    train = [problem for prompt, rows in groups.items() if prompt not in held_out for problem in rows]
    return train, [groups[prompts[i]][0] for i in shuffled[:num_eval]]
