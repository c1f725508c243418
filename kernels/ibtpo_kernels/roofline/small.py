"""Problems of the small ops: norms, gate, rotation, append, and the batch-invariant product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.nn.functional import rms_norm as torch_rms_norm

from ibtpo_kernels import ops
from ibtpo_kernels.roofline import formulas
from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.peers.find import compiled, module, needs_cuda
from ibtpo_kernels.roofline.problem import (
    Contender,
    Function,
    Inputs,
    Outputs,
    Pass,
    Prepare,
    Problem,
    Run,
    in_pass,
    ours,
)
from ibtpo_kernels.roofline.trees import PAGE

_EPS = 1e-6
_Draw = Callable[[torch.device, torch.Generator], Inputs]


def _normal(dtype: torch.dtype, num_leaves_with_grad: int, *shapes: tuple[int, ...], outputs: int = 1) -> _Draw:
    """Leaves of these shapes, and gradients of the first one's shape for `outputs` outputs."""

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, device=where, dtype=dtype, generator=generator)

        leaves = tuple(map(normal, shapes))
        kept = leaves[:num_leaves_with_grad]
        return Inputs(kept, leaves[num_leaves_with_grad:], tuple(normal(shapes[0]) for _ in range(outputs)))

    return draw


def _peer(who: str, function: Function, which: Pass) -> list[Contender]:
    """A plain torch function, eager and compiled."""
    return [
        Contender(who, lambda: in_pass(function, which)),
        Contender("torch.compile", lambda: in_pass(_fused(function), which)),
    ]


def _fused(function: Function) -> Function:
    """The function compiled over its tensors."""
    fast = compiled(lambda leaves, rest: function(Inputs(leaves, rest)))
    return lambda inputs: fast(inputs.leaves, inputs.rest)


def _liger(name: str, call: Callable[[Callable[..., Any], Inputs], Outputs], which: Pass) -> Contender:
    def load() -> Prepare:
        needs_cuda("Liger")
        apply = getattr(module("liger_kernel.ops", "Liger-Kernel (liger-kernel)"), name).apply
        prepare = in_pass(lambda inputs: call(apply, inputs), which)
        return lambda x: prepare(replace(x, leaves=tuple(y.clone() for y in x.leaves)))  # some write gradients there

    return Contender("Liger", load)


def _by_pass(forward: Work, backward: Work, which: Pass) -> Work:
    return forward if which == "forward" else forward + backward


def _problem(
    op: str,
    shape: str,
    dtype: torch.dtype,
    which: Pass,
    work: Work,
    draw: _Draw,
    contenders: list[Contender],
    is_quick: bool,
) -> Problem:
    return Problem(
        op=op, shape=shape, dtype=dtype, which=which, work=work, draw=draw, contenders=tuple(contenders),
        working_set=work.bytes, is_quick=is_quick,
    )  # fmt: skip


def rms_norm(rows: int, hidden: int, dtype: torch.dtype, which: Pass, *, is_quick: bool = False) -> Problem:
    """The norm of every row."""
    elements, size = rows * hidden, dtype.itemsize
    work = _by_pass(formulas.rms_norm_forward(elements, size), formulas.rms_norm_backward(elements, size), which)
    contenders = [
        ours(lambda x: (ops.rms_norm(*x.leaves, eps=_EPS),), which),
        *_peer("F.rms_norm", lambda x: (torch_rms_norm(x.leaves[0], (hidden,), x.leaves[1], _EPS),), which),
        _liger("LigerRMSNormFunction", lambda f, x: (f(*x.leaves, _EPS, 0.0, "llama", False),), which),
    ]
    draw = _normal(dtype, 2, (rows, hidden), (hidden,))
    return _problem("rms_norm", f"{rows}x{hidden}", dtype, which, work, draw, contenders, is_quick)


def _add_then_norm(inputs: Inputs) -> Outputs:
    x, residual, weight = inputs.leaves
    total = x + residual
    return torch_rms_norm(total, weight.shape, weight, _EPS), total


def add_rms_norm(rows: int, hidden: int, dtype: torch.dtype, which: Pass, *, is_quick: bool = False) -> Problem:
    """Residual addition and norm between two layers."""
    elements, size = rows * hidden, dtype.itemsize
    work = _by_pass(
        formulas.add_rms_norm_forward(elements, size), formulas.add_rms_norm_backward(elements, size), which
    )
    contenders = [
        ours(lambda x: ops.add_rms_norm(*x.leaves, eps=_EPS), which),
        *_peer("eager", _add_then_norm, which),
        _liger("LigerFusedAddRMSNormFunction", lambda f, x: f(*x.leaves, _EPS), which),
    ]
    draw = _normal(dtype, 3, (rows, hidden), (rows, hidden), (hidden,), outputs=2)
    return _problem("add_rms_norm", f"{rows}x{hidden}", dtype, which, work, draw, contenders, is_quick)


def silu_mul(rows: int, inner: int, dtype: torch.dtype, which: Pass, *, is_quick: bool = False) -> Problem:
    """The gate of an MLP."""
    elements, size = rows * inner, dtype.itemsize
    work = _by_pass(formulas.silu_mul_forward(elements, size), formulas.silu_mul_backward(elements, size), which)
    contenders = [
        ours(lambda x: (ops.silu_mul(*x.leaves),), which),
        *_peer("eager", lambda x: (silu(x.leaves[0]) * x.leaves[1],), which),
        _liger("LigerSiLUMulFunction", lambda f, x: (f(*x.leaves),), which),
    ]
    draw = _normal(dtype, 2, (rows, inner), (rows, inner))
    return _problem("silu_mul", f"{rows}x{inner}", dtype, which, work, draw, contenders, is_quick)


