"""Where metrics go besides metrics.jsonl: TensorBoard always, Weights & Biases and Trackio when asked for.

A run does not end because a logger does: one that raises is dropped with a warning, the others go on.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

PROJECT = "ibtpo"


class Logger(Protocol):
    """Takes the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take finite values; several calls may share a step."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, path: Path, purge_step: int | None) -> None:
        self._writer = SummaryWriter(str(path), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar each, on disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Tracker:
    """A run of Weights & Biases or of Trackio, which has the same interface; named after the run folder.

    The step is logged as a value, so a resumed run may go back to its checkpoint.
    """

    def __init__(self, module: str, path: Path, config: Mapping[str, Any]) -> None:
        self._module: Any = importlib.import_module(module)
        name = path.resolve().name
        if module == "wandb":
            options = {"id": "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:64], "dir": str(path)}
        else:
            options = {}
        self._run = self._module.init(project=PROJECT, name=name, config=dict(config), resume="allow", **options)
        if module == "wandb":
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values."""
        self._module.log({"step": step, **values})

    def close(self) -> None:
        """Mark the run as finished."""
        self._module.finish()


class Loggers:
    """Several loggers as one that never raises.

    Args:
        makers: a function that opens each logger, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Logger]]) -> None:
        self._open: dict[str, Logger] = {}
        for name, make in makers.items():
            self._try(name, lambda name=name, make=make: self._open.__setitem__(name, make()))  # type: ignore[misc]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hand the known values to every logger that still works."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.log(step, known))  # type: ignore[misc]

    def close(self) -> None:
        """Close them all."""
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)
        self._open.clear()

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a foreign logger raises; the run matters more
            self._open.pop(name, None)
            warnings.warn(
                f"logging to {name} stopped ({type(error).__name__}: {error}); metrics.jsonl has everything",
                RuntimeWarning,
                stacklevel=3,
            )


def parse_names(log: str) -> list[str]:
    """The loggers named in `TrainConfig.log`, "wandb,trackio"."""
    return [name for name in log.split(",") if name]


def check_installed(log: str) -> None:
    """Raise ValueError if a logger in `log` is not installed."""
    for name in parse_names(log):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log: {name} is not installed; pip install {name}, or leave out --log {name}")


def open_loggers(path: Path, names: Sequence[str], config: Mapping[str, Any], purge_step: int | None) -> Loggers:
    """TensorBoard and the named loggers for the run in `path`."""
    makers: dict[str, Callable[[], Logger]] = {"tensorboard": lambda: TensorBoard(path, purge_step)}
    for name in names:
        makers[name] = lambda name=name: Tracker(name, path, config)  # type: ignore[misc]
    return Loggers(makers)
