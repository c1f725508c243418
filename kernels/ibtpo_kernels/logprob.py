"""Log-probability and entropy of a linear head, without a [T, V] tensor that outlives a chunk of rows.

With z = hidden @ weight.T / temperature, p = softmax(z), and for each row r

    m_r = max_v z_rv,  l_r = log sum_v exp(z_rv - m_r)      logprob_e = (z[row_e, target_e] - m[row_e]) - l[row_e]
    H_r = l_r - sum_v p_rv (z_rv - m_r)

the gradient of a loss L with respect to z, with g_e = dL/dlogprob_e, h_r = dL/dH_r and G_r the sum of g_e over the
edges of r, is

    dz_rv = sum_e g_e [target_e = v] - p_rv G_r - h_r p_rv (log p_rv + H_r).

Forward keeps m, l and H ([T] each); backward computes the chunk's logits again. m and l stay apart, for their sum would
round away l where logits are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # logits alive at a time: 16 MiB in float32, which stays near the last-level cache

RowStats = Callable[[Tensor], Tensor]
LogitGrad = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class ChunkOps(NamedTuple):
    """The two passes over a chunk of logits z [t, V]; a backend may bring fused ones."""

    row_stats: RowStats  # z -> [3, t]: m, l, H
    logit_grad: LogitGrad  # z, [3, t], G, h -> -p G - h p (log p + H), may overwrite z


def row_stats(z: Tensor) -> Tensor:
    """[3, t], (m, l, H) of logits z [t, V]; a logit of -inf has probability and contribution zero."""
    top = z.amax(-1)
    shifted = (z - top[:, None]).clamp_(min=torch.finfo(z.dtype).min)  # 0 * -inf would be NaN
    p = shifted.exp()
    total = p.sum(-1)
    log_sum = total.log()
    return torch.stack((top, log_sum, log_sum - p.mul_(shifted).sum(-1) / total))


def logit_grad(z: Tensor, stats: Tensor, grad_rows: Tensor, grad_entropy: Tensor) -> Tensor:
    """[t, V], the dense part of dz: -p G - h p (log p + H); overwrites z."""
    top, log_sum, entropy = stats[:, :, None]
    log_p = z.sub_(top).sub_(log_sum).clamp_(min=torch.finfo(z.dtype).min)
    p = log_p.exp()
    factor = log_p.add_(entropy).mul_(grad_entropy[:, None]).add_(grad_rows[:, None])
    return factor.mul_(p).neg_()


TORCH_OPS = ChunkOps(row_stats, logit_grad)


def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, ops: ChunkOps = TORCH_OPS
) -> tuple[Tensor, Tensor]:
    """(logprob [E], entropy [T]) as in `ibtpo_kernels.linear_logprob`; autograd through both."""
    logprob, entropy = _LinearLogprob.apply(hidden, weight, rows, targets, temperature, ops)  # type: ignore[no-untyped-call]
    return logprob, entropy


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    rows: slice  # rows [start, stop) of hidden
    edges: Tensor | slice  # which edges start in them
    local_rows: Tensor  # their row within the chunk
    targets: Tensor


def _chunks(rows: Tensor, targets: Tensor, num_rows: int, vocabulary: int) -> Iterator[_Chunk]:
    """Cut the rows so that a chunk's logits stay small; every edge falls into the chunk of its row."""
    size = max(64, _CHUNK_ELEMENTS // max(vocabulary, 1))
    if num_rows <= size:
        yield _Chunk(slice(0, num_rows), slice(None), rows, targets)
        return
    by_row, order = rows.sort(stable=True)
    starts = torch.arange(0, num_rows + size, size, device=rows.device)
    bounds = torch.searchsorted(by_row, starts).tolist()
    for i in range(-(-num_rows // size)):
        first = i * size
        edges = order[bounds[i] : bounds[i + 1]]
        yield _Chunk(slice(first, min(first + size, num_rows)), edges, rows[edges] - first, targets[edges])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, ops: ChunkOps
    ) -> tuple[Tensor, Tensor]:
        dtype = _work_dtype(hidden.dtype)
        head = weight.to(dtype)
        logprob = torch.empty(len(rows), dtype=dtype, device=hidden.device)
        stats = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        for chunk in _chunks(rows, targets, len(hidden), len(weight)):
            z = _logits(hidden[chunk.rows].to(dtype), head, temperature)
            chosen = z[chunk.local_rows, chunk.targets]
            stats[:, chunk.rows] = local = ops.row_stats(z)
            logprob[chunk.edges] = (chosen - local[0, chunk.local_rows]) - local[1, chunk.local_rows]
        ctx.save_for_backward(hidden, weight, rows, targets, stats)
        ctx.temperature, ctx.ops = temperature, ops
        ctx.set_materialize_grads(True)
        return logprob, stats[2].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, rows, targets, stats = ctx.saved_tensors
        grad_logprob, grad_entropy = grads[0].contiguous(), grads[1].contiguous()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = stats.dtype
        head = weight.to(dtype)
        d_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants_weight else None
        for chunk in _chunks(rows, targets, len(hidden), len(weight)):
            x, own = hidden[chunk.rows].to(dtype), grad_logprob[chunk.edges]
            z = _logits(x, head, ctx.temperature)
            grad_rows = z.new_zeros(len(z)).index_put_((chunk.local_rows,), own, accumulate=True)
            dz = ctx.ops.logit_grad(z, stats[:, chunk.rows], grad_rows, grad_entropy[chunk.rows])
            dz.index_put_((chunk.local_rows, chunk.targets), own, accumulate=True)
            if d_hidden is not None:
                torch.mm(dz, head, out=d_hidden[chunk.rows]).div_(ctx.temperature)
            if d_weight is not None:
                d_weight.addmm_(dz.t(), x, alpha=1.0 / ctx.temperature)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(x: Tensor, head: Tensor, temperature: float) -> Tensor:
    z = x @ head.t()  # dense, as the compiled chunk ops expect
    return z if temperature == 1.0 else z.div_(temperature)
