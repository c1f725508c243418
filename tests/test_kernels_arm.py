"""The C++ kernels for Arm: they compile without a warning, into NEON; where a cross-compiler is installed (Debian:
g++-aarch64-linux-gnu). What was run on an emulated processor is said in docs/kernels.md."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = "aarch64-linux-gnu-g++"
CSRC = Path(__file__).parent.parent / "kernels" / "csrc"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
BOUND_TO_PYTHON = {"module.cpp", "direct.cpp"}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


@pytest.mark.parametrize("name", sorted(path.name for path in CSRC.glob("*.cpp") if path.name not in BOUND_TO_PYTHON))
def test_compiles_without_a_warning(name: str) -> None:
    command = [COMPILER, *FLAGS, "-DIBTPO_ISA=baseline", "-S", "-o", "-", str(CSRC / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    if name == "linear.cpp":
        assert "fmla\tv" in result.stdout, "vectors of four floats, multiplied and added in one instruction"
