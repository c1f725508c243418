r"""Rewards, by name. They run in grading processes (grading_worker.py), so this module does not import torch.

====================  ==========================================================================================
``math``              math-verify: the final answer, the last box or ``<answer>`` after the thinking, is the reference
``exact``             the last line that is not blank equals the reference
``regex=PATTERN``     the pattern is found; if it has a group, the last match's group equals the reference
``format``            the answer is given as ``\boxed{...}`` or ``<answer>...</answer>``
``reasoning-gym:X``   the score of reasoning-gym's dataset X
``module:function``   a function of your own: ``function(prompt, completion, answer, data) -> float`` in [0, 1]
====================  ==========================================================================================

Each may be followed by ``:WEIGHT``; several are combined into their weighted mean.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ibtpo.environment import package_version
from ibtpo.latex import as_remainder, has_modulus, in_latex, with_modulus
from ibtpo.validation import suggest

GYM = "reasoning-gym:"
BUILT_IN = ("math", "exact", "format", "regex=PATTERN", GYM + "NAME", "package.module:function")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THOUGHT = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[^\S\n]*")
_FORMULA = re.compile(r"(?<!\\)\$|\\[(\[]")  # not the \$ of MATH's amounts of money, \$18.90
_EMPTY = re.compile(_BOX.pattern + r"\{\s*\}")
# content of a box without braces: up to the end of the formula, as in "$\boxed 12$"; outside a formula, a number
_BARE = re.compile(r"(?=[-+(\\.\d]|[A-Za-z]\b)(?:[^$\n\\]|\\(?![)\]])){1,200}?(?=\$|\\[)\]])|[-+]?\d(?:[\d.,/]*\d)?")
_SENTENCE_END = re.compile(r"[.!?]\$*\s|\n\s*\n|\n\s*[A-Z][a-z]")
_AND = re.compile(r"\b(?:and|or)\b")
_CHOICE = re.compile(r"(?i:\banswer)(?:\s+is)?[\s:*]{1,6}\(?([A-J])\)?[.*]{0,4}\s*\Z")  # **Answer:** (C)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # not a command or a variable


class Graded(NamedTuple):
    """A completion to grade, with its prompt and reference."""

    prompt: str | list[dict[str, str]]
    """The problem's prompt."""
    completion: str
    """The policy's text after the prompt."""
    answer: str
    """The reference answer."""
    data: dict[str, Any]
    """The problem's other fields."""


class Box(NamedTuple):
    r"""A ``\boxed`` in a text, which is ``text[start:end]``."""

    start: int
    content: str
    end: int
    closed: bool = True


class RewardSpec(NamedTuple):
    """One reward of a run and its weight in the mean."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Reward:
    """A loaded reward."""

    grade: Callable[[Graded], float]
    """Reward in [0, 1]."""
    extract: Callable[[str], str | None]
    """The completion's answer, normalised so that equal answers are equal texts; None if it gives none."""


def parse_reward(text: str) -> RewardSpec:
    """``NAME`` or ``NAME:WEIGHT``; a pattern that itself ends in ``:number`` needs an explicit weight.

    Raises:
        ValueError: the name is unknown, or the weight is not above 0.
    """
    name, weight = text, 1.0
    head, colon, tail = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and (_is_named(head) or not tail.isidentifier()):  # a function may be called nan, or inf
            name, weight = head, float(tail)
    if not 0 < weight < float("inf"):
        raise ValueError(f"reward: the weight in {text!r} lies outside (0, inf)")
    if name.startswith("regex="):
        try:
            re.compile(name.removeprefix("regex="))
        except re.error as error:
            raise ValueError(f"reward: {name!r} is not a regular expression ({error})") from None
    elif not _is_named(name):
        module, dot, function = name.rpartition(".")
        meant = f"did you mean {module}:{function}? " if dot and function.isidentifier() else ""
        raise ValueError(f"reward: {name!r} is not known; {meant}{suggest(name, BUILT_IN)}")
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError('reward: "math" needs the package math-verify; install it, or use "exact" (jsonl.grade)')
    return RewardSpec(name, weight)


