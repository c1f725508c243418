"""Log-probability and entropy of a linear head, without a [T, V] tensor.

With u = hidden @ weight.T, z = cap tanh(u / cap) / temperature (without a cap z = u / temperature), p = softmax(z), and
for each row r

    m_r = max_v z_rv,  l_r = log sum_v exp(z_rv - m_r)      logprob_e = (z[row_e, target_e] - m[row_e]) - l[row_e]
    H_r = l_r - sum_v p_rv (z_rv - m_r)

the gradient of a loss L with respect to z, with g_e = dL/dlogprob_e, h_r = dL/dH_r and G_r the sum of g_e over the
edges of r, is

    dz_rv = sum_e g_e [target_e = v] - p_rv G_r - h_r p_rv (log p_rv + H_r),    du = dz (1 - tanh^2) / temperature.

Logits exist a tile at a time, rows by vocabulary, small enough to stay in the cache between the matrix product that
makes it, the pass over it, and the products that use it:

    forward     for each block of the vocabulary, for each block of rows     u = x W_b^T,  updates (m, s, w) of the rows
    backward    the same tiles again                                         u -> du,  dx += du W_b,  dW_b += du^T x

Forward keeps m, l and H ([T] each). If all logits are one tile, as with a vocabulary of characters, it keeps that tile,
too: its little memory saves a product. m and l are kept apart, since their sum would round l away for large logits. A
head of 16-bit numbers is widened a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels.gradients import needs_grad, once_differentiable
from ibtpo_kernels.logits import TORCH_OPS, Grads, Head, LogitOps, in_own_types, work_dtype

_TILE_ELEMENTS = 1 << 19  # logits alive at a time: 2 MiB in float32
_TILE_ROWS, _TILE_COLS = 512, 256  # least sizes, if there are as many: smaller matrix products are slower


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    ops: LogitOps = TORCH_OPS,
) -> tuple[Tensor, Tensor]:
    """(logprob [E], entropy [T]) as in `ibtpo_kernels.linear_logprob`; autograd through both."""
    head = Head(hidden, weight, rows, targets, temperature, softcap)
    if needs_grad(hidden, weight):
        logprob, entropy = _LinearLogprob.apply(*head, ops)  # type: ignore[no-untyped-call]
        return logprob, entropy
    logprob, stats, _ = forward(head, ops)
    return logprob, stats[2]


def linear_logprob_stats(*fields: Any, ops: LogitOps = TORCH_OPS) -> tuple[Tensor, Tensor]:
    """(logprob [E], stats [3, T]), for `library`; arguments as of `Head`."""
    logprob, stats, _ = forward(Head(*fields), ops)
    return logprob, stats


def linear_logprob_grads(*given: Any, ops: LogitOps = TORCH_OPS) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight from `Head`'s fields, stats, two gradients and two flags, for `library`."""
    *fields, stats, grad_logprob, grad_entropy, wants_hidden, wants_weight = given
    head = Head(*fields)
    return backward(head, stats, Grads.of(head, grad_logprob, grad_entropy), wants_hidden, wants_weight, ops)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *fields, ops = args
        head = Head(*fields)
        logprob, stats, last = forward(head, ops)
        only = last if last is not None and last.shape == (head.num_rows, head.num_cols) else None
        ctx.save_for_backward(head.hidden, head.weight, head.rows, head.targets, stats, only)
        ctx.rest = head.temperature, head.softcap, ops
        return logprob, stats[2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, targets, stats, only = ctx.saved_tensors
        temperature, softcap, ops = ctx.rest
        head = Head(hidden, weight, rows, targets, temperature, softcap)
        grads = Grads.of(head, grad_logprob, grad_entropy)
        wants = ctx.needs_input_grad
        d_hidden, d_weight = backward(head, stats, grads, wants[0], wants[1], ops, only)
        return d_hidden, d_weight, None, None, None, None, None


def tile_shape(num_rows: int, num_cols: int) -> tuple[int, int]:
    """Rows and columns of a tile: within the budget, unless the least sizes exceed it."""
    rows = min(num_rows, max(_TILE_ROWS, _TILE_ELEMENTS // max(num_cols, 1)))
    return max(rows, 1), min(num_cols, max(_TILE_COLS, _TILE_ELEMENTS // max(rows, 1)))


def spans(total: int, size: int) -> Iterator[slice]:
    """[0, total) cut into runs of `size`."""
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def part(x: Tensor, span: slice) -> Tensor:
    """x[span], or, cheaper, x itself if that is all of it."""
    return x if span.start == 0 and span.stop == x.shape[0] else x[span]


class Products:
    """The matrix products of one call, with operands widened if the hardware does not multiply 16-bit numbers."""

    def __init__(self, head: Head, ops: LogitOps) -> None:
        self.wide = work_dtype(head.hidden.dtype)
        self.dtype = head.hidden.dtype if ops.multiplies(head.hidden) else self.wide
        self.hidden = head.hidden.to(self.dtype)
        self.weight = head.weight
        self.buffer: Tensor | None = None

    def block(self, cols: slice) -> Tensor:
        """[v, H], a block of the head."""
        return part(self.weight, cols).to(self.dtype)

    def tile(self, rows: slice, block: Tensor) -> Tensor:
        """u [t, v], overwritten by the next one; the first is the largest."""
        x = part(self.hidden, rows)
        if self.buffer is None:
            self.buffer = u = F.linear(x, block)
            return u
        return torch.mm(x, block.t(), out=self.buffer.view(-1)[: len(x) * len(block)].view(len(x), len(block)))

    def add(self, total: Tensor, a: Tensor, b: Tensor, begins: bool) -> None:
        """total (+)= a b."""
        if total.dtype is not self.dtype:
            product = a @ b
            total.copy_(product) if begins else total.add_(product)
        elif begins:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)


@in_own_types
def forward(head: Head, ops: LogitOps) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprob [E], stats [3, T] = m, l, H, the last tile)."""
    products = Products(head, ops)
    num_rows, num_cols = head.num_rows, head.num_cols
    tile_rows, tile_cols = tile_shape(num_rows, num_cols)
    logprob = head.hidden.new_empty(head.num_edges, dtype=products.wide)
    stats = head.hidden.new_empty(3, num_rows, dtype=products.wide)
    u = None
    for cols in spans(num_cols, tile_cols):
        block = products.block(cols)
        for rows in spans(num_rows, tile_rows):
            u = products.tile(rows, block)
            ops.stats(u, rows.start, cols.start, head, stats, logprob)
    ops.finish(head, stats, logprob)
    return logprob, stats, u


@in_own_types
def backward(
    head: Head,
    stats: Tensor,
    grads: Grads,
    wants_hidden: bool,
    wants_weight: bool,
    ops: LogitOps,
    only: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, each only if wanted: nothing is computed or allocated for the other.

    `only`: the tile of all logits, if it was kept; it is not changed.
    """
    products = Products(head, ops)
    num_rows, num_cols = head.num_rows, head.num_cols
    tile_rows, tile_cols = tile_shape(num_rows, num_cols)
    d_hidden = head.hidden.new_empty(head.hidden.shape, dtype=products.wide) if wants_hidden else None
    d_weight = torch.empty_like(head.weight) if wants_weight else None
    for cols in spans(num_cols, tile_cols):
        block = products.block(cols)
        total = None if d_weight is None else _total(part(d_weight, cols), products, num_rows <= tile_rows)
        for rows in spans(num_rows, tile_rows):
            u = products.tile(rows, block) if only is None else only.clone()
            du = ops.grad(u, rows.start, cols.start, head, stats, grads)
            if d_hidden is not None:
                products.add(part(d_hidden, rows), du, block, cols.start == 0)
            if total is not None:
                products.add(total, du.t(), part(products.hidden, rows), rows.start == 0)
        if d_weight is not None and total is not None and total.dtype is not d_weight.dtype:
            d_weight[cols] = total
    if d_weight is not None and num_rows == 0:
        d_weight.zero_()
    return None if d_hidden is None else d_hidden.to(head.hidden.dtype), d_weight


def _total(d_block: Tensor, products: Products, at_once: bool) -> Tensor:
    """The accumulator of a block of d_weight: the block itself, except for 16-bit sums of several tiles."""
    if d_block.dtype is products.wide or (at_once and d_block.dtype is products.dtype):
        return d_block
    return torch.empty(d_block.shape, dtype=products.wide, device=d_block.device)
