"""Runs `triton_interpreter_cases.py`, and the tests that need a GPU on an emulated one, in processes of their own:
TRITON_INTERPRET must be set before Triton is imported, and the rest of the suite must not see it. Also what is said of
a backend that cannot run, and what ends a process that has lost its GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

import ibtpo_kernels as K

HERE = Path(__file__).parent


TOGETHER = (
    ("triton_interpreter_cases.py",),
    ("-p", "emulated_cuda", "test_gpu.py", "test_gpu_parity.py", "test_step_graphs.py"),
)
"""What runs in one process: two at a time, as an interpreted kernel has one thread, and they take minutes."""


def test_the_interpreted_kernels_match_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    processes = []
    for number, names in enumerate(TOGETHER):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(HERE / name) if name.endswith(".py") else name for name in names),
        ]
        with (tmp_path / f"{number}.txt").open("wb") as out:
            path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
            environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
            processes.append(subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=out, stderr=out))
    codes = [process.wait() for process in processes]
    for number, code in enumerate(codes):
        said = (tmp_path / f"{number}.txt").read_text()
        assert code == 0, said[-6000:]
        assert " passed" in said


def test_a_backend_that_cannot_run_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        with (
            K.backend("triton"),
            pytest.raises(ValueError, match="was given a tensor on cpu; move it to a GPU, or set"),
        ):
            K.silu_mul(torch.ones(3), torch.ones(3))
    else:
        with pytest.raises(
            ValueError, match="backend 'triton': (Triton is missing|there is no CUDA device; set TRITON_)"
        ):
            K.backend("triton").__enter__()


def test_a_process_that_lost_its_gpu_runs_no_more_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one would fail, with a message that has nothing to do with it."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_runtest_logfinish("test_fine")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(
        pytest.exit.Exception, match="lost to this process since test_it: CUDA error: an illegal memory"
    ):
        conftest.pytest_runtest_logfinish("test_it")


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, ibtpo_kernels, torch; print('ibtpo_kernels.gpu' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
