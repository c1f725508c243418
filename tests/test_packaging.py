"""The distribution: works without the compiled module, shadows nobody, and says its version in one place."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

WITHOUT_COMPILED = """
import sys, warnings
sys.modules["ibtpo_kernels._cpu"] = None  # importing it raises ImportError
import torch
import ibtpo_kernels as K
assert not K.has_compiled()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q, end = torch.randn(6, 2, 8, requires_grad=True), torch.tensor([6, 3, 3, 6, 6, 6], dtype=torch.int32)
    K.tree_attention(q, q, q, end).sum().backward()
    zero = torch.zeros(1, dtype=torch.int32)
    plan = K.plan_decode(zero[None], zero, zero + 3)
    pages = torch.randn(2, 1, 16, 2, 8)
    K.append_kv(q[:1].detach(), q[:1].detach(), *pages, torch.tensor([2]))
    K.tree_decode(q[:1].detach(), *pages, plan)
    K.linear_logprob(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 2]), torch.tensor([1, 4]))
    K.sample(torch.randn(2, 5), torch.zeros(2, 2, dtype=torch.int64))
    K.silu_mul(K.rms_norm(q, torch.ones(8), eps=1e-6), q)
notices = [str(w.message) for w in caught if "compiled CPU kernels are missing" in str(w.message)]
assert len(notices) == 1, notices
assert "make setup" in notices[0]
try:
    with K.backend("cpu"):
        pass
except ValueError as error:
    assert "compiled module is missing" in str(error)
else:
    raise AssertionError("backend('cpu') without a compiled module")
"""

NO_SHADOWING = """
import sys
import ibtpo, ibtpo_engine, ibtpo_kernels
sys.path.append(sys.argv[1])  # last: whatever of ours could be imported as `kernels` would come first
import kernels, engine
assert kernels.__file__.startswith(sys.argv[1]), kernels
assert engine.__file__.startswith(sys.argv[1]), engine
"""


def run(code: str, *arguments: str, cwd: Path) -> None:
    """Run code as a user would: from a folder that is not the repository."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_op_runs_without_the_compiled_module_and_says_so_once(tmp_path: Path) -> None:
    run(WITHOUT_COMPILED, cwd=tmp_path)


def test_source_roots_do_not_shadow_packages_of_the_same_name(tmp_path: Path) -> None:
    """A distribution called `kernels` exists, and transformers imports it: it must win over our folder."""
    for name in ("kernels", "engine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "elsewhere").mkdir()
    run(NO_SHADOWING, str(tmp_path), cwd=tmp_path / "elsewhere")


def test_source_roots_are_not_packages() -> None:
    for folder in ("kernels", "engine", "tests", "bench"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not be importable as a package"
    assert not any((ROOT / "tests" / name).exists() for name in ("kernels", "engine", "ibtpo"))


def test_installed_version_is_the_one_in_pyproject() -> None:
    assert importlib.metadata.version("ibtpo") == PROJECT["version"]


def test_the_command_line_is_installed() -> None:
    scripts = importlib.metadata.distribution("ibtpo").entry_points.select(group="console_scripts")
    assert {s.name: s.value for s in scripts} == PROJECT["scripts"]


def test_packages_are_typed() -> None:
    for package in ("ibtpo", "engine/ibtpo_engine", "kernels/ibtpo_kernels"):
        assert (ROOT / package / "py.typed").exists()
