"""What the compiled kernels share, on its own; needs a C++ compiler.

share_out (kernels/csrc/team.h): every part of every job once, under ThreadSanitizer too. take_scratch (scratch.h).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "kernels" / "csrc"
STRESS = [HERE / "team_stress.cpp", CSRC / "team.cpp"]
SCRATCH = [HERE / "scratch_stress.cpp", CSRC / "scratch.cpp"]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "c++"

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


def build(target: Path, sources: list[Path], *flags: str) -> bool:
    command = [COMPILER, "-std=c++17", "-O2", "-g", "-pthread", *flags, f"-I{CSRC}", *sources, "-o", target]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_every_part_once_also_in_a_forked_child(tmp_path: Path) -> None:
    assert build(tmp_path / "stress", STRESS)
    result = run(tmp_path / "stress", "fork")
    assert (result.returncode, result.stdout) == (0, "right\n")


def test_no_data_race(tmp_path: Path) -> None:
    """ThreadSanitizer has to find a race that is there before its silence counts."""
    racing = tmp_path / "racing.cpp"
    racing.write_text("#include <thread>\nint n; int main() { std::thread t([] { ++n; }); ++n; t.join(); }\n")
    if not (build(tmp_path / "racing", [racing], "-fsanitize=thread") and run(tmp_path / "racing").stderr):
        pytest.skip(f"{COMPILER} has no ThreadSanitizer that works here")
    assert build(tmp_path / "stress", STRESS, "-fsanitize=thread")
    result = run(tmp_path / "stress")
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


def test_scratch_arrays_do_not_overlap_and_are_kept(tmp_path: Path) -> None:
    assert build(tmp_path / "scratch", SCRATCH)
    result = run(tmp_path / "scratch")
    assert (result.returncode, result.stdout) == (0, "right\n")