def _is_named(text: str) -> bool:
    """Does this have the form of a reward's name?"""
    return text in ("math", "exact", "format") or bool(re.fullmatch(r"regex=.*|[\w-]+(\.\w+)*:[\w.]+", text, re.DOTALL))


def parse_rewards(texts: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Parse each text with `parse_reward`."""
    return tuple(map(parse_reward, texts))


def load_reward(name: str) -> Reward:
    """Load the reward of this name and import the modules it needs.

    Raises:
        Exception: anything that a user's module raises on import.
    """
    if name == "math":
        importlib.import_module("math_verify")
        _check_math()
        return Reward(lambda graded: math_equal(graded.answer, graded.completion), math_answer)
    if name == "exact":
        return Reward(exact_match, lambda completion: last_line(completion) or None)
    if name == "format":
        return Reward(lambda graded: float(marked_answer(graded.completion) is not None), final_answer)
    if name.startswith("regex="):
        return _regex_reward(name.removeprefix("regex="))
    if name.startswith(GYM):
        return _gym_reward(name.removeprefix(GYM))
    module, function = name.split(":")
    loaded: Any = importlib.import_module(module)
    for part in function.split("."):
        loaded = getattr(loaded, part)
    _check_function(function, loaded)
    return Reward(lambda graded: loaded(*graded), final_answer)


def _check_function(name: str, function: Any) -> None:
    """Raise TypeError if every grading with this function would fail."""
    if not callable(function):
        raise TypeError(f"{name} is not a function, but of type {type(function).__name__}")
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(function) for is_kind in kinds):
        raise TypeError(f"{name} is async or a generator; a reward returns a number")
    with contextlib.suppress(ValueError):  # a C function may have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(*Graded._fields)
        except TypeError as error:
            fields = ", ".join(Graded._fields)
            raise TypeError(f"{name}{signature} cannot be called with ({fields}): {error}") from None


def _check_math() -> None:
    """Grade a right and a wrong answer, which also builds the parser's tables before the first time limit starts.

    Raises:
        RuntimeError: one is graded wrongly. math-verify takes errors of the packages below it for unequal answers, so
            that with versions that do not fit each other every completion would get 0.
    """
    graded = [math_equal(r"\sqrt{8}", rf"\boxed{{{found}}}") for found in (r"2\sqrt{2}", r"2\sqrt{3}")]
    if graded != [1.0, 0.0]:
        packages = "math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy"
        versions = ", ".join(f"{package} {package_version(package)}" for package in packages)
        raise RuntimeError(f"2√2 and 2√3 for √8 are graded {graded}; versions that do not fit each other? {versions}")


def exact_match(graded: Graded) -> float:
    """1.0 if the completion's last line that is not blank equals the reference, both stripped."""
    return float(last_line(graded.completion) == graded.answer.strip())


def math_equal(answer: str, completion: str) -> float:
    """1.0 if math-verify finds the completion's final answer equal to the reference, else 0.0.

    The reference may be bare (``\\frac{1}{2}``), in dollars, or boxed.
    """
    math_verify = importlib.import_module("math_verify")
    marked = bool(_BOX.search(answer) or _FORMULA.search(answer))
    reference = final_boxes(answer) if marked else in_latex(rf"\boxed{{{answer}}}")
    read_modulus = with_modulus if has_modulus(answer) else as_remainder
    gold = math_verify.parse(read_modulus(reference), parsing_timeout=None)
    found = math_verify.parse(read_modulus(final_boxes(completion)), parsing_timeout=None)
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def math_answer(completion: str) -> str | None:
    """The final answer as math-verify parses it, printed by the algebra system; None if there is none."""
    found = importlib.import_module("math_verify").parse(with_modulus(final_boxes(completion)), parsing_timeout=None)
    return str(found[0]) if found else None


def final_boxes(completion: str) -> str:
    r"""The completion's text after its thinking, keeping only the boxes of its final answer.

    math-verify takes boxes up to 70 characters apart as parts of one answer, including those of a self-correction. Here
    boxes belong together only within a sentence, with "and", "or" or no word between them. Earlier boxes are replaced
    by their contents, and the final ones are written as ``\boxed{}``. If there are ``<answer>`` elements, only the last
    one counts, and is treated as a box.
    """
    text = completion.rpartition(_THOUGHT)[2]
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1].strip().rstrip(".")
        prose = len(_WORD.findall(_AND.sub("", text))) > 1 and re.search(r"\d", text)
        text = text if prose or _BOX.search(text) else rf"\boxed{{{text}}}"
    text = _EMPTY.sub("", text)
    if not _BOX.search(text):
        text = _CHOICE.sub(r"\\boxed{\1}", text)
    found = [box for box in _boxes(text) if box.closed]
    first = len(found) - 1
    while first > 0 and _one_answer(text[found[first - 1].end : found[first].start]):
        first -= 1
    pieces, end = [], 0
    for number, box in enumerate(found):
        kept = rf"\boxed{{{boxed(box.content) or box.content}}}"
        pieces += [text[end : box.start], kept if number >= first else _BOX.sub("", box.content)]
        end = box.end
    return in_latex("".join([*pieces, text[end:]]))


