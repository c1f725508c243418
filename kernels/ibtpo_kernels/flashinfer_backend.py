"""Backend "flashinfer": `tree_decode` in float16 and bfloat16 by FlashInfer; every other op as on "triton".

If nothing is shared it runs FlashInfer's plain paged decode, else its multi-level cascade over the levels of `cascade`.
Both plan on the host, from lengths fetched from the device, whenever lengths or pages have changed, so this backend
cannot be captured in a CUDA graph: it is for comparison and for GPUs that the Triton kernels do not suit. Its splits
depend on the batch, so results do too, in the last bits.

Sampling stays with Triton: FlashInfer draws from its own generator, which cannot reproduce the tokens of a row's key.
FlashInfer compiles at the first call, which needs nvcc and ninja.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ibtpo_kernels import reference
from ibtpo_kernels.cascade import Level, levels
from ibtpo_kernels.dispatch import triton_kernels
from ibtpo_kernels.plan import DecodePlan

SERVED = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20  # as FlashInfer recommends


def fallback() -> Any:
    """The Triton kernels, or the reference if Triton is missing."""
    return triton_kernels() or reference


def __getattr__(name: str) -> Any:
    """Every other op, from `fallback`."""
    return getattr(fallback(), name)


class _Wrappers:
    """FlashInfer's wrappers on one device, by number of levels, and what was planned last.

    `run` plans only if the plan, its lengths, its pages or the shape of the heads differ from the last call's, so
    the layers of a model plan once a step. Tensors made in inference mode have no version counter: with them every call
    plans.
    """

    def __init__(self, device: torch.device) -> None:
        self.module = import_module("flashinfer")
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.made: dict[tuple[int, bool], Any] = {}
        self.last: tuple[Any, tuple[object, ...]] | None = None
        self.current: Any = None
        self.empty: Tensor | None = None  # bool [B], queries of length 0; None if there is none

    def wrapper(self, num_levels: int, tensor_cores: bool) -> Any:
        key = (num_levels, tensor_cores)
        if key not in self.made:
            self.made[key] = (
                self.module.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=tensor_cores)
                if num_levels == 1
                else self.module.MultiLevelCascadeAttentionWrapper(num_levels, self.workspace, "NHD")
            )
        return self.made[key]

    def prepare(self, plan: DecodePlan, q: Tensor, num_kv_heads: int, num_pages: int, scale: float) -> None:
        tracked = (plan.lengths, plan.page_table)
        versions = None if any(x.is_inference() for x in tracked) else tuple(x._version for x in tracked)
        key = (versions, q.shape[1], num_kv_heads, q.shape[2], num_pages, q.dtype, scale)
        if versions is not None and self.last is not None and self.last[0]() is plan and self.last[1] == key:
            return
        lengths = plan.lengths.cpu()
        items = plan.items.cpu() if plan.on_host is None else plan.on_host[0]
        table, rows = plan.page_table.cpu().numpy(), plan.rows.cpu().numpy()
        found = levels(items.numpy(), table, rows, lengths.numpy(), plan.page_size)
        _check_pages(found, num_pages)
        group = q.shape[1] // num_kv_heads
        self.current = self.wrapper(len(found), len(found) == 1 and group >= 4)
        sizes = (q.shape[1], num_kv_heads, q.shape[2], plan.page_size)
        dtypes = {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": q.dtype}
        if len(found) == 1:
            only = found[0]
            self.current.plan(only.kv_indptr, only.kv_indices, only.last_page_len, *sizes, **dtypes)
        else:
            arrays = zip(*((x.qo_indptr, x.kv_indptr, x.kv_indices, x.last_page_len) for x in found), strict=True)
            self.current.plan(*map(list, arrays), *sizes, **dtypes)
        is_empty = lengths == 0
        self.empty = is_empty.to(q.device) if bool(is_empty.any()) else None
        self.last = (ref(plan), key)


def _check_pages(found: list[Level], num_pages: int) -> None:
    for level in found:
        bad = (level.kv_indices < 0) | (level.kv_indices >= num_pages)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            request = int(torch.searchsorted(level.kv_indptr, at, right=True)) - 1
            raise ValueError(
                f"tree_decode: query {int(level.qo_indptr[request])} needs a page that its table row lacks or the "
                f"cache of {num_pages} pages does not have (page {int(level.kv_indices[at])})"
            )


_WRAPPERS: dict[torch.device, _Wrappers] = {}


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """As `ibtpo_kernels.tree_decode`; head sizes that FlashInfer has no kernel for go to Triton."""
    if q.shape[2] not in HEAD_DIMS:
        out: Tensor = fallback().tree_decode(q, k_pages, v_pages, plan, scale)
        return out
    if not len(q):
        return torch.empty_like(q)
    wrappers = _WRAPPERS.get(q.device)
    if wrappers is None:
        wrappers = _WRAPPERS[q.device] = _Wrappers(q.device)
    wrappers.prepare(plan, q, k_pages.shape[2], len(k_pages), scale)
    out = wrappers.current.run(q.contiguous(), (k_pages, v_pages))
    return out if wrappers.empty is None else out.masked_fill(wrappers.empty[:, None, None], 0.0)
