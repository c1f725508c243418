# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Key blocks of the tree-attention kernels: which are skipped, full or partial, and how a block is read.

The whole mask is two integers a key block, low = min(end) and high = max(end). Key block [j0, j1] against queries
[i0, i1] is

    skipped   if j0 > i1 or high <= i0
    full      if j1 <= i0 and low > i1          no mask is evaluated
    partial   otherwise                         end[j] is read and compared

    keys      0                                                       i1
    chain     [full  full  full  full  full  full  full  full  partial]
    sibling   [full  full  full | skip  skip  skip  skip | full partial]      two runs of full blocks

On sm_90 and later a loop reads its blocks through tensor descriptors (the tensor memory accelerator): no address
arithmetic, and zeros past the last token and past the head without a mask. Elsewhere it reads through pointers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ibtpo_kernels.gpu import configs
from ibtpo_kernels.gpu.launch import FUSED

CHUNK = tl.constexpr(128)  # key blocks classified together
NEVER = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["num_tokens"])
def block_ends(end_ptr, low_ptr, high_ptr, num_tokens, BLOCK: tl.constexpr):
    """low[b], high[b] = min and max of end over key block b."""
    block = tl.program_id(0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = j < num_tokens
    end = tl.load(end_ptr + j, mask=inside, other=0)
    tl.store(high_ptr + block, tl.max(end, 0))
    tl.store(low_ptr + block, tl.min(tl.where(inside, end, NEVER), 0))


@triton.jit
def of_kind(blocks, low_ptr, high_ptr, first, last, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr):
    """Which key blocks are full (or partial) for queries [first, last]."""
    ahead = blocks * BLOCK_N <= last
    low = tl.load(low_ptr + blocks, mask=ahead & (blocks >= 0), other=0)
    full = (blocks >= 0) & ((blocks + 1) * BLOCK_N - 1 <= first) & (low > last)
    if not PARTIAL:
        return full
    high = tl.load(high_ptr + blocks, mask=ahead & (blocks >= 0), other=0)
    return (high > first) & ~full


@triton.jit
def next_run(blocks, wanted, starts, at, stop):
    """[begin, end) of the first run of wanted blocks at or after `at`."""
    begin = tl.min(tl.where(starts & (blocks >= at), blocks, stop), 0)
    end = tl.min(tl.where((blocks >= begin) & (~wanted), blocks, stop), 0)
    return begin, end


@triton.jit
def rows_of(
    ptr, first, count, stride, dims, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr
):
    """[BLOCK, DIM]: rows [first, first + BLOCK) of one head; zeros past `count` (if CUT) and past HEAD."""
    rows = tl.arange(0, BLOCK)
    at = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if CUT and HEAD == DIM:
        block = tl.load(at, mask=(first + rows < count)[:, None], other=0.0)
    elif CUT:
        block = tl.load(at, mask=(first + rows < count)[:, None] & (dims < HEAD)[None, :], other=0.0)
    elif HEAD == DIM:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=(dims < HEAD)[None, :], other=0.0)
    return block


@triton.jit
def stream(
    source, head, first, count, stride, dims,
    HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """As `rows_of`, inside a loop: `source` is a descriptor of [H, N, D] if TMA, else a pointer to the head."""
    if TMA:
        block = source.load([head, first, 0]).reshape(BLOCK, DIM)
    else:
        block = rows_of(source, first, count, stride, dims, HEAD, DIM, BLOCK, CUT)
    return block


@triton.jit
def products_of_rows(
    a_at, has_a, b_at, has_b, HEAD: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, NUM_A: tl.constexpr,
    NUM_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[NUM_A, NUM_B], a b^T of the rows at these addresses, STEP numbers at a time, each read when it is needed.

    A row used throughout a loop would stay in registers; float32 heads of 256 are too wide for that. The steps must be
    a loop: unrolled, they would all be read at once.
    """
    s = tl.zeros([NUM_A, NUM_B], tl.float32)
    for first in range(0, DIM, STEP):
        dims = first + tl.arange(0, STEP)
        a = tl.load(a_at[:, None] + dims[None, :], mask=has_a[:, None] & (dims < HEAD)[None, :], other=0.0)
        b = tl.load(b_at[:, None] + dims[None, :], mask=has_b[:, None] & (dims < HEAD)[None, :], other=0.0)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


def ends_of(end: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(low, high), int32 [ceil(N / block)]: the mask as the forward and dQ kernels read it."""
    low, high = (end.new_empty(triton.cdiv(len(end), block)) for _ in range(2))
    block_ends[(len(low),)](end, low, high, len(end), BLOCK=block, **FUSED, num_warps=1)
    return low, high


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Blocks of `block` rows of one head of x [N, H, D], zeros outside."""
    num_tokens, num_heads, head_dim = x.shape
    row, head, _ = x.stride()
    return TensorDescriptor(x, [num_heads, num_tokens, head_dim], [head, row, 1], [1, block, configs.padded(head_dim)])


def streamed(x: Tensor, y: Tensor, block: int, tiles: configs.Tiles) -> tuple[Any, Any, bool]:
    """The two tensors that a kernel's loop reads, as descriptors if the tensor memory accelerator can read them."""
    aligned = all(
        (z.data_ptr() | z.stride(0) * z.element_size() | z.stride(1) * z.element_size()) % 16 == 0
        and z.stride(0) * z.stride(1) != 0  # descriptors of expanded heads or rows are untested
        for z in (x, y)
    )
    if aligned and not tiles.step and configs.capability(x.device) >= 9:
        return _descriptor(x, block), _descriptor(y, block), True
    return x, y, False


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
