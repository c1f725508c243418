"""Commands that must be refused, and small settings for those that must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibtpo.cli import main

SMALL = [
    "--sampled-tokens", "150", "--prompts-per-step", "4", "--search.rounds", "2", "--sampling.max-tokens", "14",
    "--eval.prompts", "3", "--eval.samples", "2",
]  # fmt: skip
SHORT = ["--sampling.max-tokens", "14"]
DIGITS = [
    "--digits.min-ops",
    "1",
    "--digits.max-ops",
    "2",
    "--warm-start.max-updates",
    "2",
    "--warm-start.batch-size",
    "4",
]


class Refusal:
    """Runs commands that must be refused, and checks how."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self._capsys = out, capsys

    def __call__(self, *arguments: object, command: str = "train", written: bool = False) -> str:
        """What is printed; the exit code must be 2, the text one paragraph, and nothing left behind."""
        self._capsys.readouterr()
        out = ["--out", self.out] if command == "train" and "--resume" not in arguments else []
        try:
            code = main([command, *map(str, [*arguments, *out])])
        except SystemExit as stop:  # tyro's own, on what is not a flag or not of its type
            code = stop.code
        message = self._capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert message.strip()
        assert "\n\n" not in message.strip()
        assert written or not self.out.exists()
        return " ".join(message.replace("│", " ").split())
