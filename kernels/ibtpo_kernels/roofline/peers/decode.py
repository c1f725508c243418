"""Decode attention by peers: SDPA on keys and values copied for every branch, or in two calls that share the prefix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ibtpo_kernels.roofline.problem import Inputs, Prepare, Run


def _of_branches(pages: Tensor, table: Tensor) -> Tensor:
    """[B, Hkv, length, D], every branch with its own copy of its path."""
    return pages[table.long()].flatten(1, 2).transpose(1, 2).contiguous()


def sdpa_duplicated() -> Prepare:
    """One call, one query a branch; the copies are made beforehand."""

    def prepare(inputs: Inputs) -> Run:
        q, k_pages, v_pages = inputs.leaves
        table = inputs.rest[0].page_table
        k, v, rows = _of_branches(k_pages, table), _of_branches(v_pages, table), q[:, :, None]
        has_groups = q.shape[1] != k.shape[1]
        return lambda: (scaled_dot_product_attention(rows, k, v, enable_gqa=has_groups)[:, :, 0],)

    return prepare


def sdpa_shared_prefix(prefix: int) -> Prepare:
    """All queries as rows of one call over the prefix, then each over its suffix; merged by log-sum-exp."""

    def prepare(inputs: Inputs) -> Run:
        q, k_pages, v_pages = inputs.leaves
        table = inputs.rest[0].page_table
        k, v = _of_branches(k_pages, table), _of_branches(v_pages, table)
        upper_kv = [x[:1, :, :prefix].contiguous() for x in (k, v)]
        lower_kv = [x[:, :, prefix:].contiguous() for x in (k, v)]
        branches, heads, dim = q.shape
        kv_heads = k.shape[1]

        def run() -> tuple[Tensor]:
            rows = q.view(branches, kv_heads, -1, dim)
            upper, upper_lse = _with_lse(rows.transpose(0, 1).reshape(1, kv_heads, -1, dim), *upper_kv)
            lower, lower_lse = _with_lse(rows, *lower_kv)
            upper = upper.view(kv_heads, branches, -1, dim).transpose(0, 1)
            upper_lse = upper_lse.view(kv_heads, branches, -1).transpose(0, 1)
            share = torch.sigmoid(upper_lse - lower_lse)[..., None].to(upper.dtype)
            return ((upper * share + lower * (1 - share)).reshape(branches, heads, dim),)

        return run

    return prepare


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SDPA's flash kernel, (out [B, H, M, D], log-sum-exp [B, H, M])."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse[:, :, : q.shape[2]]
