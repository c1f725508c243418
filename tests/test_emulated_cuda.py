"""Runs `emulated_cuda_cases.py` in a process of its own: its plugin patches torch, and the suite must not see that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_the_cuda_branches_on_an_emulated_device() -> None:
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    plugins = ["-p", "emulated_cuda", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", *plugins, str(HERE / "emulated_cuda_cases.py")]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout
