"""Every op of a backend against the plain torch reference, at small shapes: is this installation correct?

The problems are the small ones of the roofline catalog, each in the dtypes in which it is measured.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibtpo_kernels.dispatch import backend
from ibtpo_kernels.ops import batch_invariant_linear, plan_decode
from ibtpo_kernels.roofline.catalog import problems
from ibtpo_kernels.roofline.problem import Outputs, Problem, error_of, name_of
from ibtpo_kernels.roofline.trees import DecodeTree

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest norm of the difference over the norm of the reference: some 100 roundings of fp32, 5 of bf16."""


@dataclass(frozen=True)
class Check:
    """An op compared with its reference.

    Attributes:
        op: as in `ibtpo_kernels`; "both" passes are forward and backward.
        dtype: such as "bfloat16".
        error: norm of the difference over the norm of the reference, the largest of its problems; inf if it failed.
        tolerance: largest error allowed.
        failure: the error that an op raised, or None.
    """

    op: str
    dtype: str
    error: float
    tolerance: float
    failure: str | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the op agrees with the reference."""
        return self.error <= self.tolerance


def triton_lacks() -> str | None:
    """What Triton lacks on this machine to launch a kernel on a GPU; None if it has everything.

    Triton compiles a few lines of C, for this Python, when a kernel is first launched.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler, which Triton needs to launch a kernel; install gcc, or name one in CC"
    folder = Path(sysconfig.get_config_var("INCLUDEPY") or "")
    if not (folder / "Python.h").exists():
        return f"{folder}/Python.h is missing, which Triton needs to launch a kernel; install python3-dev"
    return None


def self_check(name: str, device: torch.device | str) -> Iterator[Check]:
    """Compare every op of a backend with the reference, on tensors of `device`; takes seconds.

    Raises:
        ValueError: the backend is not available here.
    """
    with backend(name):
        pass
    device = torch.device(device)
    groups: dict[tuple[str, torch.dtype], list[Problem]] = {}
    for problem in _small_problems():
        groups.setdefault((problem.op, problem.dtype), []).append(problem)
    yield _exact("plan_decode", "int32", lambda: _plans_alike(name, device))
    yield _exact("batch_invariant_linear", "bits of float32", lambda: _rows_are_alone(name, device))
    for (op, dtype), group in groups.items():
        tolerance = TOLERANCE[dtype]
        try:
            error = max(_error(problem, name, device) for problem in group)
        except Exception as failure:  # any error at all is a failed check
            text = " ".join(str(failure).split()) or type(failure).__name__
            yield Check(op, name_of(dtype), float("inf"), tolerance, text)
        else:
            yield Check(op, name_of(dtype), error, tolerance)


def _small_problems() -> list[Problem]:
    every = [problem for problem in problems("cpu") if problem.which != "plan"]
    quick = {(problem.op, problem.shape, problem.which) for problem in every if problem.is_quick}
    return [problem for problem in every if (problem.op, problem.shape, problem.which) in quick]


def _error(problem: Problem, name: str, device: torch.device) -> float:
    return error_of(_outputs(problem, name, device), _outputs(problem, "reference", device))


def _outputs(problem: Problem, name: str, device: torch.device) -> Outputs:
    """Outputs of our op for the problem's inputs, which are the same in every call."""
    inputs = problem.draw(device, torch.Generator(device).manual_seed(0))
    own = next(contender for contender in problem.contenders if contender.kind == "ours")
    with problem.context(), backend(name):
        return own.comparable(inputs, own.load()(inputs)())


def _exact(op: str, dtype: str, holds: Callable[[], bool]) -> Check:
    """The check of a property that holds exactly or not at all."""
    try:
        return Check(op, dtype, 0.0, 0.0) if holds() else Check(op, dtype, float("inf"), 0.0, "the bits differ")
    except Exception as failure:
        return Check(op, dtype, float("inf"), 0.0, " ".join(str(failure).split()))


def _plans_alike(name: str, device: torch.device) -> bool:
    tree = DecodeTree((1, 8), (64, 48))
    table = tree.page_table().to(device)
    rows = torch.arange(tree.branches, dtype=torch.int32, device=device)
    lengths = torch.full_like(rows, 100)

    def items(which: str) -> Tensor:
        with backend(which):
            return plan_decode(table, rows, lengths).items

    return torch.equal(items(name), items("reference"))


def _rows_are_alone(name: str, device: torch.device) -> bool:
    """Has a row the same bits alone and among others? Not if a compiler rounded in one loop and not in another."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, 256, generator=generator, device=device) for rows in (23, 96))
    with backend(name):
        alone = [batch_invariant_linear(row, weight) for row in x]
        return all(torch.equal(batch_invariant_linear(x[:n], weight), torch.stack(alone[:n])) for n in range(1, 24))
