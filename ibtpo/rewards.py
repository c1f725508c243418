r"""Rewards: what grades a completion, by name. Runs in grading processes (grading_worker.py), imports no torch.

====================  ==========================================================================================
``math``              math-verify: the completion's final answer equals the reference
``exact``             its last line that is not blank equals the reference
``regex=PATTERN``     the pattern is found; where it has a group, the last match's group equals the reference
``format``            the answer is given as ``\boxed{...}`` or ``<answer>...</answer>``
``reasoning-gym:X``   the score of reasoning-gym's dataset X
``module:function``   a function of your own: ``function(prompt, completion, answer, data) -> float`` in [0, 1]
====================  ==========================================================================================

Each may be followed by ``:WEIGHT``; several make the weighted mean.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

GYM = "reasoning-gym:"
BUILT_IN = ("math", "exact", "format", "regex=PATTERN", GYM + "NAME", "package.module:function")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = r"\boxed{"


class Graded(NamedTuple):
    """What is graded, and what it is graded against."""

    prompt: str | list[dict[str, str]]
    """The problem's prompt."""
    completion: str
    """What the policy wrote below it."""
    answer: str
    """The reference answer."""
    data: dict[str, Any]
    """Whatever else the task knows of the problem."""


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
    """The answer a completion gives, in a form in which equal answers are equal texts; None: it gives none."""


def parse_reward(text: str) -> RewardSpec:
    """``NAME`` or ``NAME:WEIGHT``; a pattern that itself ends in ``:number`` needs a weight behind it.

    Raises:
        ValueError: the name is not known, or the weight is not above 0.
    """
    name, weight = text, 1.0
    head, colon, tail = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon:
            name, weight = head, float(tail)
    if not 0 < weight < float("inf"):
        raise ValueError(f"reward: the weight in {text!r} lies outside (0, inf)")
    if name.startswith("regex="):
        try:
            re.compile(name.removeprefix("regex="))
        except re.error as error:
            raise ValueError(f"reward: {name!r} is not a regular expression ({error})") from None
    elif name not in ("math", "exact", "format") and not re.fullmatch(r"[\w-]+(\.\w+)*:[\w.]+", name):
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
        guess = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f"reward: {name!r} is not known; {guess}known: {', '.join(BUILT_IN)}")
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError('reward: "math" needs the package math-verify; install it, or use "exact" (jsonl.grade)')
    return RewardSpec(name, weight)


def parse_rewards(texts: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Every reward of a list; see `parse_reward`."""
    return tuple(map(parse_reward, texts))


def load_reward(name: str) -> Reward:
    """The reward of this name, with whatever it imports imported.

    Raises:
        Exception: whatever a module of the user's raises while it is imported.
    """
    if name == "math":
        importlib.import_module("math_verify")
        math_equal("1", r"\boxed{1}")  # builds the parser's tables before any clock runs
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
    return Reward(lambda graded: loaded(*graded), final_answer)


def exact_match(graded: Graded) -> float:
    """1.0 if the completion's last line that is not blank equals the reference, both stripped."""
    return float(last_line(graded.completion) == graded.answer.strip())


def math_equal(answer: str, completion: str) -> float:
    """1.0 if the completion's final answer equals the reference, as math-verify sees it, else 0.0.

    The reference may be bare (``\\frac{1}{2}``), in dollars, or boxed.
    """
    math_verify = importlib.import_module("math_verify")
    marked = any(mark in answer for mark in ("$", _BOXED, r"\(", r"\["))
    gold = math_verify.parse(answer if marked else f"{_BOXED}{answer}}}", parsing_timeout=None)
    found = math_verify.parse(completion, parsing_timeout=None)
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def math_answer(completion: str) -> str | None:
    """The final answer as math-verify parses it, written out by the algebra system; None if there is none."""
    found = importlib.import_module("math_verify").parse(completion, parsing_timeout=None)
    return str(found[0]) if found else None


def last_line(text: str) -> str:
    """The last line of a text that is not blank, stripped; "" if there is none."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` of a text holds, to its end where the brace is never closed; None without one."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
    return text[start:].strip()


def marked_answer(completion: str) -> str | None:
    r"""The last ``<answer>`` element, else the last ``\boxed{}``, else None."""
    if tagged := _ANSWER_TAG.findall(completion):
        return str(tagged[-1]).strip()
    return boxed(completion)


def final_answer(completion: str) -> str:
    """What a completion answers: as marked, else its last line."""
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
