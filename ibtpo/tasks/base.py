"""What a task is: it poses problems, holds some out, and grades completions."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibtpo.config import JsonlConfig
from ibtpo.sections.jsonl import parse_options

HELD_OUT_SHARE = 8  # one generated prompt in so many belongs to evaluation


@dataclass(frozen=True)
class Problem:
    """A prompt and what a right completion must come to."""

    prompt: str | list[dict[str, str]]
    """Plain text, or chat messages with "role" and "content"."""
    answer: str
    """Reference answer, as text."""
    data: dict[str, Any] = field(default_factory=dict)
    """Whatever else rewards need; "where" says where in a data file it is from."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples shown before the prompt: (prompt, solution)."""


class Grades(Protocol):
    """Whoever can say how good a completion is."""

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float | Future[float]:
        """Reward in [0, 1] of a completion, now or later; a truncated one gets 0."""

    def extract(self, problem: Problem, completion: str) -> str | Future[str | None] | None:
        """The answer a completion gives, in a form in which equal answers are equal texts; None if it gives none."""

    def counts(self) -> dict[str, float]:
        """How many gradings failed and timed out so far, under the names of the log; empty where none can."""

    def close(self) -> None:
        """End whatever runs in the background."""


class Task(Grades, Protocol):
    """Poses problems and grades completions; every method is deterministic given the task's seed."""

    @property
    def name(self) -> str:
        """The task as the command line calls it."""

    @property
    def separator(self) -> str:
        """Text that ends a reasoning step of this task."""

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index (>= 0, unbounded), the same for the same seed and index."""

    def eval_problems(self, n: int) -> list[Problem]:
        """Up to `n` held-out problems, none of which `train_problem` ever returns."""


class WorkedSolution(NamedTuple):
    """A completion drawn from a task's teacher."""

    text: str
    logprob: float
    """Log-probability of the text under the teacher, in nats."""


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task that can show how it is done: what the warm start of the built-in policy learns from."""

    def worked_solution(self, problem: Problem, rng: np.random.Generator) -> WorkedSolution:
        """A completion of the problem's prompt, drawn from the task's teacher."""


def seeded(seed: int, *stream: int) -> np.random.Generator:
    """A generator of its own for every (seed, stream); any integers will do."""
    return np.random.default_rng([value & 0xFFFF_FFFF_FFFF_FFFF for value in (seed, *stream)])


def is_held_out(prompt: str) -> bool:
    """Does a generated prompt belong to evaluation?

    Decided by the prompt's own hash, so training and evaluation cannot meet, whatever the seed, the index, or the
    size of the space prompts are drawn from.
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def format_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, config: JsonlConfig) -> list[int]:
    """Token ids of a problem's prompt, ready to be continued.

    With a chat template (and ``config.chat_template``) the prompt becomes the user's message, with the header of the
    assistant's turn appended; worked examples are turns before it. Without one, text is encoded as it is, below the
    system prompt and the examples if there are any, with a blank line between them. A system message of the problem's
    own wins over ``config.system_prompt``.

    Raises:
        ValueError: chat messages, but no chat template to format them with, or one that does not take them.
    """
    if config.chat_template and getattr(tokenizer, "chat_template", None):
        messages = _messages(problem, config.system_prompt)
        options = parse_options(config.chat_template_options)
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # a template is a program of the tokenizer's, and says by raising what it refuses
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{problem.data.get('where', 'the prompts')}: the tokenizer's chat template cannot format messages of "
                f"{roles} ({type(error).__name__}: {error}); give it the roles it knows (without --jsonl.system-prompt "
                "if it knows no system), mend the template, or set --jsonl.no-chat-template"
            ) from None
        return list(tokenizer.encode(text, add_special_tokens=False))  # the template writes the special tokens itself
    if not isinstance(problem.prompt, str):
        raise ValueError(
            "the prompts are chat messages, but the tokenizer has no chat template (or jsonl.chat_template is false); "
            "use a model folder whose tokenizer has one, or give the prompts as plain strings"
        )
    before = [] if config.system_prompt is None else [config.system_prompt]
    before += [f"{prompt}\n\n{solution}" for prompt, solution in problem.examples]
    return list(tokenizer.encode("\n\n".join([*before, problem.prompt])))


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
