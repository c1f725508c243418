"""Helpers of the wrappers around Triton kernels.

Triton compiles a binary for each combination of argument types, and more for integers that are 1 or divisible by 16 and
for unaligned addresses. Arguments that vary between calls (numbers of rows, tokens and edges) are excluded from this
(`do_not_specialize`); otherwise a run would compile each kernel again and again in its first steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634  # scores are kept in base 2: exp2 is one instruction

# For every launch: a * b + c is one instruction, rounded once. Triton's default until 3.10, as 3.9 warns; without this,
# results would depend on the version, and kernels would need more instructions.
FUSED = {"enable_fp_fusion": True}


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_captured(x: Tensor) -> bool:
    """Whether launches on x are being captured into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_dense(x: Tensor) -> Tensor:
    """x [N, H, D] with its last axis dense; the others may be strided, as in views of a fused projection.

    A row's heads are addressed in 32 bits, rows in 64; a tensor with heads further apart is copied.
    """
    is_near = x.stride(1) * x.shape[1] < 1 << 31
    return x if x.stride(2) == 1 and is_near else x.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products as three tf32 ones, which keep about 22 bits, on the tensor cores; 16-bit ones are exact."""
    return "tf32x3" if dtype is torch.float32 else "tf32"
