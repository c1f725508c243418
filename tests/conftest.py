"""What every test gets: one thread (results never depend on it, times do), a fixed seed, and no wall-clock deadline."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from ibtpo_engine import native
from ibtpo_kernels import has_compiled

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter  # noqa: F401

if TYPE_CHECKING:
    from command_line import Refusal
    from completion_server import Server

settings.register_profile(
    "ibtpo", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ibtpo")

LONGEST = (
    "triton_interpreter",
    "torchrun",
    "train",
    "triton_aot",
    "emulated_cuda",
    "survival",
    "study",
    "distributed_runs",
    "kill",
)
"""Files that take minutes: begun first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: a full collection, of which a training asks for one, need not visit it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else the compiled module finds its objects alive when the process ends, and says so


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel that went astray fails whatever its process asks of the GPU from then on: go no further in this one.

    xdist names the test and starts another process; without it what has been run is reported.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process since {nodeid}: {error}", returncode=1)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["native", "module"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which path plain rows of a tiny model take: the native decode step, or the model as a torch module."""
    if request.param == "native" and not has_compiled():
        pytest.skip("needs the compiled kernels")
    if request.param == "module":
        monkeypatch.setattr(native, "MOST_BYTES", 0)
    return str(request.param)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    from checkpoints import save_checkpoint  # here, for tests on a GPU need less than it imports

    return save_checkpoint(tmp_path / "model", tied=False, context=64)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A completions server over an engine."""
    from backend_runs import serving_engine

    with serving_engine() as served:
        yield served


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Additions, a JSON object a line."""
    from checkpoints import save_additions

    return save_additions(tmp_path / "rows.jsonl")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs commands that must be refused; none may leave a folder behind."""
    from command_line import Refusal

    return Refusal(tmp_path / "out", capsys)
