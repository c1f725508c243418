"""Tasks of the optional package reasoning-gym: generated problems, graded by the package's own rules."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ibtpo.config import JsonlConfig
from ibtpo.rewards import GYM, RewardSpec
from ibtpo.tasks.base import Problem, is_held_out
from ibtpo.tasks.grades import RewardGrades
from ibtpo.validation import suggest
from ibtpo_engine.randomness import mix

_TRAIN, _EVAL = range(2)  # streams of random numbers
_SIZE = 1 << 40  # problems are generated on request; the size only bounds the index
_ATTEMPTS = 256  # draws after which a dataset is taken to have too few different problems


class GymTask(RewardGrades):
    """``reasoning-gym:NAME``, for example ``reasoning-gym:chain_sum``; graded by the package's score by default.

    Raises:
        ValueError: the package is not installed, or has no dataset of this name.
        GraderError: a reward cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        seed: int = 0,
        separator: str = "\n\n",
        *,
        config: JsonlConfig | None = None,
        rewards: tuple[RewardSpec, ...] = (),
    ) -> None:
        self.separator = separator
        dataset = name.removeprefix(GYM)
        self.name = GYM + dataset
        package = _import_package()
        _check_name(package, dataset)
        self._datasets = {
            stream: package.create_dataset(dataset, size=_SIZE, seed=mix(seed, stream) % (1 << 31))
            for stream in (_TRAIN, _EVAL)
        }
        super().__init__(rewards or (RewardSpec(self.name),), config or JsonlConfig())

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index, never a held-out one."""
        return self._draw(_TRAIN, index, held_out=False)

    def eval_problems(self, n: int) -> list[Problem]:
        """`n` held-out problems."""
        return [self._draw(_EVAL, index, held_out=True) for index in range(n)]

    def _draw(self, stream: int, index: int, held_out: bool) -> Problem:
        for attempt in range(_ATTEMPTS):
            entry = self._datasets[stream][index * _ATTEMPTS + attempt]
            if is_held_out(entry["question"]) == held_out:
                return Problem(entry["question"], str(entry["answer"]), {"entry": entry})
        side = "held-out" if held_out else "training"
        raise ValueError(
            f"{self.name}: {_ATTEMPTS} draws gave no {side} problem, since the dataset has too few different problems; "
            "choose another"
        )


def _import_package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"task {GYM}NAME: the package reasoning-gym cannot be imported ({error}); "
            'install it with: pip install "ibtpo[gym]"  (or: pip install reasoning-gym)'
        ) from error


def _check_name(package: ModuleType, name: str) -> None:
    known = sorted(importlib.import_module(f"{package.__name__}.factory").DATASETS)
    if name not in known:
        raise ValueError(f'task "{GYM}{name}": reasoning-gym has no dataset of this name; {suggest(name, known)}')
