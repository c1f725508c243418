r"""Layouts of data files: which fields hold prompt and answer, and their form in published mathematics sets.

==========  ===============================================  =====================================================
``plain``   ``prompt``, ``answer``                           any file; the fields can be named
``gsm8k``   ``question``, ``answer``                         GSM8K: the answer stands after ``####``
``math``    ``problem``, ``solution``                        MATH, MATH-500: the last ``\boxed{}`` of the solution
``dapo``    ``prompt``, ``reward_model.ground_truth``        DAPO-Math-17K and verl: the prompt is a list of messages
``aime``    ``problem``, ``answer``                          AIME: the answer is an integer from 0 to 999
``boxed``   ``problem``, ``answer``                          DeepScaleR, Big-Math, NuminaMath-1.5: any final answer
==========  ===============================================  =====================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from ibtpo.config import JsonlConfig
from ibtpo.rewards import boxed
from ibtpo.tasks.base import Problem
from ibtpo.tasks.rows import Rows, fail, kind_of

BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The instruction with which published results of mathematics models are measured."""

_MISSING = object()


class Unanswered(ValueError):
    """A row without a readable reference."""


_LOOKED_AT = 100  # number of first rows from which a layout is chosen
_NEARLY_ALL = 0.9  # share of them that must have a marked answer: a few odd rows must not change the layout


@dataclass(frozen=True)
class Layout:
    """How a row becomes a problem."""

    name: str
    prompt_field: str
    """Dots step into nested objects, unless a field has the dotted name itself."""
    answer_field: str
    read_answer: Callable[[str], str | None] = str.strip
    """Extracts the reference from the text of the answer field; None if there is none."""
    answer_form: str = ""
    """Description of that text's form, for error messages."""
    template: str = "{prompt}"
    """Template of the prompt; for a list of messages, applied to the last one."""


def _after_hashes(text: str) -> str | None:
    _, mark, answer = text.rpartition("####")
    return answer.strip().replace(",", "") if mark else None


def _found(text: str) -> str | None:
    """The answer, or None for "proof" and "notfound", which NuminaMath-1.5 writes where there is none."""
    return None if text.strip().lower() in ("proof", "notfound") else text.strip()


def _integer(text: str) -> str | None:
    """An integer without leading zeros or degree sign: AIME's 073 and 336^\\circ mean 73 and 336."""
    digits = text.strip().removesuffix(r"^\circ").removesuffix(".0")
    return str(int(digits)) if digits.isascii() and digits.isdigit() and int(digits) <= 999 else None


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("plain", "prompt", "answer"),
        Layout("gsm8k", "question", "answer", _after_hashes, '"#### " and the answer at the end', BOXED),
        Layout("math", "problem", "solution", boxed, r"a solution with its answer in \boxed{}", BOXED),
        Layout("dapo", "prompt", "reward_model.ground_truth"),
        Layout("aime", "problem", "answer", _integer, "an integer from 0 to 999", BOXED),
        Layout("boxed", "problem", "answer", _found, 'an answer ("proof" and "notfound" stand for none)', BOXED),
    )
}
_PROMPTS = ("prompt", "question", "problem", "instruction", "input", "messages")
_ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth", "solution", "final_answer", "target", "output")


def choose_layout(name: str, rows: Rows, config: JsonlConfig) -> tuple[Layout, str]:
    """The layout of this name, or for "auto" the one detected from the first rows, with the fields set in `config`.

    Returns:
        the layout, and a note on what was chosen; "" if there was nothing to choose.
    """
    first = rows[0]
    layout = LAYOUTS[name] if name != "auto" else _detect([rows[i] for i in range(min(len(rows), _LOOKED_AT))])
    note = f"{rows.path}: layout {layout.name}, read from its fields; --layout names another" if name == "auto" else ""
    if layout.name == "boxed" or (layout.name == "plain" and name == "auto"):
        prompt = config.prompt_field or _first(first, (layout.prompt_field, *_PROMPTS)) or layout.prompt_field
        answer = config.answer_field or _first(first, _ANSWERS) or layout.answer_field
        usual = (prompt, answer) == (layout.prompt_field, layout.answer_field)
        if not (usual or (config.prompt_field and config.answer_field)):
            note = (
                f'{rows.path}: prompts are read from the field "{prompt}", answers from "{answer}"; '
                "jsonl.prompt_field and jsonl.answer_field name others"
            )
        elif layout.name == "plain":
            note = ""
        if note and prompt == "instruction" and "input" in first:
            note += '; the field "input" is not shown, docs/data.md says how to join it to the prompt'
        layout = replace(layout, prompt_field=prompt, answer_field=answer)
    return replace(
        layout,
        prompt_field=config.prompt_field or layout.prompt_field,
        answer_field=config.answer_field or layout.answer_field,
        template=config.template or layout.template,
    ), note


def _detect(rows: Sequence[Mapping[str, Any]]) -> Layout:
    def all_have(field: str, read: Callable[[str], str | None] = str.strip, share: float = 1.0) -> bool:
        values = [_get(row, field) for row in rows]
        return sum(value is not _MISSING and read(str(value)) is not None for value in values) >= share * len(rows)

    if all_have("prompt") and all_have("reward_model.ground_truth"):
        return LAYOUTS["dapo"]
    if all_have("question") and all_have("answer", _after_hashes, _NEARLY_ALL):
        return LAYOUTS["gsm8k"]
    if all_have("problem") and all_have("answer", _integer) and _get(rows[0], "level") is _MISSING:
        return LAYOUTS["aime"]
    if all_have("problem") and all_have("solution", boxed, _NEARLY_ALL):
        return LAYOUTS["math"]
    if all_have("problem") and all_have("answer") and not all_have("prompt"):
        return LAYOUTS["boxed"]
    return LAYOUTS["plain"]