def _one_answer(between: str) -> bool:
    """Are the boxes before and after this text parts of one answer?"""
    return not _SENTENCE_END.search(between) and bool(_AND.search(between) or not _WORD.search(between))


def last_line(text: str) -> str:
    """The last line of a text that is not blank, stripped; "" if there is none."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def boxed(text: str) -> str | None:
    r"""The content of a text's last ``\boxed`` (or ``\fbox``), the innermost of nested ones; None if there is none.

    The braces may be missing, as in ``\boxed 5``; a box that is never closed extends to the end.
    """
    return next((box.content for match in reversed([*_BOX.finditer(text)]) if (box := _box(text, match))), None)


def _boxes(text: str) -> Iterator[Box]:
    """The outermost boxes of a text."""
    end = 0
    for match in _BOX.finditer(text):
        if match.start() >= end and (box := _box(text, match)):
            end = box.end
            yield box


def _box(text: str, match: re.Match[str]) -> Box | None:
    begin = match.end()
    if not text.startswith("{", begin):
        bare = _BARE.match(text, begin)
        return bare and Box(match.start(), bare[0].strip(), bare.end())
    depth = 0
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return Box(match.start(), text[begin + 1 : i].strip(), i + 1)
    return Box(match.start(), text[begin + 1 :].strip(), len(text), closed=False)


def marked_answer(completion: str) -> str | None:
    r"""The last ``<answer>`` element after the thinking, else the last ``\boxed{}`` there, else None."""
    answer = completion.rpartition(_THOUGHT)[2]
    if tagged := _ANSWER_TAG.findall(answer):
        return str(tagged[-1]).strip()
    return boxed(answer)


def final_answer(completion: str) -> str:
    """The completion's answer: the marked one, else its last line."""
    marked = marked_answer(completion)
    return last_line(completion) if marked is None else marked


def _regex_reward(pattern: str) -> Reward:
    compiled = re.compile(pattern, re.DOTALL | re.MULTILINE)

    def extract(completion: str) -> str | None:
        matches = list(compiled.finditer(completion))
        if not matches:
            return None
        return (matches[-1].group(1) or "").strip() if compiled.groups else final_answer(completion)

    def grade(graded: Graded) -> float:
        if not compiled.groups:
            return float(compiled.search(graded.completion) is not None)
        return float(extract(graded.completion) == graded.answer.strip())

    return Reward(grade, extract)


def _gym_reward(dataset: str) -> Reward:
    score = importlib.import_module("reasoning_gym").get_score_answer_fn(dataset)
    return Reward(lambda graded: score(final_answer(graded.completion), graded.data["entry"]), final_answer)
