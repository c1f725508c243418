# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Log-probability and entropy of a linear head: library matrix products, and one Triton pass over each chunk of logits.

With u = hidden weight^T, z = cap tanh(u / cap) / temperature (without a cap z = u / temperature), a row's m = max z,
l = log sum exp(z - m), p = exp(z - m - l):

    forward    logprob_e = z[row_e, target_e] - m - l           H = l - sum p (z - m)
    backward   dz = sum_e g_e [target_e = v] - p G - h p (log p + H)         G = sum of g_e over the row's edges
               du = dz (1 - tanh^2) / temperature

The logits of a chunk are in float32, straight from the matrix product's accumulator (bf16 logits are off by up to 0.06
at a logit of 20); du is in the type of `hidden`, so that the two products of the backward run on the tensor cores. A
pass reads each logit once; `policy_head` keeps a chunk's logits from one pass to the next. Edges are sorted by
(row, target) on the device: sums over a row's edges and over repeated edges have one order, there are no atomics, and
`linear_logprob` never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels import one_pass
from ibtpo_kernels.gpu.launch import FUSED, on_device
from ibtpo_kernels.gradients import once_differentiable
from ibtpo_kernels.logits import Head, in_own_types

_CHUNK_BYTES = one_pass.GPU_CHUNK_BYTES
_BLOCK = 4096  # columns of a step of the row passes
_EDGES = 128


@triton.jit
def _tanh(x):
    """The polynomial of Cephes' tanhf near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    y = square * -5.70498872745e-3 + 2.06390887954e-2
    y = y * square - 5.37397155531e-2
    y = y * square + 1.33314422036e-1
    y = y * square - 3.33332819422e-1
    y = y * square * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(size + size) + 1.0)
    return tl.where(size < 0.625, y, tl.where(x < 0.0, -far, far))


@triton.jit
def _logit(u, inv_temperature, cap, CAPPED: tl.constexpr):
    """z of u."""
    return _tanh(u / cap) * (cap * inv_temperature) if CAPPED else u * inv_temperature


@triton.jit
def _slope(z, inv_temperature, cap, CAPPED: tl.constexpr):
    """dz/du."""
    if CAPPED:
        t = z / (cap * inv_temperature)
        slope = (1.0 - t * t) * inv_temperature
    else:
        slope = inv_temperature
    return slope


@triton.jit(do_not_specialize=["num_rows", "first"])
def row_stats(
    z_ptr, stats_ptr, num_cols, num_rows, first, inv_temperature, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """m, l, H of one row, into stats[:, first + row]; columns past num_cols are ignored."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * num_cols
    top = -3.0e38
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)  # of exp(z - top) (z - top)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        u = tl.load(z_ptr + cols, mask=cols < num_cols, other=0.0)
        z = tl.where(cols < num_cols, _logit(u, inv_temperature, cap, CAPPED), float("-inf"))
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


