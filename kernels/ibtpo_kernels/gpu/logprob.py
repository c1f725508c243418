# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Log-probability and entropy of a linear head: library matrix products, and one Triton pass over each chunk of logits.

With z = hidden weight^T / temperature, a row's m = max z, l = log sum exp(z - m), p = exp(z - m - l):

    forward    logprob_e = z[row_e, target_e] - m - l           H = l - sum p (z - m)
    backward   dz = sum_e g_e [target_e = v] - p G - h p (log p + H)         G = sum of g_e over the row's edges

A chunk of rows has its logits in float32, straight from the matrix product's accumulator (bf16 logits are off by up to
0.06 at a logit of 20), and its dz in the type of `hidden`, so that the two products of the backward run on the tensor
cores. The pass reads each logit once. Edges are sorted by (row, target) on the device: sums over a row's edges and over
repeated edges have one order, there are no atomics, and the host never waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels.gpu.launch import on_device

_CHUNK_BYTES = 768 << 20  # logits and their gradient alive at a time: enough rows for a full-size matrix product
_BLOCK = 4096  # columns a step of the row passes
_EDGES = 128


@triton.jit
def row_stats(z_ptr, stats_ptr, num_cols, num_rows, first, inv_temperature, BLOCK: tl.constexpr):
    """m, l, H of one row, into stats[:, first + row]; columns past num_cols count for nothing."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * num_cols
    top = -3.0e38
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)  # of exp(z - top) (z - top)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < num_cols, other=float("-inf")) * inv_temperature
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = tl.maximum(top - new_top, -1.0e4)  # exp of it is zero already, and 0 * -inf would be NaN
        shrink = tl.exp(shift)
        z -= new_top
        e = tl.exp(z)
        mean = shrink * (mean + shift * total) + tl.where(e > 0.0, e * z, 0.0)
        total = shrink * total + e
        top = new_top
    row_total = tl.sum(total, 0)
    log_total = tl.log(row_total)
    at = stats_ptr + first + row
    tl.store(at, top)
    tl.store(at + num_rows, log_total)
    tl.store(at + 2 * num_rows, log_total - tl.sum(mean, 0) / row_total)


@triton.jit
def edge_logprob(
    z_ptr, stats_ptr, rows_ptr, targets_ptr, out_ptr, num_edges, num_cols, num_rows, first, stop, inv_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob of the edges whose row lies in this chunk, [first, stop); NaN where a target is out of range."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + edge, mask=edge < num_edges, other=-1)
    target = tl.load(targets_ptr + edge, mask=edge < num_edges, other=-1)
    mine = (row >= first) & (row < stop)
    valid = mine & (target >= 0) & (target < num_cols)
    z = tl.load(z_ptr + (row - first) * num_cols + target, mask=valid, other=float("nan")) * inv_temperature
    top = tl.load(stats_ptr + row, mask=mine, other=0.0)
    log_total = tl.load(stats_ptr + num_rows + row, mask=mine, other=0.0)
    tl.store(out_ptr + edge, (z - top) - log_total, mask=mine)


@triton.jit
def _dense(z, top, log_total, entropy, grad_rows, grad_entropy):
    """-p G - h p (log p + H)."""
    log_p = (z - top) - log_total
    p = tl.exp(log_p)
    return tl.where(p > 0.0, -p * (grad_rows + grad_entropy * (log_p + entropy)), 0.0)


@triton.jit
def logit_grad(
    z_ptr, dz_ptr, stats_ptr, starts_ptr, grads_ptr, row_grads_ptr, grad_entropy_ptr, num_cols, num_rows, first,
    inv_temperature, BLOCK: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The dense part of one row's dz / temperature, and the row's G for `edge_grad`."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts_ptr + first + row), tl.load(starts_ptr + first + row + 1)
    sums = tl.zeros([EDGES], tl.float32)
    for start in range(begin, end, EDGES):
        edge = start + tl.arange(0, EDGES)
        sums += tl.load(grads_ptr + edge, mask=edge < end, other=0.0)
    grad_rows = tl.sum(sums, 0)
    tl.store(row_grads_ptr + first + row, grad_rows)
    at = stats_ptr + first + row
    top, log_total, entropy = tl.load(at), tl.load(at + num_rows), tl.load(at + 2 * num_rows)
    grad_entropy = tl.load(grad_entropy_ptr + first + row)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * num_cols + cols, mask=cols < num_cols, other=float("-inf")) * inv_temperature
        dz = _dense(z, top, log_total, entropy, grad_rows, grad_entropy) * inv_temperature
        tl.store(dz_ptr + row * num_cols + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < num_cols)


@triton.jit
def edge_grad(
    z_ptr, dz_ptr, stats_ptr, rows_ptr, targets_ptr, grads_ptr, row_grads_ptr, grad_entropy_ptr, num_edges, num_cols,
    num_rows, first, stop, inv_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz / temperature of the entries that edges point at. Edges are sorted; the first of equal ones writes for all."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = edge < num_edges
    row = tl.load(rows_ptr + edge, mask=inside, other=-1)
    target = tl.load(targets_ptr + edge, mask=inside, other=-1)
    before_row = tl.load(rows_ptr + edge - 1, mask=inside & (edge > 0), other=-1)
    before = tl.load(targets_ptr + edge - 1, mask=inside & (edge > 0), other=-1)
    leads = inside & (row >= first) & (row < stop) & (target >= 0) & (target < num_cols)
    leads = leads & ((row != before_row) | (target != before))
    grad = tl.load(grads_ptr + edge, mask=leads, other=0.0)
    next_edge, same = edge + 1, leads
    while tl.max(same.to(tl.int32), 0) > 0:
        here = same & (next_edge < num_edges)
        next_row = tl.load(rows_ptr + next_edge, mask=here, other=-1)
        next_target = tl.load(targets_ptr + next_edge, mask=here, other=-1)
        same = here & (next_row == row) & (next_target == target)
        grad += tl.load(grads_ptr + next_edge, mask=same, other=0.0)
        next_edge += 1
    at = (row - first) * num_cols + target
    z = tl.load(z_ptr + at, mask=leads, other=0.0) * inv_temperature
    top = tl.load(stats_ptr + row, mask=leads, other=0.0)
    log_total = tl.load(stats_ptr + num_rows + row, mask=leads, other=0.0)
    entropy = tl.load(stats_ptr + 2 * num_rows + row, mask=leads, other=0.0)
    grad_rows = tl.load(row_grads_ptr + row, mask=leads, other=0.0)
    grad_entropy = tl.load(grad_entropy_ptr + row, mask=leads, other=0.0)
    dz = (_dense(z, top, log_total, entropy, grad_rows, grad_entropy) + grad) * inv_temperature
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=leads)


def _chunks(num_rows: int, num_cols: int, element_size: int) -> Iterator[tuple[int, int]]:
    """[first, stop) of each chunk of rows, a multiple of the matrix product's tile."""
    rows = _CHUNK_BYTES // ((4 + element_size) * max(num_cols, 1))
    size = max(rows // 128 * 128, 64)
    for first in range(0, num_rows, size):
        yield first, min(first + size, num_rows)


def _library_casts(x: Tensor) -> bool:
    """Whether the library multiplies 16-bit operands into a float32 result: on GPUs only."""
    return x.is_cuda and x.element_size() == 2


def _logits(x: Tensor, head: Tensor) -> Tensor:
    """x head^T in float32."""
    if _library_casts(x):
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    return x.float() @ head.float().t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a^T b."""
    if _library_casts(a):
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.t().float(), b.float())


class _Edges(NamedTuple):
    rows: Tensor  # int64 [E], sorted by (row, target)
    targets: Tensor
    grads: Tensor  # float32 [E]
    starts: Tensor  # int64 [T + 1], first edge of each row


def _sorted(rows: Tensor, targets: Tensor, grads: Tensor, num_rows: int) -> _Edges:
    by_target, order = targets.sort(stable=True)
    by_row, then = rows[order].sort(stable=True)
    starts = torch.searchsorted(by_row, torch.arange(num_rows + 1, device=rows.device))
    return _Edges(by_row, by_target[then], grads[order[then]].contiguous(), starts)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        num_rows, num_cols, num_edges = len(hidden), len(weight), len(rows)
        logprob = torch.full((num_edges,), float("nan"), device=hidden.device)  # of a row that does not exist
        stats = torch.empty(3, num_rows, device=hidden.device)
        for first, stop in _chunks(num_rows, num_cols, hidden.element_size()):
            z = _logits(hidden[first:stop], weight)
            row_stats[(stop - first,)](
                z, stats, num_cols, num_rows, first, 1.0 / temperature, BLOCK=_BLOCK, num_warps=8
            )
            if num_edges:
                edge_logprob[(triton.cdiv(num_edges, _EDGES),)](
                    z, stats, rows, targets, logprob, num_edges, num_cols, num_rows, first, stop, 1.0 / temperature,
                    BLOCK=_EDGES, num_warps=4,
                )  # fmt: skip
        ctx.save_for_backward(hidden, weight, rows, targets, stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(True)
        return logprob, stats[2].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, rows, targets, stats = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if wants_weight else None
        edges = _sorted(rows, targets, grad_logprob.float(), len(hidden))
        with on_device(hidden):
            for first, stop in _chunks(len(hidden), len(weight), hidden.element_size()):
                x = hidden[first:stop]
                dz = _chunk_grad(_logits(x, weight), stats, edges, grad_entropy.contiguous(), first, ctx.temperature, x)
                if d_hidden is not None:
                    torch.mm(dz, weight, out=d_hidden[first:stop])
                if d_weight is not None:
                    _add_product(d_weight, dz, x)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _chunk_grad(
    z: Tensor, stats: Tensor, edges: _Edges, grad_entropy: Tensor, first: int, temperature: float, like: Tensor
) -> Tensor:
    """dz / temperature [t, V] in the type of `like`."""
    dz = torch.empty(z.shape, dtype=like.dtype, device=z.device)
    row_grads = torch.empty_like(grad_entropy)
    num_rows, num_cols, num_edges = stats.shape[1], z.shape[1], len(edges.rows)
    logit_grad[(len(z),)](
        z, dz, stats, edges.starts, edges.grads, row_grads, grad_entropy, num_cols, num_rows, first, 1.0 / temperature,
        BLOCK=_BLOCK, EDGES=_EDGES, num_warps=8,
    )  # fmt: skip
    if num_edges:
        edge_grad[(triton.cdiv(num_edges, _EDGES),)](
            z, dz, stats, edges.rows, edges.targets, edges.grads, row_grads, grad_entropy, num_edges, num_cols,
            num_rows, first, first + len(z), 1.0 / temperature, BLOCK=_EDGES, num_warps=4,
        )  # fmt: skip
    return dz


def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `ibtpo_kernels.linear_logprob`; an index out of range gives NaN on a GPU, where raising would have to wait."""
    hidden, weight, rows, targets = (x.contiguous() for x in (hidden, weight, rows, targets))
    with on_device(hidden):
        logprob, entropy = _LinearLogprob.apply(hidden, weight, rows, targets, temperature)
    return logprob, entropy
