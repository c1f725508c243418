"""Settings `jsonl.*`: a data file and its grading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ibtpo.validation import check_choices, check_range

_OURS = ("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize")


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """A data file of prompts and answers (docs/data.md), and how completions are graded."""

    prompt_field: str | None = None
    """Field with the prompt, text or a list of chat messages; a.b is field b inside a. By default the layout's."""
    answer_field: str | None = None
    """Field with the reference answer. By default the layout's."""
    data_fields: tuple[str, ...] = ()
    """Further fields that a reward function of your own receives, in its argument `data`."""
    template: str | None = None
    """Text that the policy is given, with {prompt} in the place of the prompt. By default the layout's."""
    system_prompt: str | None = None
    """System message of the chat, put before every prompt."""
    few_shot: Path | None = None
    """Data file of the same layout; all its rows are shown as worked examples before every prompt."""
    chat_template: bool = True
    """Format prompts with the tokenizer's chat template if it has one."""
    chat_template_options: tuple[str, ...] = ()
    """NAME=VALUE ...: further arguments of the chat template, as enable_thinking=false; values are JSON or text."""
    max_prompt_tokens: int | None = None
    """Rows whose formatted prompt has more tokens are left out."""
    pass_rate_field: str | None = None
    """Field with the share of attempts, from 0 to 1, in which a model solved the prompt; the next two filter by it."""
    min_pass_rate: float = 0.0
    """Rows with a lower pass rate are left out."""
    max_pass_rate: float = 1.0
    """Rows with a higher pass rate are left out."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows with the same prompt and answer as an earlier row: drop them, or keep them."""
    unanswered: Literal["refuse", "drop"] = "refuse"
    """Rows whose answer is missing or not in the layout's form: refuse the file, or drop the rows."""
    eval_fraction: float = 0.1
    """Share of the prompts held out for evaluation (at least one); 1 holds out all, for `ibtpo eval`."""
    eval_count: int | None = None
    """Number of prompts held out, instead of a share."""
    eval_data: Path | None = None
    """Data file to evaluate on, instead of holding out rows; its prompts are left out of training."""
    grade: Literal["math", "exact"] = "math"
    """Grading without --reward. math: by math-verify; exact: the stripped last line must equal the answer."""
    grade_workers: int = 1
    """Number of worker processes that grade."""
    grade_timeout: float = 5.0
    """Seconds after which a reward counts as 0 (and is counted as timed out)."""
    max_failed_share: float = 0.5
    """Stop when more than this share of the last 100 gradings failed or timed out; 1: never stop."""

    def __post_init__(self) -> None:
        check_choices(self, "jsonl.")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"jsonl.template: {self.template!r} has no {{prompt}}; write it where the prompt goes")
        parse_options(self.chat_template_options)
        if self.max_prompt_tokens is not None:
            check_range("jsonl.max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_range("jsonl.min_pass_rate", self.min_pass_rate, low=0.0, high=1.0)
        check_range("jsonl.max_pass_rate", self.max_pass_rate, low=self.min_pass_rate, high=1.0)
        check_range("jsonl.eval_fraction", self.eval_fraction, low=0.0, high=1.0)
        if self.eval_count is not None:
            check_range("jsonl.eval_count", self.eval_count, low=1)
        check_range("jsonl.grade_workers", self.grade_workers, low=1)
        check_range("jsonl.grade_timeout", self.grade_timeout, low=0.0, low_open=True)
        check_range("jsonl.max_failed_share", self.max_failed_share, low=0.0, high=1.0)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as a mapping; a value is JSON (false, 3, "3", [1, 2]), and text where it is not.

    Raises:
        ValueError: no name, or one that is not free.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in _OURS:
            raise ValueError(
                f"jsonl.chat_template_options: {text!r} is not NAME=VALUE with a name other than {', '.join(_OURS)}; "
                "write it as in enable_thinking=false"
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
