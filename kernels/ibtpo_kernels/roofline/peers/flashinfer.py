"""FlashInfer's paged decode, multi-level cascade and sampling. It compiles at the first call, with nvcc and ninja."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ibtpo_kernels.cascade import MAX_LEVELS, Level, levels
from ibtpo_kernels.plan import DecodePlan
from ibtpo_kernels.roofline.peers.find import module, needs_cuda
from ibtpo_kernels.roofline.problem import Inputs, Prepare, Run

_WORKSPACE_BYTES = 128 << 20  # as FlashInfer recommends
_NAME = "FlashInfer (flashinfer-python)"


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _levels(plan: DecodePlan, most: int) -> list[Level]:
    items, table, rows, lengths = (x.cpu().numpy() for x in (plan.items, plan.page_table, plan.rows, plan.lengths))
    return levels(items, table, rows, lengths, plan.page_size, most)


def _planner(inputs: Inputs, most_levels: int) -> tuple[Any, Callable[[], None]]:
    """(wrapper, its plan as a call without arguments) for these inputs."""
    flashinfer = module("flashinfer", _NAME)
    q, k_pages, _ = inputs.leaves
    plan: DecodePlan = inputs.rest[0]
    found = _levels(plan, most_levels)
    sizes = (q.shape[1], k_pages.shape[2], q.shape[2], plan.page_size)
    more = {"sm_scale": q.shape[2] ** -0.5, "q_data_type": q.dtype, "kv_data_type": q.dtype}
    if most_levels == 1:
        group = q.shape[1] // k_pages.shape[2]
        only = found[0]
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(q.device), "NHD", use_tensor_cores=group >= 4
        )
        return wrapper, lambda: wrapper.plan(only.kv_indptr, only.kv_indices, only.last_page_len, *sizes, **more)
    arrays = [
        list(column)
        for column in zip(*((x.qo_indptr, x.kv_indptr, x.kv_indices, x.last_page_len) for x in found), strict=True)
    ]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(found), _workspace(q.device), "NHD")
    return wrapper, lambda: wrapper.plan(*arrays, *sizes, **more)


def decode(*, most_levels: int = MAX_LEVELS) -> Prepare:
    """The cascade over up to `most_levels` levels, planned beforehand; one level is the plain paged decode."""
    needs_cuda("FlashInfer")
    module("flashinfer", _NAME)

    def prepare(inputs: Inputs) -> Run:
        wrapper, plan = _planner(inputs, most_levels)
        plan()
        q, k_pages, v_pages = inputs.leaves
        return lambda: (wrapper.run(q, (k_pages, v_pages)),)

    return prepare


def decode_plan(*, most_levels: int = MAX_LEVELS) -> Prepare:
    """Its planning, from the arrays that it needs."""
    needs_cuda("FlashInfer")
    module("flashinfer", _NAME)

    def prepare(inputs: Inputs) -> Run:
        _, plan = _planner(inputs, most_levels)

        def run() -> tuple[()]:
            plan()
            return ()

        return run

    return prepare


def sampling(top_p: float, top_k: int) -> Prepare:
    """Only tokens; log-probs and entropy are not computed."""
    needs_cuda("FlashInfer")
    flashinfer = module("flashinfer", _NAME)

    def prepare(inputs: Inputs) -> Run:
        logits = inputs.leaves[0].float()
        if top_p == 1.0 and top_k == 0:
            return lambda: (flashinfer.sampling.sampling_from_logits(logits), None, None)
        kept = top_k or logits.shape[1]
        draw = flashinfer.sampling.top_k_top_p_sampling_from_logits
        return lambda: (draw(logits, kept, top_p, filter_apply_order="top_k_first"), None, None)

    return prepare