def _first(row: Mapping[str, Any], fields: tuple[str, ...]) -> str | None:
    return next((field for field in fields if _get(row, field) is not _MISSING), None)


def _get(row: Mapping[str, Any], field: str) -> Any:
    """A field by name, in any letter case, or by a path of names joined with dots; _MISSING without one."""
    if field in row:
        return row[field]
    lower = field.lower()
    for name, value in row.items():
        if name.lower() == lower:
            return value
    head, dot, tail = field.partition(".")
    return _get(row[head], tail) if dot and isinstance(row.get(head), Mapping) else _MISSING


def _names_near(row: Mapping[str, Any], field: str) -> list[str]:
    """The names in a row that lacks a field; in the object that the field's path reaches, if it reaches one."""
    inside, prefix = row, ""
    for name in field.split(".")[:-1]:
        if not isinstance(value := _get(inside, name), Mapping) or not value:
            break
        inside, prefix = value, f"{prefix}{name}."
    return [f"{prefix}{name}" for name in inside]


def has_field(row: Mapping[str, Any], field: str) -> bool:
    """Does a row have this field?"""
    return _get(row, field) is not _MISSING


def get_field(row: Mapping[str, Any], field: str, option: str, where: str) -> Any:
    """The value of a field of a row.

    Raises:
        ValueError: the row has no such field.
    """
    value = _get(row, field)
    if value is _MISSING:
        found = ", ".join(map(repr, _names_near(row, field))) or "none"
        remedy = f"add it, or name another in jsonl.{option}"
        remedy += ", or another --layout" if option in ("prompt_field", "answer_field") else ""
        fail(where, f'field "{field}" is missing (fields found: {found})', remedy)
    return value


def read_problem(layout: Layout, row: Mapping[str, Any], where: str, config: JsonlConfig) -> Problem:
    """The problem a row poses, its prompt in the layout's template.

    Raises:
        Unanswered: it has no readable answer.
        ValueError: the row is invalid; the message names place, field and remedy.
    """
    field = layout.prompt_field
    prompt = _check_prompt(get_field(row, field, "prompt_field", where), field, where)
    try:
        answer = _read_answer(layout, row, where)
    except ValueError as error:
        raise Unanswered(f"{error}; --jsonl.unanswered drop leaves such rows out") from None
    data = {name: get_field(row, name, "data_fields", where) for name in config.data_fields}
    return Problem(_in_template(prompt, layout.template), answer, data | {"where": where})


def _read_answer(layout: Layout, row: Mapping[str, Any], where: str) -> str:
    field = layout.answer_field
    answer = layout.read_answer(_check_answer(get_field(row, field, "answer_field", where), field, where))
    if not answer:
        remedy = "fix or remove the row, or choose another --layout"
        fail(where, f'field "{field}" is not {layout.answer_form}', remedy)
    return answer


def read_example(layout: Layout, row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """A worked example: the prompt in its template, and the text of the field "solution" or else of the answer."""
    prompt = _check_prompt(get_field(row, layout.prompt_field, "prompt_field", where), layout.prompt_field, where)
    field = "solution" if _get(row, "solution") is not _MISSING else layout.answer_field
    solution = _check_answer(get_field(row, field, "answer_field", where), field, where)
    shown = _in_template(prompt, layout.template)
    return shown if isinstance(shown, str) else shown[-1]["content"], solution


def _in_template(prompt: str | list[dict[str, str]], template: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    *before, last = prompt
    return [*before, {**last, "content": template.replace("{prompt}", last["content"])}]


def _check_prompt(prompt: Any, field: str, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            fail(where, f'field "{field}" is empty', "give every row a prompt, or remove the row")
        return _check_text(prompt, field, where)
    if not isinstance(prompt, list):
        fail(where, f'field "{field}" is {kind_of(prompt)}', "it must be a string or a list of chat messages")
    if not prompt:
        fail(where, f'field "{field}" is an empty list of messages', "give every row a prompt, or remove the row")
    for i, message in enumerate(prompt):
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            remedy = 'write {"role": "user", "content": "..."}'
            fail(where, f'message {i} of field "{field}" is not a chat message', remedy)
    if prompt[-1]["role"] == "assistant":
        remedy = "the policy writes that turn: end the messages with the user's, and give the answer in a field"
        fail(where, f'the last message of field "{field}" is the assistant\'s', remedy)
    if not prompt[-1]["content"].strip():
        fail(where, f'the last message of field "{field}" is empty', "give it content, or remove the row")
    return [{key: _check_text(message[key], field, where) for key in ("role", "content")} for message in prompt]


def _check_answer(answer: Any, field: str, where: str) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        fail(where, f'field "{field}" is {kind_of(answer)}', "it must be a string or a number")
    if not str(answer).strip():
        fail(where, f'field "{field}" is empty', "give every row an answer, or remove the row")
    if isinstance(answer, float | Decimal) and not math.isfinite(answer):
        fail(where, f'field "{field}" is {answer}', "give every row an answer, or remove the row")
    return _check_text(answer if isinstance(answer, str) else _digits(answer), field, where)


def _digits(number: float | Decimal) -> str:
    """A number without exponent or trailing zeros: 4 for 4.00; 0.00005 for 5e-05, whose e is Euler's in a formula."""
    text = f"{number if isinstance(number, Decimal) else Decimal(str(number)):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _check_text(text: str, field: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no tokenizer accepts
        fail(where, f'field "{field}" holds half of a character (a lone surrogate)', "fix the row, or remove it")
    return text
