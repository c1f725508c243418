"""Log-probability and entropy of a linear head, without a [T, V] tensor that outlives a chunk of rows.

With z = hidden @ weight.T / temperature, p = softmax(z), and for each row r

    lse_r = log sum_v exp z_rv        logprob_e = z[row_e, target_e] - lse[row_e]
    H_r   = lse_r - sum_v p_rv z_rv

the gradient of a loss with respect to z, given g_e = dL/dlogprob_e, h_r = dL/dH_r and G_r = sum of g_e over r's edges, is

    dz_rv = sum_e g_e [target_e = v] - p_rv G_r - h_r p_rv (log p_rv + H_r).

Forward keeps lse and H ([T] each); backward computes the chunk's logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # logits alive at a time: 16 MiB in float32, which stays near the last-level cache

RowStats = Callable[[Tensor], tuple[Tensor, Tensor]]
LogitGrad = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class ChunkOps(NamedTuple):
    """The two passes over a chunk of logits z [t, V]; a backend may bring fused ones."""

    row_stats: RowStats  # z -> (lse [t], entropy [t])
    logit_grad: LogitGrad  # z, lse, entropy, G, h -> -p G - h p (log p + H), may overwrite z


def row_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """(lse [t], entropy [t]) of logits z [t, V]; a logit of -inf has probability and contribution zero."""
    lse = torch.logsumexp(z, -1)
    finite = z.clamp(min=torch.finfo(z.dtype).min)  # 0 * -inf would be NaN
    p = (finite - lse[:, None]).exp_()
    return lse, lse - p.mul_(finite).sum(-1)


def logit_grad(z: Tensor, lse: Tensor, entropy: Tensor, grad_rows: Tensor, grad_entropy: Tensor) -> Tensor:
    """[t, V], the dense part of dz: -p G - h p (log p + H); overwrites z."""
    log_p = z.sub_(lse[:, None]).clamp_(min=torch.finfo(z.dtype).min)
    p = log_p.exp()
    factor = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_rows[:, None])
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
        lse = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(lse)
        for chunk in _chunks(rows, targets, len(hidden), len(weight)):
            z = _logits(hidden[chunk.rows].to(dtype), head, temperature)
            chosen = z[chunk.local_rows, chunk.targets]
            lse[chunk.rows], entropy[chunk.rows] = ops.row_stats(z)
            logprob[chunk.edges] = chosen - lse[chunk.rows][chunk.local_rows]
        ctx.save_for_backward(hidden, weight, rows, targets, lse, entropy)
        ctx.temperature, ctx.ops = temperature, ops
        ctx.set_materialize_grads(True)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, rows, targets, lse, entropy = ctx.saved_tensors
        grad_logprob, grad_entropy = grads[0].contiguous(), grads[1].contiguous()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = lse.dtype
        head = weight.to(dtype)
        d_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants_weight else None
        for chunk in _chunks(rows, targets, len(hidden), len(weight)):
            x, own = hidden[chunk.rows].to(dtype), grad_logprob[chunk.edges]
            z = _logits(x, head, ctx.temperature)
            grad_rows = z.new_zeros(len(z)).index_put_((chunk.local_rows,), own, accumulate=True)
            dz = ctx.ops.logit_grad(z, lse[chunk.rows], entropy[chunk.rows], grad_rows, grad_entropy[chunk.rows])
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
