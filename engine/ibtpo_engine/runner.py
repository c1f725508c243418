"""One forward pass of the model over rows that live in the page pool.

A row is one token of one path: its id, its position, the pool slot its key and value go to (-1: they are there
already), and how much of its path it sees. Decoding, prefill in chunks, and recomputing a single token are all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_engine.model import Model, QKNorm
from ibtpo_engine.pages import PagePool
from ibtpo_kernels import DecodePlan, DecodePlanner, rope_append, tree_decode


@dataclass(frozen=True)
class Rows:
    """T rows to compute; rows of one path must be neighbours for shared pages to be read once.

    Attributes:
        tokens: int64 [T].
        pos: int64 [T], depth of each token on its path.
        address: int64 [T], page * PAGE + offset its key and value are written to; -1 writes nothing.
        row: int32 [T], the page-table row of its path.
    """

    tokens: npt.NDArray[np.int64]
    pos: npt.NDArray[np.int64]
    address: npt.NDArray[np.int64]
    row: npt.NDArray[np.int32]


class PagedAttention:
    """Attention of a batch of rows over the pool; appends the rows' own keys and values first."""

    def __init__(self, pool: PagePool, plan: DecodePlan, address: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.pool = pool
        self.plan = plan
        self.address = address
        self.cos = cos
        self.sin = sin

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: QKNorm | None) -> Tensor:
        keys, values = self.pool.layers[layer]
        q_weight, k_weight, eps = (None, None, 0.0) if norms is None else norms.qk_norm
        q = rope_append(
            q, k, v, self.cos, self.sin, keys, values, self.address, q_weight=q_weight, k_weight=k_weight, eps=eps
        )
        return tree_decode(q, keys, values, self.plan)


class Runner:
    """Runs rows; keeps the attention plan while the set of rows stays the same."""

    def __init__(self, model: Model, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self._plan: DecodePlan | None = None

    def invalidate(self) -> None:
        """The rows changed in kind: plan anew at the next `forward`."""
        self._plan = None

    def forward(self, rows: Rows, planner: DecodePlanner) -> Tensor:
        """Hidden states [T, H] of `rows`, whose paths' pages are in the table of `planner`."""
        device = self.model.device
        tokens, pos, address = (torch.from_numpy(array).to(device) for array in (rows.tokens, rows.pos, rows.address))
        if self._plan is None:
            lengths = (rows.pos + 1).astype(np.int32)
            self._plan = planner.plan(torch.from_numpy(rows.row), torch.from_numpy(lengths))
        else:  # same rows, one token further; some have a new page
            self._plan.lengths.copy_(pos + 1)
            planner.upload()
        attend = PagedAttention(self.pool, self._plan, address, *self.model.rotation(pos))
        hidden: Tensor = self.model(tokens, attend)
        return hidden
