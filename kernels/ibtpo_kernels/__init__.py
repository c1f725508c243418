"""Kernels for reasoning trees: attention over packed trees, decode over shared pages, fused log-prob and sampling."""

from ibtpo_kernels.by_depth import DepthLayout, plan_by_depth, tree_attention_by_depth, with_value_of
from ibtpo_kernels.decoder import Decoder, DecodeRun, DecodeStep, Events, LayerWeights, can_borrow
from ibtpo_kernels.dispatch import active_backend, backend, has_compiled
from ibtpo_kernels.fastest import fastest_linear, ours_is_faster
from ibtpo_kernels.linear import torch_is_slow
from ibtpo_kernels.ops import (
    add_rms_norm,
    append_kv,
    batch_invariant_linear,
    linear_logprob,
    plan_decode,
    policy_head,
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
from ibtpo_kernels.sampled import linear_sampled_logprob, sampled_logprob

__all__ = [
    "DecodePlan",
    "DecodePlanner",
    "DecodeRun",
    "DecodeStep",
    "Decoder",
    "DepthLayout",
    "Events",
    "LayerWeights",
    "active_backend",
    "add_rms_norm",
    "append_kv",
    "backend",
    "batch_invariant_linear",
    "can_borrow",
    "fastest_linear",
    "has_compiled",
    "linear_logprob",
    "linear_sampled_logprob",
    "ours_is_faster",
    "plan_by_depth",
    "plan_decode",
    "policy_head",
    "rms_norm",
    "rope",
    "rope_append",
    "sample",
    "sampled_logprob",
    "silu_mul",
    "torch_is_slow",
    "tree_attention",
    "tree_attention_by_depth",
    "tree_decode",
    "with_value_of",
]
