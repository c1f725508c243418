"""The task interface: poses problems, holds some out, and grades completions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibtpo.config import JsonlConfig
from ibtpo.sections.jsonl import parse_options

HELD_OUT_SHARE = 8  # one in 8 generated prompts is held out for evaluation


@dataclass(frozen=True)
class Problem:
    """A prompt and its reference answer."""

    prompt: str | list[dict[str, str]]
    """Plain text, or chat messages with "role" and "content"."""
    answer: str
    """Reference answer, as text."""
    data: dict[str, Any] = field(default_factory=dict)
    """Other fields for rewards; "where" is the problem's place in a data file."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples shown before the prompt: (prompt, solution)."""


class Grades(Protocol):
    """Grades completions."""

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float | Future[float]:
        """Reward in [0, 1] of a completion, or a future of it; a truncated one gets 0."""

    def extract(self, problem: Problem, completion: str) -> str | Future[str | None] | None:
        """The completion's answer, normalised so that equal answers are equal texts; None if it gives none."""

    def counts(self) -> dict[str, float]:
        """Number of gradings that failed and timed out so far, by metric name; empty if none can."""

    def close(self) -> None:
        """End background processes."""


class Task(Grades, Protocol):
    """Poses problems and grades completions; every method is deterministic given the task's seed."""

    @property
    def name(self) -> str:
        """The task as the command line calls it."""

    @property
    def separator(self) -> str:
        """Text that ends a reasoning step of this task."""

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index (>= 0, unbounded); seed and index decide it."""

    def eval_problems(self, n: int) -> Sequence[Problem]:
        """Up to `n` held-out problems, none of which `train_problem` ever returns."""


class WorkedSolution(NamedTuple):
    """A completion drawn from a task's teacher."""

    text: str
    logprob: float
    """Log-probability of the text under the teacher, in nats."""


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task with worked solutions, from which the built-in policy's warm start learns."""

    def worked_solution(self, problem: Problem, rng: np.random.Generator) -> WorkedSolution:
        """A completion of the problem's prompt, drawn from the task's teacher."""


def seeded(seed: int, *stream: int) -> np.random.Generator:
    """An independent generator for every (seed, stream); any integers are allowed."""
    return np.random.default_rng([value & 0xFFFF_FFFF_FFFF_FFFF for value in (seed, *stream)])


def is_held_out(prompt: str) -> bool:
    """Is a generated prompt held out for evaluation?

    The prompt's hash decides, so training and evaluation never share a prompt, for any seed, index or size of the space
    that prompts are drawn from.
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def format_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, config: JsonlConfig) -> list[int]:
    """Token ids of a problem's prompt, ready to be continued.

    With a chat template (and ``config.chat_template``) the prompt becomes the user's message, followed by the header of
    the assistant's turn; worked examples are earlier turns. Without one, the text is encoded as it is, after the system
    prompt and the examples, if any, separated by blank lines. The problem's own system message takes precedence over
    ``config.system_prompt``.

    Raises:
        ValueError: the prompt is chat messages, and there is no chat template, or it rejects them; or the vocabulary
            lacks a character of it.
    """
    where = problem.data.get("where", "the prompts")
    if config.chat_template and getattr(tokenizer, "chat_template", None):
        messages = _messages(problem, config.system_prompt)
        options = parse_options(config.chat_template_options)
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # a template may raise anything to reject messages
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{where}: the tokenizer's chat template cannot format messages of "
                f"{roles} ({type(error).__name__}: {error}); give it the roles it knows (without --jsonl.system-prompt "
                "if it knows no system), fix the template, or set --jsonl.no-chat-template"
            ) from None
        return _encode(tokenizer, str(text), where, add_special_tokens=False)  # the template writes these itself
    if not isinstance(problem.prompt, str):
        raise ValueError(
            "the prompts are chat messages, but the tokenizer has no chat template (or jsonl.chat_template is false); "
            "use a model folder whose tokenizer has one, or give the prompts as plain strings"
        )
    before = [] if config.system_prompt is None else [config.system_prompt]
    before += [f"{prompt}\n\n{solution}" for prompt, solution in problem.examples]
    return _encode(tokenizer, "\n\n".join([*before, problem.prompt]), where)


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, where: object, *, add_special_tokens: bool = True
) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception as error:  # a vocabulary of characters without an unknown token raises a plain one
        raise ValueError(
            f"{where}: the tokenizer cannot encode the prompt ({error}); use a model whose vocabulary has all its "
            "characters (the built-in policy's has digits, + - * = ? . and newlines)"
        ) from None


def _messages(problem: Problem, system_prompt: str | None) -> list[dict[str, str]]:
    prompt = problem.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    own = messages[0]["role"] == "system"
    system = (
        messages[:1] if own else [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    )
    turns = [
        {"role": role, "content": text}
        for example in problem.examples
        for role, text in zip(("user", "assistant"), example, strict=True)
    ]
    return [*system, *turns, *messages[own:]]