@triton.jit(do_not_specialize=["num_edges", "num_rows", "first", "stop"])
def edge_logprob(
    z_ptr, stats_ptr, rows_ptr, targets_ptr, out_ptr, num_edges, num_cols, num_rows, first, stop, inv_temperature, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob of the edges with rows in this chunk, [first, stop); NaN if a target is out of range."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + edge, mask=edge < num_edges, other=-1)
    target = tl.load(targets_ptr + edge, mask=edge < num_edges, other=-1)
    mine = (row >= first) & (row < stop)
    valid = mine & (target >= 0) & (target < num_cols)
    u = tl.load(z_ptr + (row - first) * num_cols + target, mask=valid, other=float("nan"))
    z = _logit(u, inv_temperature, cap, CAPPED)
    top = tl.load(stats_ptr + row, mask=mine, other=0.0)
    log_total = tl.load(stats_ptr + num_rows + row, mask=mine, other=0.0)
    tl.store(out_ptr + edge, (z - top) - log_total, mask=mine)


@triton.jit
def _dense(z, top, log_total, entropy, grad_rows, grad_entropy):
    """-p G - h p (log p + H)."""
    log_p = (z - top) - log_total
    p = tl.exp(log_p)
    return tl.where(p > 0.0, -p * (grad_rows + grad_entropy * (log_p + entropy)), 0.0)


@triton.jit(do_not_specialize=["num_rows", "first"])
def logit_grad(
    z_ptr, dz_ptr, stats_ptr, starts_ptr, grads_ptr, row_grads_ptr, grad_entropy_ptr, num_cols, num_rows, first,
    inv_temperature, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The dense part of one row's du, and the row's G for `edge_grad`."""
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
        u = tl.load(z_ptr + row * num_cols + cols, mask=cols < num_cols, other=0.0)
        z = _logit(u, inv_temperature, cap, CAPPED)
        dz = _dense(z, top, log_total, entropy, grad_rows, grad_entropy)
        dz *= _slope(z, inv_temperature, cap, CAPPED)
        tl.store(dz_ptr + row * num_cols + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < num_cols)


@triton.jit(do_not_specialize=["num_edges", "num_rows", "first", "stop"])
def edge_grad(
    z_ptr, dz_ptr, stats_ptr, rows_ptr, targets_ptr, grads_ptr, row_grads_ptr, grad_entropy_ptr, num_edges, num_cols,
    num_rows, first, stop, inv_temperature, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """du of the entries that edges point at. Edges are sorted; the first of equal ones writes for all."""
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
    z = _logit(tl.load(z_ptr + at, mask=leads, other=0.0), inv_temperature, cap, CAPPED)
    top = tl.load(stats_ptr + row, mask=leads, other=0.0)
    log_total = tl.load(stats_ptr + num_rows + row, mask=leads, other=0.0)
    entropy = tl.load(stats_ptr + 2 * num_rows + row, mask=leads, other=0.0)
    grad_rows = tl.load(row_grads_ptr + row, mask=leads, other=0.0)
    grad_entropy = tl.load(grad_entropy_ptr + row, mask=leads, other=0.0)
    dz = _dense(z, top, log_total, entropy, grad_rows, grad_entropy) + grad
    dz *= _slope(z, inv_temperature, cap, CAPPED)
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=leads)


def _chunk_rows(num_cols: int, element_size: int) -> int:
    return one_pass.gpu_chunk_rows(num_cols, element_size, _CHUNK_BYTES)


def _chunk_columns(num_rows: int, element_size: int) -> int:
    """Columns of a chunk with all rows."""
    return max(_CHUNK_BYTES // ((4 + element_size) * max(num_rows, 1)) // 128 * 128, 128)


def _chunks(head: Head) -> Iterator[tuple[int, int]]:
    """[first, stop) of each chunk."""
    size = _chunk_rows(head.num_cols, head.hidden.element_size())
    for first in range(0, head.num_rows, size):
        yield first, min(first + size, head.num_rows)


def _shape(head: Head) -> dict[str, float | bool]:
    """Kernel arguments that turn u into logits."""
    return {"inv_temperature": 1.0 / head.temperature, "cap": head.softcap or 1.0, "CAPPED": head.softcap is not None}


def _library_casts(x: Tensor) -> bool:
    """Whether the library multiplies 16-bit operands into a float32 result, which it does only on GPUs."""
    return x.is_cuda and x.element_size() == 2


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32."""
    if _library_casts(x):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


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


def _sorted(head: Head, grads: Tensor) -> _Edges:
    by_target, order = head.targets.sort(stable=True)
    by_row, then = head.rows[order].sort(stable=True)
    starts = torch.searchsorted(by_row, torch.arange(head.num_rows + 1, device=by_row.device))
    return _Edges(by_row, by_target[then], grads.float()[order[then]].contiguous(), starts)


def _chunk_stats(z: Tensor, head: Head, stats: Tensor, logprob: Tensor, first: int) -> None:
    """Stats of rows [first, first + len(z)) and log-prob of their edges."""
    shape = _shape(head)
    row_stats[(len(z),)](z, stats, head.num_cols, head.num_rows, first, **shape, BLOCK=_BLOCK, **FUSED, num_warps=8)
    if head.num_edges:
        edge_logprob[(triton.cdiv(head.num_edges, _EDGES),)](
            z, stats, head.rows, head.targets, logprob, head.num_edges, head.num_cols, head.num_rows,
            first, first + len(z), **shape, BLOCK=_EDGES, **FUSED, num_warps=4,
        )  # fmt: skip


def _chunk_grad(z: Tensor, head: Head, stats: Tensor, edges: _Edges, grad_entropy: Tensor, first: int) -> Tensor:
    """du [t, V] of rows [first, first + t) in the type of hidden."""
    dz = torch.empty(z.shape, dtype=head.hidden.dtype, device=z.device)
    row_grads = torch.empty_like(grad_entropy)
    shape = _shape(head)
    logit_grad[(len(z),)](
        z, dz, stats, edges.starts, edges.grads, row_grads, grad_entropy, head.num_cols, head.num_rows, first,
        **shape, BLOCK=_BLOCK, EDGES=_EDGES, **FUSED, num_warps=8,
    )  # fmt: skip
    if head.num_edges:
        edge_grad[(triton.cdiv(head.num_edges, _EDGES),)](
            z, dz, stats, edges.rows, edges.targets, edges.grads, row_grads, grad_entropy, head.num_edges,
            head.num_cols, head.num_rows, first, first + len(z), **shape, BLOCK=_EDGES, **FUSED, num_warps=4,
        )  # fmt: skip
    return dz


@in_own_types
def _forward(head: Head) -> tuple[Tensor, Tensor]:
    """(logprob [E], NaN if the row is out of range; stats [3, T])."""
    logprob = torch.full((head.num_edges,), float("nan"), dtype=torch.float32, device=head.hidden.device)
    stats = torch.empty(3, head.num_rows, dtype=torch.float32, device=head.hidden.device)
    for first, stop in _chunks(head):
        _chunk_stats(_product(head.hidden[first:stop], head.weight), head, stats, logprob, first)
    return logprob, stats


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        head = Head(*fields)
        logprob, stats = _forward(head)
        ctx.save_for_backward(head.hidden, head.weight, head.rows, head.targets, stats)
        ctx.rest = head.temperature, head.softcap
        return logprob, stats[2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        head = Head(*tensors, *ctx.rest)
        with on_device(head.hidden):
            grads = backward(head, stats, grad_logprob, grad_entropy, *ctx.needs_input_grad[:2])
        return *grads, None, None, None, None


@in_own_types
def backward(
    head: Head, stats: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, each only if wanted: nothing is computed or allocated for the other.

    The gradient accumulated in float32 over the chunks is that of hidden, [T, H], not of weight, [V, H]: if weight's is
    wanted, chunks are columns.
    """
    edges, grad_entropy = _sorted(head, grad_logprob), grad_entropy.contiguous()
    if wants_weight:
        return _backward_by_columns(head, stats, edges, grad_entropy, wants_hidden)
    d_hidden = torch.empty_like(head.hidden) if wants_hidden else None
    if d_hidden is not None:
        for first, stop in _chunks(head):
            dz = _chunk_grad(_product(head.hidden[first:stop], head.weight), head, stats, edges, grad_entropy, first)
            torch.mm(dz, head.weight, out=d_hidden[first:stop])
            del dz  # before the next chunk's logits are made
    return d_hidden, None


def _backward_by_columns(
    head: Head, stats: Tensor, edges: _Edges, grad_entropy: Tensor, wants_hidden: bool
) -> tuple[Tensor | None, Tensor]:
    """The same by blocks of the vocabulary, with all rows; blocks are added to d_hidden in order."""
    d_weight = torch.empty_like(head.weight)
    d_hidden = torch.zeros(head.hidden.shape, dtype=torch.float32, device=head.hidden.device) if wants_hidden else None
    size = _chunk_columns(head.num_rows, head.hidden.element_size())
    for first in range(0, head.num_cols, size):
        weight = head.weight[first : first + size]
        block, within = head._replace(weight=weight), edges._replace(targets=edges.targets - first)
        if head.num_rows:
            dz = _chunk_grad(_product(head.hidden, weight), block, stats, within, grad_entropy, 0)
        else:
            dz = weight.new_empty(0, len(weight))
        torch.mm(dz.t(), head.hidden, out=d_weight[first : first + size])
        if d_hidden is not None:
            _add_product(d_hidden, dz.t(), weight)
        del dz
    return None if d_hidden is None else d_hidden.to(head.hidden.dtype), d_weight


def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As `ibtpo_kernels.linear_logprob`; an index out of range gives NaN on a GPU, where raising would synchronise."""
    hidden, weight, rows, targets = (x.contiguous() for x in (hidden, weight, rows, targets))
    with on_device(hidden):
        logprob, entropy = _LinearLogprob.apply(hidden, weight, rows, targets, temperature, softcap)
    return logprob, entropy


def linear_logprob_stats(*fields: Any) -> tuple[Tensor, Tensor]:
    """(logprob [E], stats [3, T]), for `library`; arguments as of `Head`."""
    head = _dense_head(*fields)
    with on_device(head.hidden):
        return _forward(head)


def linear_logprob_grads(*given: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight from `Head`'s fields, stats, two gradients and two flags, for `library`."""
    *fields, stats, grad_logprob, grad_entropy, wants_hidden, wants_weight = given
    head = _dense_head(*fields)
    with on_device(head.hidden):
        return backward(head, stats, grad_logprob, grad_entropy, wants_hidden, wants_weight)


def _dense_head(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *rest: Any) -> Head:
    return Head(hidden.contiguous(), weight.contiguous(), rows.contiguous(), targets.contiguous(), *rest)


class _Chunk:
    """Some rows of a head with their logits alive; see `one_pass`."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.logprob = torch.full((head.num_edges,), float("nan"), dtype=torch.float32, device=head.hidden.device)
        self.stats = torch.empty(3, head.num_rows, dtype=torch.float32, device=head.hidden.device)
        self.logits = _product(head.hidden, head.weight)
        if head.num_rows:
            _chunk_stats(self.logits, head, self.stats, self.logprob, 0)
        self.entropy = self.stats[2]

    def backward(
        self, by_logprob: Tensor, by_entropy: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, begins: bool
    ) -> None:
        if d_weight is not None and begins:
            d_weight.zero_()
        if not self.head.num_rows:
            return
        edges = _sorted(self.head, by_logprob)
        dz = _chunk_grad(self.logits, self.head, self.stats, edges, by_entropy.contiguous(), 0)
        if d_hidden is not None:
            torch.mm(dz, self.head.weight, out=d_hidden)
        if d_weight is not None and d_weight.dtype is torch.float32:
            _add_product(d_weight, dz, self.head.hidden)
        elif d_weight is not None:  # one chunk, rounded once
            torch.mm(dz.t(), self.head.hidden, out=d_weight)


_HEAD = one_pass.Chunking(_Chunk, lambda head: _chunk_rows(head.num_cols, head.hidden.element_size()))


def policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: one_pass.Loss,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ibtpo_kernels.policy_head`; with several chunks the host waits once, for the number of edges of each."""
    hidden, weight, rows, targets = (x.contiguous() for x in (hidden, weight, rows, targets))
    with on_device(hidden):
        return one_pass.policy_head(hidden, weight, rows, targets, loss, temperature, softcap, _HEAD)
