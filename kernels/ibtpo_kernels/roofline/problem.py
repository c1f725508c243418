"""Problems to measure: an op on inputs of one shape and dtype, and the contenders that solve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ibtpo_kernels.roofline.formulas import Work

Pass = Literal["forward", "backward", "both", "plan"]
Kind = Literal["ours", "peer", "bound"]  # a bound computes less than the op, so no implementation can be faster

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Norm of the difference over the norm: loose, since it checks whether the same thing is computed, not how well."""


class Unavailable(Exception):
    """A contender cannot take part here; the message is the reason."""


@dataclass(frozen=True)
class Inputs:
    """Freshly drawn inputs of one call.

    Attributes:
        leaves: tensors that get gradients.
        rest: everything else, in the op's own order.
        d_out: gradients of the outputs, in their order; fewer if the last outputs get none.
    """

    leaves: tuple[Tensor, ...]
    rest: tuple[Any, ...] = ()
    d_out: tuple[Tensor, ...] = ()

    def without(self, outputs: Sequence[int]) -> Inputs:
        """With zero gradients at these outputs, for a contender that does not have them."""
        return replace(self, d_out=tuple(d.new_zeros(d.shape) if i in outputs else d for i, d in enumerate(self.d_out)))


Outputs = tuple[Tensor | None, ...]  # None: this contender does not compute it
Run = Callable[[], Outputs]
Prepare = Callable[[Inputs], Run]  # not timed: makes layouts, plans and masks that a caller has anyway
Function = Callable[[Inputs], Outputs]


def _same(_: Inputs, outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Contender:
    """One way to solve a problem.

    Attributes:
        who: its name in tables.
        load: imports what it needs, and raises if that is missing; the reason is reported.
        kind: the others are checked against "ours".
        note: what it leaves out, or does in addition.
        comparable: converts its outputs to our layout, for the check.
        is_checked: False if outputs cannot be compared by value.
    """

    who: str
    load: Callable[[], Prepare]
    kind: Kind = "peer"
    note: str = ""
    comparable: Callable[[Inputs, Outputs], Outputs] = _same
    is_checked: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An op at one shape, dtype and pass.

    Attributes:
        draw: (device, generator) -> inputs, different for every state of the generator.
        working_set: bytes that a call of ours touches, compared with the cache's size.
        is_quick: part of a `--quick` run.
    """

    op: str
    shape: str
    dtype: torch.dtype
    which: Pass
    work: Work
    draw: Callable[[torch.device, torch.Generator], Inputs]
    contenders: tuple[Contender, ...]
    working_set: int = field(default=0)
    is_quick: bool = False

    def context(self) -> AbstractContextManager[object]:
        """The context of its contenders: without autograd unless a gradient is measured."""
        return torch.no_grad() if self.which in ("forward", "plan") else nullcontext()

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, name_of(self.dtype), self.which

    def __str__(self) -> str:
        return " ".join(self.key)


def name_of(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_pass(function: Function, which: Pass) -> Prepare:
    """Time a differentiable function's forward, its backward, or both.

    The outputs of "both" are the function's, then the gradients; those of "backward" are the gradients alone.
    """
    if which in ("forward", "plan"):
        return lambda inputs: lambda: function(inputs)

    def prepare(inputs: Inputs) -> Run:
        leaves = tuple(x.detach().requires_grad_() for x in inputs.leaves)
        inputs = replace(inputs, leaves=leaves)
        if which == "both":

            def both() -> Outputs:
                outputs = function(inputs)
                return *outputs, *_gradients(outputs, inputs, keep=False)

            return both
        outputs = function(inputs)
        return lambda: _gradients(outputs, inputs, keep=True)

    return prepare


def _gradients(outputs: Outputs, inputs: Inputs, *, keep: bool) -> tuple[Tensor, ...]:
    asked = [(y, d) for y, d in zip(outputs, inputs.d_out, strict=False) if y is not None]
    ys, ds = [y for y, _ in asked], [d.to(y.dtype) for y, d in asked]
    return torch.autograd.grad(ys, inputs.leaves, ds, retain_graph=keep)


def ours(function: Function, which: Pass) -> Contender:
    """This project's op."""
    return Contender("ibtpo", lambda: in_pass(function, which), kind="ours")


def error_of(theirs: Outputs, ours: Outputs) -> float:
    """The largest norm of a difference over the norm, of all outputs that both have; inf if there are none."""
    errors = []
    for x, y in zip(theirs, ours, strict=True):
        if x is None or y is None:
            continue
        if x.shape != y.shape:
            raise ValueError(f"the result has shape {list(x.shape)}, ours {list(y.shape)}")
        difference, norm = (x.float() - y.float()).norm().item(), y.float().norm().item()
        errors.append(difference / norm if norm > 0 else difference)
        if errors[-1] != errors[-1]:
            return float("inf")  # NaN: max() would drop it
    return max(errors, default=float("inf"))


def verify(problem: Problem, contender: Contender, run: Run, reference: Prepare, inputs: Inputs) -> None:
    """Raise ValueError unless a contender computes what ours does; outputs that it lacks get no gradient.

    `reference` prepares the contender of kind "ours", `run` is `contender` prepared on these inputs.
    """
    if not contender.is_checked:
        return
    own = next(c for c in problem.contenders if c.kind == "ours")
    theirs = contender.comparable(inputs, run())
    missing = [i for i, _ in enumerate(inputs.d_out) if problem.which == "both" and theirs[i] is None]
    asked = inputs.without(missing) if missing else inputs
    error = error_of(theirs, own.comparable(asked, reference(asked)()))
    if not error <= TOLERANCE[problem.dtype]:
        raise ValueError(f"differs from ours by {error:.2g} of the norm")