def _angles(tokens: int, dim: int, where: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    angle = 100 * torch.rand(tokens, dim // 2, device=where, generator=generator)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope(tokens: int, heads: int, dim: int, dtype: torch.dtype, *, is_quick: bool = False) -> Problem:
    """Rotation alone, as in training."""

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        x = torch.randn(tokens, heads, dim, device=where, dtype=dtype, generator=generator)
        return Inputs((x,), _angles(tokens, dim, where, generator))

    contenders = [
        ours(lambda x: (ops.rope(*x.leaves, *x.rest),), "forward"),
        *_peer("eager", lambda x: (_rotate(*x.leaves, *x.rest),), "forward"),
    ]
    work = formulas.rope(tokens, heads, dim, dtype.itemsize)
    return _problem("rope", f"T{tokens} H{heads} D{dim}", dtype, "forward", work, draw, contenders, is_quick)


def _own_pages(function: Function) -> Callable[[], Prepare]:
    """Give each contender its own pages, for ops that write into pages, which come last in `rest`."""

    def prepare(inputs: Inputs) -> Run:
        *rest, k_pages, v_pages = inputs.rest
        own = replace(inputs, rest=(*rest, k_pages.clone(), v_pages.clone()))
        return lambda: function(own)

    return lambda: prepare


def _written(tokens: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Slots in random order, and a cache twice as large as the rows written."""

    def draw(where: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        shape = (-(-2 * tokens // PAGE), PAGE, kv_heads, dim)
        slots = torch.randperm(shape[0] * PAGE, device=where, generator=generator)[:tokens]
        pages = torch.zeros(2, *shape, device=where, dtype=dtype)
        return slots, pages[0], pages[1]

    return draw


def _append(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    k_pages.flatten(0, 1).index_copy_(0, slots, k)
    v_pages.flatten(0, 1).index_copy_(0, slots, v)


def append_kv(tokens: int, kv_heads: int, dim: int, dtype: torch.dtype, *, is_quick: bool = False) -> Problem:
    """Keys and values of a step into their pages."""
    written = _written(tokens, kv_heads, dim, dtype)

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        k, v = torch.randn(2, tokens, kv_heads, dim, device=where, generator=generator).to(dtype)
        return Inputs((k, v), written(where, generator))

    def fused(x: Inputs) -> Outputs:
        (k, v), (slots, k_pages, v_pages) = x.leaves, x.rest
        ops.append_kv(k, v, k_pages, v_pages, slots)
        return k_pages, v_pages

    def eager(x: Inputs) -> Outputs:
        _append(*x.leaves, *x.rest)
        return x.rest[1:]

    contenders = [Contender("ibtpo", _own_pages(fused), kind="ours"), Contender("index_copy_", _own_pages(eager))]
    work = formulas.append_kv(tokens, kv_heads, dim, dtype.itemsize)
    return _problem("append_kv", f"T{tokens} H{kv_heads} D{dim}", dtype, "forward", work, draw, contenders, is_quick)


def rope_append(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, is_quick: bool = False
) -> Problem:
    """The op between the qkv projection and decode attention, including norms of q and k."""
    written = _written(tokens, kv_heads, dim, dtype)

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        q, k, v = (
            torch.randn(tokens, h, dim, device=where, dtype=dtype, generator=generator)
            for h in (heads, kv_heads, kv_heads)
        )
        weights = torch.randn(2, dim, device=where, generator=generator).to(dtype)
        return Inputs((q, k, v), (*weights, *_angles(tokens, dim, where, generator), *written(where, generator)))

    def fused(x: Inputs) -> Outputs:
        (q, k, v), (q_weight, k_weight, cos, sin, slots, *pages) = x.leaves, x.rest
        k_pages, v_pages = pages
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return ops.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, **weights), *pages

    def eager(x: Inputs) -> Outputs:
        (q, k, v), (q_weight, k_weight, cos, sin, slots, *pages) = x.leaves, x.rest
        q, k = (torch_rms_norm(y, (dim,), w, _EPS) for y, w in ((q, q_weight), (k, k_weight)))
        _append(_rotate(k, cos, sin), v, slots, *pages)
        return _rotate(q, cos, sin), *pages

    contenders = [
        Contender("ibtpo", _own_pages(fused), kind="ours"),
        Contender("eager", _own_pages(eager)),
        Contender("torch.compile", lambda: _own_pages(_fused(eager))()),
    ]
    work = formulas.rope_append(tokens, heads, kv_heads, dim, dtype.itemsize)
    shape = f"T{tokens} H{heads}:{kv_heads} D{dim}"
    return _problem("rope_append", shape, dtype, "forward", work, draw, contenders, is_quick)


def batch_invariant_linear(
    rows: int, depth: int, columns: int, dtype: torch.dtype, *, is_quick: bool = False
) -> Problem:
    """The cost of a fixed order of summation."""

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        x = torch.randn(rows, depth, device=where, generator=generator)
        weight = torch.randn(columns, depth, device=where, generator=generator) * depth**-0.5
        return Inputs((x.to(dtype), weight.to(dtype)))

    contenders = [
        ours(lambda x: (ops.batch_invariant_linear(*x.leaves),), "forward"),
        Contender(
            "F.linear",
            lambda: in_pass(lambda x: (linear(*x.leaves),), "forward"),
            note="bits may differ",
        ),
    ]
    work = formulas.batch_invariant_linear(rows, depth, columns, dtype.itemsize)
    shape = f"M{rows} K{depth} N{columns}"
    return _problem("batch_invariant_linear", shape, dtype, "forward", work, draw, contenders, is_quick)
