"""The run folder in every process but rank 0: read-only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ibtpo.checkpoints import Checkpoint
from ibtpo.config import TrainConfig
from ibtpo.runlog import RunFolder


class Follower(RunFolder):
    """A run folder that only rank 0 writes; the methods that write do nothing here.

    Args:
        path: of the folder.
        last: the checkpoint the run resumes from, or None.
    """

    def __init__(self, path: Path, last: Checkpoint | None) -> None:
        self.path = path
        self.last = last
        self.evaluations = []  # rank 0 knows them

    def configure(self, config: TrainConfig) -> None:
        """Rank 0 does."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 does."""

    def add_tree(self, step: int, record: Mapping[str, Any], *, most_bytes: float = 0.0) -> None:
        """Rank 0 does."""

    def checkpoint(self, step: int, write: Callable[[Path], object], *, keep: int = 0) -> Path:
        """Rank 0 does."""
        return self.path

    def close(self) -> None:
        """Nothing is open."""
