"""The calls whose launches are compiled ahead of time: every kernel, at the shapes and types it ships for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ibtpo_kernels.gpu import (
    add_rms_norm,
    append_kv,
    batch_invariant_linear,
    linear_logprob,
    rms_norm,
    rope,
    rope_append,
    sample,
    sampled_logprob,
    silu_mul,
    tree_attention,
    tree_decode,
)
from ibtpo_kernels.gpu.advance import RunRows
from ibtpo_kernels.plan import DecodePlan, plan_items

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = (16, 32, 64, 80, 96, 128, 256)
# What is compiled by default, types and head sizes: what has come closest to a limit, most of it for sm_90.
SOME = {
    80: {"bf16": (80, 128), "fp32": (128, 256)},
    90: {"bf16": (96, 128, 256), "fp32": (128,)},
    100: {"bf16": (128,), "fp32": (128,)},
}


def attention(head_dim: int, dtype: torch.dtype, rows: int = 64) -> None:
    """Four query heads on two key/value heads, forward and backward."""
    q = torch.zeros(rows, 4, head_dim, dtype=dtype, requires_grad=True)
    k = torch.zeros(rows, 2, head_dim, dtype=dtype, requires_grad=True)
    tree_attention(q, k, k, torch.full((rows,), rows, dtype=torch.int32), 0.1).sum().backward()


def decode(head_dim: int, dtype: torch.dtype, *, shared: bool) -> None:
    """64 queries that share two splits, or two that share nothing."""
    count = 64 if shared else 2
    table = torch.arange(40, dtype=torch.int32).repeat(count, 1)
    if shared:
        table[:, 39] = torch.arange(100, 100 + count)
    else:
        table[1] += 40
    rows, lengths = torch.arange(count, dtype=torch.int32), torch.full((count,), 640, dtype=torch.int32)
    items = torch.from_numpy(plan_items(table.numpy(), rows.numpy(), lengths.numpy(), 16))
    pages = torch.zeros(200, 16, 2, head_dim, dtype=dtype)
    plan = DecodePlan(table, rows, lengths, items, 16)
    tree_decode(torch.zeros(count, 4, head_dim, dtype=dtype), pages, pages, plan, 0.1)


def behind(pages: int, dtype: torch.dtype) -> None:
    """One query behind so many pages, which are all there are."""
    table, row = torch.arange(pages, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32)
    lengths = torch.full((1,), 16 * pages, dtype=torch.int32)
    items = torch.from_numpy(plan_items(table.numpy(), row.numpy(), lengths.numpy(), 16))
    cache = torch.zeros(pages, 16, 2, 64, dtype=dtype)
    tree_decode(torch.zeros(1, 4, 64, dtype=dtype), cache, cache, DecodePlan(table, row, lengths, items, 16), 0.1)


def logprob(dtype: torch.dtype, cap: float | None, rows: int = 32) -> None:
    hidden, weight = (torch.zeros(n, 64, dtype=dtype, requires_grad=True) for n in (rows, 5003))
    index = torch.arange(rows)
    out = linear_logprob(hidden, weight, index, index, 0.7, cap)
    (out[0].sum() + out[1].sum()).backward()


def product(dtype: torch.dtype, rows: int = 64) -> None:
    x, weight = torch.zeros(rows, 1024, dtype=dtype), torch.zeros(512, 1024, dtype=dtype)
    batch_invariant_linear(x, weight, None)
    batch_invariant_linear(x, weight, weight[:, 0])


def draw(dtype: torch.dtype, top_p: float, rows: int = 4) -> None:
    """A vocabulary of 151,936; the row that was never sampled then looks like one without a distribution."""
    try:
        sample(torch.zeros(rows, 151936, dtype=dtype), torch.zeros(rows, 2, dtype=torch.int64), 0.7, top_p, 0, 0.0)
    except (ValueError, RuntimeError):
        return


def given(dtype: torch.dtype, rows: int = 4) -> None:
    """What was never computed looks like a row without a distribution or not, by chance."""
    index = torch.arange(rows)
    try:
        sampled_logprob(torch.zeros(rows, 151936, dtype=dtype), index, index, 0.7)
    except (ValueError, RuntimeError):
        return


def advance(rows: int = 64) -> None:
    """Two stop tokens, a table of 40 columns."""
    run = RunRows(rows, 2, 16, torch.device("cpu"))
    table, index = torch.zeros(rows, 40, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    plan = DecodePlan(table, index, run.there["lengths"], torch.zeros(0, 4, dtype=torch.int32), 16)
    numbers = torch.zeros(3, rows)
    run.advance((torch.zeros(rows, dtype=torch.int64), *numbers.unbind()), plan)


def small(dtype: torch.dtype, rows: int = 64) -> None:
    x = torch.zeros(rows, 16, 128, dtype=dtype, requires_grad=True)
    k = torch.zeros(rows, 8, 128, dtype=dtype)
    cos = torch.zeros(rows, 64)
    pages, slots = torch.zeros(8, 16, 8, 128, dtype=dtype), torch.arange(rows)
    weight = torch.ones(128, dtype=dtype, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    wide = torch.zeros(rows, 4096, dtype=dtype, requires_grad=True)
    rms_norm(wide, torch.ones(4096, dtype=dtype), 1e-6).sum().backward()
    normed, total = add_rms_norm(wide, wide, torch.ones(4096, dtype=dtype), 1e-6)
    (normed.sum() + total.sum()).backward()
    rope(x, cos, cos).sum().backward()
    silu_mul(wide, wide).sum().backward()
    append_kv(k, k, pages, pages, slots)
    rope_append(x.detach(), k, k, cos, cos, pages, pages, slots, weight.detach(), weight.detach(), 1e-6)


def calls(capability: int, *, full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, call) of what is compiled for a compute capability; if `full`, of all that ships."""
    for name, heads in (dict.fromkeys(DTYPES, HEADS) if full else SOME[capability]).items():
        for head_dim in heads:
            yield from _heads(head_dim, name)
        if full or name == "bf16" or (capability, name) == (90, "fp32"):
            yield from _rows(name)


def _heads(head_dim: int, name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    dtype = DTYPES[name]
    yield f"attention-D{head_dim}-{name}", partial(attention, head_dim, dtype)
    for shared in (False, True):
        yield f"decode-D{head_dim}-{name}-shared{shared:d}", partial(decode, head_dim, dtype, shared=shared)


def _rows(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    dtype = DTYPES[name]
    for cap in (None, 30.0):
        yield f"logprob-{name}-cap{cap}", partial(logprob, dtype, cap)
    yield f"small-{name}", partial(small, dtype)
    yield f"linear-{name}", partial(product, dtype)
    for top_p in (1.0, 0.9):
        yield f"sample-{name}-p{top_p}", partial(draw, dtype, top_p)
    yield f"given-{name}", partial(given, dtype)
    if name == "bf16":
        yield "advance", advance
