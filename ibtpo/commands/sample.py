"""``ibtpo sample``: grow one tree and print it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ibtpo.commands.arguments import (
    UNUSED_BY_SAMPLE,
    Flat,
    Preset,
    base_of_model,
    check_used,
    parse,
    with_data,
    without,
)
from ibtpo.config import TrainConfig
from ibtpo.loading import loading
from ibtpo.validation import check_range


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Grow one tree and print it: steps with value, IB-Score, confidence, and the round they were sampled in."""

    preset: Preset = "ib-tpo"
    config: Path | None = None
    """YAML file with any of the fields below."""
    prompt: str | None = None
    """Prompt to answer; by default problem number --index of the task. "\\n" stands for a newline."""
    answer: str | None = None
    """Right answer to --prompt; required unless the task is digit-chain."""
    index: int = 0
    """Number of the training problem that is used when no prompt is given, from 0."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=lambda: without(TrainConfig(), UNUSED_BY_SAMPLE))


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    check_used("ibtpo sample", UNUSED_BY_SAMPLE, arguments)
    base = without(base_of_model(arguments), UNUSED_BY_SAMPLE)
    parsed = parse(SampleArguments, SampleArguments(run=base), "ibtpo sample", arguments)
    check_range("index", parsed.index, low=0)
    with loading():
        from ibtpo.outline import print_tree

    print_tree(with_data(parsed.run), console, prompt=parsed.prompt, answer=parsed.answer, index=parsed.index)
    return 0
