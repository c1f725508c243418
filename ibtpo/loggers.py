"""Loggers besides metrics.jsonl: TensorBoard always, Weights & Biases and Trackio if configured.

A failing logger does not end the run: it is dropped with a warning, and the others go on.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ibtpo.disk import write_atomically

PROJECT = "ibtpo"
IDENTITY = ".run-id"


class Logger(Protocol):
    """Logs the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite values; several calls may share a step."""

    def close(self) -> None:
        """Finish; there are no more values."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, path: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: reading a run's log needs no torch

        self._writer = SummaryWriter(str(path), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar; the event file is flushed before this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Tracker:
    """A run of Weights & Biases or of Trackio, whose interfaces are nearly the same; named after the run folder.

    A resumed run continues the same one, and its steps may go back to those after the checkpoint. wandb rejects
    decreasing steps, so there the step is logged as a metric.
    """

    def __init__(self, module: str, path: Path, config: Mapping[str, Any]) -> None:
        self._module: Any = importlib.import_module(module)
        self._takes_step = module == "trackio"  # which reserves the name "step"
        name, identity = path.resolve().name, _identity(path)
        options = {"id": identity, "name": name, "dir": str(path)}
        if self._takes_step:
            options = {"name": f"{name}-{identity}"}  # folders may share a name, and trackio identifies runs by name
        self._run = self._module.init(project=PROJECT, config=dict(config), resume="allow", **options)
        if not self._takes_step:
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values."""
        if self._takes_step:
            self._module.log(dict(values), step=step)
        else:
            self._module.log({"step": step, **values})

    def close(self) -> None:
        """Mark the run as finished."""
        self._module.finish()


def _identity(path: Path) -> str:
    """Eight hex digits that identify a run folder, also after it was moved."""
    file = path / IDENTITY
    if not file.is_file():
        write_atomically(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


class Loggers:
    """Several loggers as one that never raises.

    Args:
        makers: a function that opens each logger, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Logger]]) -> None:
        self._open: dict[str, Logger] = {}
        for name, make in makers.items():
            with self._dropping(name):
                self._open[name] = make()

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Pass the values that are not None to every logger that still works."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, logger in list(self._open.items()):
            with self._dropping(name):
                logger.log(step, known)

    def close(self) -> None:
        """Close them all."""
        for name, logger in list(self._open.items()):
            with self._dropping(name):
                logger.close()
        self._open.clear()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Drop a logger that raises in the block."""
        try:
            yield
        except Exception as error:  # a logger may raise anything; the run must go on
            self._open.pop(name, None)
            warnings.warn(
                f"logging to {name} stopped ({type(error).__name__}: {error}); metrics.jsonl still gets everything",
                RuntimeWarning,
                stacklevel=4,
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
