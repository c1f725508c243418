"""The built-in task: left-to-right arithmetic modulo 10, one operation a step.

::

    7*8-5+3*9=?                             the prompt: a start digit, then operations with operands 2 to 9
    7*8=6  6-5=1  1+3=4  4*9=6  6.          the worked answer, a line a step; "." ends it

A step applies one of 240 facts (a, operation, b). The warm start learns from an imperfect teacher with its own error
rate for each fact, so the policy's accuracy is set by the data, not by the moment training stops, and the headroom
above it is known exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ibtpo.config import DigitChainConfig
from ibtpo.tasks.base import Problem, WorkedSolution, is_held_out, seeded

OPERATIONS = "+-*"
OPERANDS = range(2, 10)
END = "."
PAD = "<pad>"
SYMBOLS = "0123456789" + OPERATIONS + "=?\n" + END
_TRAIN, _EVAL, _TEACHER = range(3)  # streams of random numbers
_LARGEST_ERROR_RATE = 0.9
_FIXED_MISTAKE_SHARE = 0.5

Fact = tuple[int, str, int]
"""(a, operation, b)."""


def result(fact: Fact) -> int:
    """The right digit of a fact: a (operation) b modulo 10."""
    a, operation, b = fact
    return {"+": a + b, "-": a - b, "*": a * b}[operation] % 10


def all_facts() -> list[Fact]:
    """The 240 facts, in a fixed order."""
    return [(a, operation, b) for a in range(10) for operation in OPERATIONS for b in OPERANDS]


@dataclass(frozen=True)
class Mistakes:
    """The teacher's errors on one fact."""

    rate: float
    """Probability of a mistake."""
    digit: int
    """The answer in half of the mistakes; in the others it is any wrong digit."""

    def probability(self, digit: int, right: int) -> float:
        """Probability that the teacher answers `digit` if `right` is the right digit."""
        if digit == right:
            return 1 - self.rate
        return self.rate * (_FIXED_MISTAKE_SHARE * (digit == self.digit) + (1 - _FIXED_MISTAKE_SHARE) / 9)


def imperfect_teacher(seed: int, exponent: float) -> dict[Fact, Mistakes]:
    """Error rates 0.9 * u**exponent, u uniform, and a favourite wrong digit, for every fact."""
    rng = seeded(seed, _TEACHER)
    teacher = {}
    for fact in all_facts():
        rate = _LARGEST_ERROR_RATE * float(rng.random()) ** exponent
        teacher[fact] = Mistakes(rate, _another_digit(result(fact), rng))
    return teacher


class DigitChain:
    """The task; `config` sets lengths, grading and the teacher, `seed` the problems and the teacher's weak facts."""

    name = "digit-chain"
    separator = "\n"

    def __init__(self, config: DigitChainConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.teacher = imperfect_teacher(seed, config.teacher_exponent)

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index, drawn anew for every index, never a held-out one."""
        return self._draw(_TRAIN, index, held_out=False)

    def eval_problems(self, n: int) -> list[Problem]:
        """`n` held-out problems."""
        return [self._draw(_EVAL, index, held_out=True) for index in range(n)]

    def longest_problem(self) -> Problem:
        """A problem with the longest possible prompt."""
        return make_problem(0, [(OPERATIONS[0], OPERANDS.start)] * self.config.max_ops)

    def grade(self, problem: Problem, completion: str, truncated: bool) -> float:
        """1 if the derivation is right (strict: every line of it; last: the final digit alone), else 0."""
        text = completion.removesuffix(END)
        if truncated:
            return 0.0
        if self.config.grade == "last":
            return float(text.rsplit("\n", 1)[-1] == problem.answer)
        return float(text == right_solution(problem).removesuffix(END))

    def extract(self, problem: Problem, completion: str) -> str | None:
        """The final digit, or the text in its place."""
        return completion.removesuffix(END).rsplit("\n", 1)[-1] or None

    def counts(self) -> dict[str, float]:
        """Grading here cannot fail."""
        return {}

    def worked_solution(self, problem: Problem, rng: np.random.Generator) -> WorkedSolution:
        """A worked answer by the imperfect teacher; after a mistake the chain continues from the wrong digit."""
        logprob = 0.0

        def answer(fact: Fact) -> int:
            nonlocal logprob
            digit = self._teach(fact, rng)
            logprob += math.log(self.teacher[fact].probability(digit, result(fact)))
            return digit

        return WorkedSolution(_work(problem, answer), logprob)

    def close(self) -> None:
        """Do nothing: there are no background processes."""

    def _teach(self, fact: Fact, rng: np.random.Generator) -> int:
        mistakes = self.teacher[fact]
        if rng.random() >= mistakes.rate:
            return result(fact)
        return mistakes.digit if rng.random() < _FIXED_MISTAKE_SHARE else _another_digit(result(fact), rng)

    def _draw(self, stream: int, index: int, held_out: bool) -> Problem:
        rng = seeded(self.seed, stream, index)
        while True:
            problem = self._random_problem(rng)
            if is_held_out(str(problem.prompt)) == held_out:
                return problem

    def _random_problem(self, rng: np.random.Generator) -> Problem:
        length = int(rng.integers(self.config.min_ops, self.config.max_ops + 1))
        operations = rng.integers(len(OPERATIONS), size=length)
        operands = rng.integers(OPERANDS.start, OPERANDS.stop, size=length)
        chain = [(OPERATIONS[o], int(b)) for o, b in zip(operations, operands, strict=True)]
        return make_problem(int(rng.integers(10)), chain)


def make_problem(start: int, chain: list[tuple[str, int]]) -> Problem:
    """The problem that applies each (operation, operand) of `chain` to `start`, left to right."""
    prompt = str(start) + "".join(f"{operation}{b}" for operation, b in chain) + "=?\n"
    data = {"start": start, "chain": [list(step) for step in chain]}
    value = start
    for operation, b in chain:
        value = result((value, operation, b))
    return Problem(prompt, str(value), data)


def parse_prompt(prompt: str) -> Problem:
    """The problem of a prompt such as ``"7*8-5=?\\n"``.

    Raises:
        ValueError: the text is not such a prompt.
    """
    if not re.fullmatch(r"\d([-+*][2-9])+=\?\n", prompt):
        raise ValueError(
            f'prompt {prompt!r} is not of the form "7*8-5=?": a digit, operations with operands 2 to 9, and =?'
        )
    return make_problem(int(prompt[0]), [(o, int(b)) for o, b in re.findall(r"([-+*])(\d)", prompt[1:])])


def right_solution(problem: Problem) -> str:
    """The worked answer without a mistake."""
    return _work(problem, result)


def _work(problem: Problem, answer: Callable[[Fact], int]) -> str:
    value, lines = problem.data["start"], []
    for operation, b in problem.data["chain"]:
        before, value = value, answer((value, operation, b))
        lines.append(f"{before}{operation}{b}={value}\n")
    return "".join(lines) + f"{value}{END}"


def _another_digit(digit: int, rng: np.random.Generator) -> int:
    return int(digit + rng.integers(1, 10)) % 10


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character of `SYMBOLS`, padding, and "." as the token that ends a completion.

    Encoding adds no tokens, and decoding returns exactly the text. Saves and loads like any tokenizer folder.
    """
    vocabulary = {symbol: i for i, symbol in enumerate([PAD, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
