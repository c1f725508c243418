"""Imports go one way: ibtpo -> ibtpo_engine -> ibtpo_kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {  # package -> (its folder, what of ours it may import)
    "ibtpo_kernels": (ROOT / "kernels" / "ibtpo_kernels", {"ibtpo_kernels"}),
    "ibtpo_engine": (ROOT / "engine" / "ibtpo_engine", {"ibtpo_engine", "ibtpo_kernels"}),
    "ibtpo": (ROOT / "ibtpo", {"ibtpo", "ibtpo_engine", "ibtpo_kernels"}),
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package: str) -> None:
    folder, allowed = LAYERS[package]
    files = sorted(folder.rglob("*.py"))
    assert files
    for file in files:
        for line, module in imports(file.read_text()):
            top = module.split(".")[0]
            where = f"{file.relative_to(ROOT)}:{line} imports {module}"
            assert top, f"{where}: relative imports hide the layer; write the package's name"
            assert top not in LAYERS or top in allowed, where
            assert top not in {"kernels", "engine", "tests", "bench"}, f"{where}: that folder is not a package"


def test_kernel_sources_know_nothing_of_torch() -> None:
    for file in (ROOT / "kernels" / "csrc").iterdir():
        assert "torch/" not in file.read_text(), f"{file.name} includes torch"
