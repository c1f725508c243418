"""Attention of rows over the page pool."""

from __future__ import annotations

from torch import Tensor

from ibtpo_engine.model import QKNorm
from ibtpo_engine.pages import PagePool
from ibtpo_kernels import DecodePlan, active_backend, append_kv, rope, rope_append, tree_decode


class PagedAttention:
    """Attention of a batch of rows over the pool; appends the rows' own keys and values first.

    In Triton the fused kernel sums a head's norm in another order than the separate kernels of the training forward
    pass; a `uniform` plan there uses the separate ones.
    """

    def __init__(self, pool: PagePool, plan: DecodePlan, address: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.pool = pool
        self.plan = plan
        self.address = address
        self.cos = cos
        self.sin = sin
        self._is_fused = not plan.uniform or active_backend(cos.device) == "cpu"

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: QKNorm | None) -> Tensor:
        keys, values = self.pool.layers[layer]
        if not self._is_fused:
            if norms is not None:
                q, k = norms.q_norm(q), norms.k_norm(k)
            append_kv(rope(k, self.cos, self.sin), v, keys, values, self.address)
            return tree_decode(rope(q, self.cos, self.sin), keys, values, self.plan)
        q_weight, k_weight, eps = (None, None, 0.0) if norms is None else norms.qk_norm
        q = rope_append(
            q, k, v, self.cos, self.sin, keys, values, self.address, q_weight=q_weight, k_weight=k_weight, eps=eps
        )
        return tree_decode(q, keys, values, self.plan)
