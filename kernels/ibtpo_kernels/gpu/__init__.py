"""The ops as Triton kernels: backend "triton", the default for CUDA tensors of float32, float16 and bfloat16.

Imported only if Triton is installed. With TRITON_INTERPRET=1 in the environment before the import, the kernels run on
CPU tensors, slowly, in float32 and float16; that is how they are tested without a GPU.
"""

from __future__ import annotations

from torch import Tensor

from ibtpo_kernels.dispatch import host_planner
from ibtpo_kernels.gpu.linear import batch_invariant_linear
from ibtpo_kernels.gpu.logprob import linear_logprob, linear_logprob_grads, linear_logprob_stats, policy_head
from ibtpo_kernels.gpu.norm import add_rms_norm, rms_norm
from ibtpo_kernels.gpu.sample import sample, sampled_logprob
from ibtpo_kernels.gpu.small import append_kv, rope, rope_append, silu_mul
from ibtpo_kernels.gpu.tree_attention import tree_attention
from ibtpo_kernels.gpu.tree_decode import tree_decode

__all__ = [
    "add_rms_norm",
    "append_kv",
    "batch_invariant_linear",
    "linear_logprob",
    "linear_logprob_grads",
    "linear_logprob_stats",
    "plan_decode",
    "policy_head",
    "rms_norm",
    "rope",
    "rope_append",
    "sample",
    "sampled_logprob",
    "silu_mul",
    "tree_attention",
    "tree_decode",
]


def plan_decode(page_table: Tensor, rows: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """Plan on the host, by the compiled planner if it is there; waits for the device."""
    items: Tensor = host_planner().plan_decode(page_table.cpu(), rows.cpu(), lengths.cpu(), page_size)
    return items.to(page_table.device)
