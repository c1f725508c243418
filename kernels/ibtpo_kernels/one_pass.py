"""Forward and backward of a linear head in one pass, for a loss that depends only on log-probs and entropies.

    linear_logprob, loss, backward       u = x W^T | then again u = x W^T, dx = du W, dW = du^T x            8 T H V
    policy_head                          u = x W^T, loss of these rows, dx = du W, dW = du^T x               6 T H V

The loss is a sum over rows and edges, so it can be computed by chunks of rows. For each chunk: make the logits, compute
the loss and its gradient by log-prob and entropy, and form the gradients of hidden and weight while the logits are
alive. The backward of the returned scalar multiplies these gradients by the incoming one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ibtpo_kernels.gradients import NO_SECOND, needs_grad
from ibtpo_kernels.logits import Grads, Head, LogitOps, without_autocast, work_dtype
from ibtpo_kernels.logprob import Products, part, spans, tile_shape

Selection = Tensor | slice
Loss = Callable[[Tensor, Tensor, Selection, Selection], Tensor]
"""(logprob [e], entropy [t], edges, rows) -> scalar; `edges` and `rows` select these from all E and T."""

_CHUNK_ELEMENTS = 1 << 24  # logits alive at a time: 64 MiB in float32
_CHUNK_ROWS = 64  # at least

GPU_CHUNK_BYTES = 768 << 20
"""Logits in float32 and their gradient alive at a time in the Triton kernels: enough rows for an efficient product."""


class Chunk(Protocol):
    """Some rows of a head with their logits alive."""

    logprob: Tensor  # [e]
    entropy: Tensor  # [t]

    def backward(
        self, by_logprob: Tensor, by_entropy: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, begins: bool
    ) -> None:
        """Write the rows' d_hidden [t, H]; write (if `begins`) or add to d_weight [V, H]. Overwrites the logits."""


class Chunking(NamedTuple):
    """How a backend makes chunks."""

    chunk: Callable[[Head], Chunk]
    chunk_rows: Callable[[Head], int]  # rows a chunk


def policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: Loss,
    temperature: float,
    softcap: float | None,
    chunking: Chunking,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprob [E], entropy [T]) as in `ibtpo_kernels.policy_head`; autograd through the first."""
    if not needs_grad(hidden, weight):
        hidden, weight = hidden.detach(), weight.detach()
    head = Head(hidden, weight, rows, targets, temperature, softcap)
    value, logprob, entropy = _PolicyHead.apply(*head, loss, chunking)  # type: ignore[no-untyped-call]
    return value, logprob, entropy


class _PolicyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *fields, loss, chunking = args
        head = Head(*fields)
        wide = work_dtype(head.hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(head.hidden) if wants_hidden else None
        value = head.hidden.new_zeros((), dtype=wide)
        logprob = head.hidden.new_empty(head.num_edges, dtype=wide)
        entropy = head.hidden.new_empty(head.num_rows, dtype=wide)
        size = chunking.chunk_rows(head)
        d_weight = _weight_sum(head, wide, size) if wants_weight else None
        for rows, edges, local in _split(head, size):
            with without_autocast(head.hidden):
                chunk = chunking.chunk(local)
            of_chunk, grads = _evaluate(loss, chunk, edges, rows, wants_hidden or wants_weight)
            value += of_chunk
            logprob[edges], entropy[rows] = chunk.logprob, chunk.entropy
            if grads is not None:
                of_rows = None if d_hidden is None else d_hidden[rows]
                with without_autocast(head.hidden):
                    chunk.backward(*grads, of_rows, d_weight, rows.start == 0)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(head.weight.dtype))
        ctx.mark_non_differentiable(logprob, entropy)
        return value, logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; the inputs are not kept, so no graph can be made
            raise RuntimeError(NO_SECOND)
        found = ctx.saved_tensors
        if grad.is_cpu and grad.item() == 1.0:
            return *found, None, None, None, None, None, None
        scale = grad if grad.dim() == 0 else grad.reshape(())  # 0-dimensional: x keeps its type, scale its digits
        return *(None if x is None else x * scale for x in found), None, None, None, None, None, None


def _weight_sum(head: Head, wide: torch.dtype, chunk_rows: int) -> Tensor:
    """An accumulator for d_weight, written by the first chunk; float32 if several tiles or chunks are summed."""
    at_once = head.num_rows <= min(chunk_rows, tile_shape(head.num_rows, head.num_cols)[0])
    return torch.empty_like(head.weight, dtype=head.weight.dtype if at_once else wide)


def _split(head: Head, size: int) -> Iterator[tuple[slice, Selection, Head]]:
    """(rows, edges, head of these) of each chunk, at least one; every edge is in the chunk of its row."""
    num_rows = head.num_rows
    if num_rows <= size:
        yield slice(0, num_rows), slice(None), head
        return
    by_row, order = head.rows.sort(stable=True)
    starts = torch.arange(0, num_rows + size, size, device=by_row.device)
    bounds = torch.searchsorted(by_row, starts).tolist()
    for i, rows in enumerate(spans(num_rows, size)):
        edges = order[bounds[i] : bounds[i + 1]]
        local_rows, targets = head.rows[edges] - rows.start, head.targets[edges]
        yield rows, edges, head._replace(hidden=head.hidden[rows], rows=local_rows, targets=targets)


def _evaluate(
    loss: Loss, chunk: Chunk, edges: Selection, rows: Selection, wants_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The loss of a chunk and, if wanted, its gradient by log-prob and entropy."""
    with torch.enable_grad():
        logprob, entropy = (x.detach().requires_grad_(wants_grad) for x in (chunk.logprob, chunk.entropy))
        value = loss(logprob, entropy, edges, rows)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                "policy_head: loss must return a tensor of one element, a sum over the edges and rows given"
            )
        if not wants_grad:
            return value.detach().reshape(()), None
        found: list[Tensor | None] = [None, None]
        if value.requires_grad:
            found = list(torch.autograd.grad(value.reshape(()), (logprob, entropy), allow_unused=True))
    by_logprob = torch.zeros_like(logprob) if found[0] is None else found[0]
    by_entropy = torch.zeros_like(entropy) if found[1] is None else found[1]
    return value.detach().reshape(()), (by_logprob, by_entropy)


