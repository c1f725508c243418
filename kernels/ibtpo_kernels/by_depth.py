"""Attention over packed trees that sums in the order of decode, and so gives each query the bits of decode.

`tree_attention` sums over blocks of the packed order, so its bits depend on the packing; `tree_decode` sums over pages
of a query's own path. Here packed keys and values are copied into pages, and `tree_decode` runs over those::

    packed order    q q q q a a a b b          pages of 2, named by their last token on a path
    depth           0 1 2 3 4 5 6 4 5
    path of a       [0 1][2 3][4 5][6 .]
    path of b       [0 1][2 3][7 8]            a page is shared by every path through its last token

A page that a branch point cuts is copied for each path below it, as in the engine. The gradient is that of
`tree_attention`, which is computed as well; its values differ by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_kernels import checks
from ibtpo_kernels.gradients import needs_grad
from ibtpo_kernels.ops import plan_decode, tree_attention, tree_decode
from ibtpo_kernels.plan import DecodePlan


@dataclass(frozen=True, kw_only=True)
class DepthLayout:
    """The layout of a packed forest's keys and values in pages.

    Attributes:
        end: int32 [N], as it was given.
        tokens: int64 [P * page_size], the packed token in each slot; slots past the end of a path are never seen.
        plan: a query a packed token, in packed order.
    """

    end: Tensor
    tokens: Tensor
    plan: DecodePlan


def plan_by_depth(end: Tensor, *, page_size: int = 16) -> DepthLayout:
    """Lay out a packed forest in pages, once for a batch and all its layers.

    Args:
        end: int32 [N], exclusive end of each token's subtree, as in `tree_attention`; read on the host.
        page_size: slots a page, at least 1; the bits of a result depend on it, so use that of the engine's pool (16).

    Raises:
        ValueError: `end` is no forest in depth-first order, or page_size is less than 1.
    """
    if page_size < 1:
        raise ValueError(f"plan_by_depth: page_size={page_size} must be at least 1")
    if end.dim() != 1 or end.dtype != torch.int32:
        raise ValueError(f"plan_by_depth: end is {end.dtype} {list(end.shape)}; expected torch.int32 [N]")
    last = end.cpu().numpy()
    depth = _depth(last)
    table, slots = _pages(last, depth, page_size)
    is_leaf = (last == np.arange(1, len(last) + 1)).astype(np.int64)  # torch.compile's numpy cannot sum booleans
    rows = np.cumsum(is_leaf) - is_leaf  # the first leaf at or after a token is below it
    plan = plan_decode(
        torch.from_numpy(table).to(end.device),
        torch.from_numpy(rows.astype(np.int32)).to(end.device),
        torch.from_numpy((depth + 1).astype(np.int32)).to(end.device),
        page_size=page_size,
        uniform=True,
    )
    return DepthLayout(end=end, tokens=torch.from_numpy(slots.reshape(-1)).to(end.device), plan=plan)


def tree_attention_by_depth(
    q: Tensor, k: Tensor, v: Tensor, layout: DepthLayout, *, scale: float | None = None
) -> Tensor:
    """`tree_attention`, with the bits of `tree_decode` for each query on its path, in pages of the layout's size.

    Args:
        q: [N, Hq, D]; k, v: [N, Hkv, D], tokens in depth-first pre-order.
        layout: from `plan_by_depth`, for these N tokens.
        scale: of the scores; default 1 / sqrt(D).

    Returns:
        [N, Hq, D]; differentiable in q, k and v, with the gradient of `tree_attention`.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Source: ours.
    """
    if not len(q) == len(k) == len(v) == len(layout.end):
        raise ValueError(
            f"tree_attention_by_depth: q, k and v have {len(q)}, {len(k)} and {len(v)} tokens, the layout "
            f"{len(layout.end)}"
        )
    shape = (-1, layout.plan.page_size, *k.shape[1:])
    with torch.no_grad():
        k_pages, v_pages = (x.detach().index_select(0, layout.tokens).view(shape) for x in (k, v))
        ordered = tree_decode(q.detach(), k_pages, v_pages, layout.plan, scale=scale)
    if not needs_grad(q, k, v):
        return ordered
    return with_value_of(tree_attention(q, k, v, layout.end, scale=scale), ordered)


def with_value_of(x: Tensor, value: Tensor) -> Tensor:
    """The bits of `value` with the gradient of `x`, which equals it up to rounding.

    Args:
        x: differentiable; its value is not used.
        value: of x's shape and dtype; it gets no gradient.
    """
    out: Tensor = _WithValueOf.apply(x, value.detach())  # type: ignore[no-untyped-call]
    return out


class _WithValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _depth(end: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """[N], the number of ancestors of each token: j is one of the tokens in (j, end[j]).

    Raises:
        ValueError: subtrees overlap without one containing the other, or `end` is out of range.
    """
    num, index = len(end), np.arange(len(end))
    if num and (end.min() < 1 or end.max() > num or (end <= index).any()):
        raise ValueError(f"plan_by_depth: end must hold indices in (i, {num}]")
    crossing = checks.first_crossing(end.tolist())
    if crossing >= 0:
        raise ValueError(f"plan_by_depth: {checks.no_forest(crossing)}")
    change = np.zeros(num + 1, np.int64)
    np.add.at(change, index + 1, 1)
    np.add.at(change, end, -1)
    return np.cumsum(change)[:num]


def _pages(
    end: npt.NDArray[np.int32], depth: npt.NDArray[np.int64], page_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(int32 [leaves, width] page ids of each leaf's path, int64 [pages, page_size] the token in each slot)."""
    leaves = np.flatnonzero(end == np.arange(1, len(end) + 1))
    width = -(-(int(depth.max()) + 1) // page_size) if len(end) else 0
    table: npt.NDArray[np.int32] = np.full((len(leaves), width), -1, np.int32)
    path: npt.NDArray[np.int64] = np.zeros(width * page_size, np.int64)
    pages: list[npt.NDArray[np.int64]] = []
    begin = 0
    for row, leaf in enumerate(leaves.tolist()):
        first, length = int(depth[begin]), int(depth[leaf]) + 1  # tokens [begin, leaf] are a chain of these depths
        path[first:length] = np.arange(begin, leaf + 1)
        path[length:] = leaf
        column, stop = first // page_size, -(-length // page_size)
        table[row, :column] = table[row - 1, :column]
        table[row, column:stop] = np.arange(len(pages), len(pages) + stop - column)
        pages.extend(path[column * page_size : stop * page_size].reshape(-1, page_size).copy())
        begin = leaf + 1
    return table, np.array(pages, np.int64).reshape(-1, page_size)
