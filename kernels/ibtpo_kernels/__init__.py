"""Kernels for reasoning trees: attention over packed trees, decode over shared pages, fused log-prob and sampling."""

from ibtpo_kernels.dispatch import active_backend, backend, has_compiled
from ibtpo_kernels.ops import (
    append_kv,
    linear_logprob,
    plan_decode,
    rms_norm,
    rope,
    rope_append,
    sample,
    silu_mul,
    tree_attention,
    tree_decode,
)
from ibtpo_kernels.plan import DecodePlan
from ibtpo_kernels.planner import DecodePlanner

__all__ = [
    "DecodePlan",
    "DecodePlanner",
    "active_backend",
    "append_kv",
    "backend",
    "has_compiled",
    "linear_logprob",
    "plan_decode",
    "rms_norm",
    "rope",
    "rope_append",
    "sample",
    "silu_mul",
    "tree_attention",
    "tree_decode",
]