def chunk_rows(num_cols: int) -> int:
    """Rows of a chunk: as many as the limit on its logits allows."""
    return max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(num_cols, 1))


def gpu_chunk_rows(num_cols: int, element_size: int, budget: int = GPU_CHUNK_BYTES) -> int:
    """The same for the Triton kernels: a multiple of the matrix product's tile."""
    rows = budget // ((4 + element_size) * max(num_cols, 1))
    return max(rows // 128 * 128, _CHUNK_ROWS)


def tiled(ops: LogitOps) -> Chunking:
    """Chunks made of tiles: see `logprob` for the tiles and `logits` for the passes."""
    return Chunking(lambda head: _TiledChunk(head, ops), lambda head: chunk_rows(head.num_cols))


class _TiledChunk:
    """Logits of some rows as tiles, each dense."""

    def __init__(self, head: Head, ops: LogitOps) -> None:
        self.head, self.ops, self.products = head, ops, Products(head, ops)
        wide = self.products.wide
        num_rows, num_cols = head.num_rows, head.num_cols
        tile_rows, tile_cols = tile_shape(num_rows, num_cols)
        self.cuts = [(cols, rows) for cols in spans(num_cols, tile_cols) for rows in spans(num_rows, tile_rows)]
        self.logprob = head.hidden.new_empty(head.num_edges, dtype=wide)
        self.stats = head.hidden.new_empty(3, num_rows, dtype=wide)
        self.tiles = []
        for cols, rows in self.cuts:
            u = part(self.products.hidden, rows) @ self.products.block(cols).t()
            ops.stats(u, rows.start, cols.start, head, self.stats, self.logprob)
            self.tiles.append(u)
        ops.finish(head, self.stats, self.logprob)
        self.entropy = self.stats[2]

    def backward(
        self, by_logprob: Tensor, by_entropy: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, begins: bool
    ) -> None:
        products, grads = self.products, Grads.of(self.head, by_logprob, by_entropy)
        total = None if d_hidden is None else d_hidden.to(products.wide)  # itself, or a wider accumulator
        for (cols, rows), u in zip(self.cuts, self.tiles, strict=True):
            du = self.ops.grad(u, rows.start, cols.start, self.head, self.stats, grads)
            if total is not None:
                products.add(part(total, rows), du, products.block(cols), cols.start == 0)
            if d_weight is not None:
                products.add(part(d_weight, cols), du.t(), part(products.hidden, rows), begins and rows.start == 0)
        if d_hidden is not None and total is not None and total is not d_hidden:
            d_hidden.copy_(total)
        if d_weight is not None and begins and not self.cuts:
            d_weight.zero_()
        self.tiles.clear()
