"""The passes over a tile of logits that the chunked heads share, and their implementation in plain torch.

A tile u [t, v] is rows [first_row, first_row + t) and columns [first_col, first_col + v) of hidden @ weight.T. Tiles of
a row are processed from left to right; `stats` [3, T] carries (m, s, w) of each row from one to the next:

    m = max z,   s = sum exp(z - m),   w = sum exp(z - m) (z - m)      `finish` makes (m, l, H) of it,
                                                                       l = log s, entropy H = l - w / s
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import NamedTuple, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOWEST = -1e30  # stands in for -inf, whose product with probability 0 would be NaN


class Head(NamedTuple):
    """Hidden states, the head that makes logits of them, and the (row, target) entries wanted; as `linear_logprob`."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    rows: Tensor  # int64 [E]
    targets: Tensor  # int64 [E]
    temperature: float
    softcap: float | None

    @property
    def num_rows(self) -> int:  # T; len() of a tensor costs more
        return self.hidden.shape[0]

    @property
    def num_cols(self) -> int:  # V
        return self.weight.shape[0]

    @property
    def num_edges(self) -> int:  # E
        return self.rows.shape[0]


class Grads(NamedTuple):
    """Gradients of a loss with respect to the head's outputs, dense, in the type of the sums."""

    edges: Tensor  # [E], by logprob
    rows: Tensor  # [T], their sum over the edges of each row
    entropy: Tensor  # [T]

    @classmethod
    def of(cls, head: Head, by_logprob: Tensor, by_entropy: Tensor) -> Self:
        """With the sums over rows added in the order of the edges."""
        edges = by_logprob.contiguous()
        rows = edges.new_zeros(head.num_rows)
        if edges.is_cpu:
            rows.index_add_(0, head.rows, edges)
        else:  # sorts, where index_add_ would be atomic
            rows.index_put_((head.rows,), edges, accumulate=True)
        return cls(edges, rows, by_entropy.contiguous())


class LogitOps(NamedTuple):
    """The passes over a tile, one implementation a backend. Arguments after u: first_row, first_col."""

    stats: Callable[[Tensor, int, int, Head, Tensor, Tensor], None]  # head, stats, chosen [E]: adds a tile to both
    finish: Callable[[Head, Tensor, Tensor], None]  # head, stats, chosen: chosen becomes logprob
    grad: Callable[[Tensor, int, int, Head, Tensor, Grads], Tensor]  # head, stats, grads: du, may overwrite u
    multiplies: Callable[[Tensor], bool]  # whether to multiply 16-bit tensors in their own type


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turn the caller's autocast off, so that products keep the types of their operands."""
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def in_own_types(run: Callable[_P, _R]) -> Callable[_P, _R]:
    """`run`, whose first argument is a `Head`, without the caller's autocast."""

    @wraps(run)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        head = args[0]
        assert isinstance(head, Head)
        with without_autocast(head.hidden):
            return run(*args, **kwargs)

    return alone


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over rows and columns."""
    return torch.promote_types(dtype, torch.float32)


def _logits(u: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """(z, dz/du)."""
    if head.softcap is None:
        return u / head.temperature, 1.0 / head.temperature
    t = (u / head.softcap).tanh()
    return t * (head.softcap / head.temperature), (1.0 - t * t) / head.temperature


def _edges(u: Tensor, first_row: int, first_col: int, head: Head) -> tuple[Tensor | slice, Tensor, Tensor]:
    """The edges in a tile, and their rows and columns there."""
    if u.shape == (head.num_rows, head.num_cols):
        return slice(None), head.rows, head.targets
    rows, cols = head.rows - first_row, head.targets - first_col
    mine = ((rows >= 0) & (rows < u.shape[0]) & (cols >= 0) & (cols < u.shape[1])).nonzero()[:, 0]
    return mine, rows[mine], cols[mine]


def _stats(u: Tensor, first_row: int, first_col: int, head: Head, stats: Tensor, chosen: Tensor) -> None:
    z, _ = _logits(u, head)
    mine, rows, cols = _edges(u, first_row, first_col, head)
    chosen[mine] = z[rows, cols]
    carried = stats[:, first_row : first_row + len(u)]
    if first_col == 0:
        carried[0], carried[1:] = -torch.inf, 0.0
    m, s, w = carried
    top = torch.maximum(m, z.amax(-1))
    shift = (m - top).nan_to_num(nan=0.0).clamp_(min=_LOWEST)  # -inf - -inf if nothing finite came before
    shrink = shift.exp()
    x = (z - top.clamp(min=_LOWEST)[:, None]).clamp_(min=_LOWEST)
    e = x.exp()
    w.add_(shift * s).mul_(shrink).add_((e * x).sum(-1))
    s.mul_(shrink).add_(e.sum(-1))
    m.copy_(top)


def _finish(head: Head, stats: Tensor, chosen: Tensor) -> None:
    m, s, w = stats
    log_sum = s.log()
    w.copy_(log_sum - w / s)
    s.copy_(log_sum)
    chosen.sub_(m[head.rows]).sub_(s[head.rows])


def _grad(u: Tensor, first_row: int, first_col: int, head: Head, stats: Tensor, grads: Grads) -> Tensor:
    z, slope = _logits(u, head)
    here = slice(first_row, first_row + len(u))
    m, log_sum, entropy = stats[:, here, None]
    log_p = z.sub_(m).sub_(log_sum).clamp_(min=_LOWEST)
    p = log_p.exp()
    dz = log_p.add_(entropy).mul_(grads.entropy[here, None]).add_(grads.rows[here, None]).mul_(p).neg_()
    mine, rows, cols = _edges(u, first_row, first_col, head)
    dz.index_put_((rows, cols), grads.edges[mine], accumulate=True)
    return dz.mul_(slope)


TORCH_OPS = LogitOps(_stats, _finish, _grad, lambda x: False)
