"""Argument checks of every op; each failure is a ValueError that names the argument and what it should be.

Shapes, dtypes and devices are always checked: a handful of integer comparisons. Values are checked if that costs O(N)
on the CPU and no synchronisation on a GPU; on the decode path the kernels check them as they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ibtpo_kernels.plan import DecodePlan

_MOST = 1e300  # largest number passed to C++ as a double


def _fail(op: str, name: str, x: Tensor, expected: str) -> ValueError:
    return ValueError(f"{op}: {name} is {x.dtype} {list(x.shape)} on {x.device}; expected {expected}")


def _like(op: str, name: str, x: Tensor, shape: tuple[int, ...], other: Tensor, other_name: str) -> None:
    """Raise unless x has this shape and the dtype and device of `other`."""
    if x.shape != shape or x.dtype is not other.dtype or x.device != other.device:
        raise _fail(
            op, name, x, f"{list(shape)} with the dtype and device of {other_name} ({other.dtype}, {other.device})"
        )


def _index(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, other: Tensor, other_name: str
) -> None:
    if x.shape != shape or x.dtype is not dtype or x.device != other.device:
        raise _fail(op, name, x, f"{dtype} {list(shape)} on {other.device}, to go with {other_name}")


def _floating(op: str, name: str, x: Tensor, dims: int) -> None:
    if x.dim() != dims or not x.is_floating_point():
        raise _fail(op, name, x, f"a floating-point tensor of {dims} dimensions")


def _in_range(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    """Raise unless every element of a CPU tensor lies in [low, high); elsewhere checking would synchronise."""
    if x.is_cpu and x.numel():
        smallest, largest = map(int, x.aminmax())
        if smallest < low or largest >= high:
            raise ValueError(f"{op}: {name} spans [{smallest}, {largest}]; expected values in [{low}, {high})")


def _finite(op: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name}={value} must be finite")


def _eps(op: str, eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps={eps} must be in [0, inf)")


def _heads(op: str, num_query_heads: int, num_kv_heads: int, keys: str) -> None:
    if num_kv_heads < 1 or num_query_heads % num_kv_heads:
        raise ValueError(
            f"{op}: {num_query_heads} query heads must be a multiple of {num_kv_heads} key/value heads, in q and {keys}"
        )


def _same_pages(op: str, k_pages: Tensor, v_pages: Tensor, like: Tensor, like_name: str) -> None:
    if k_pages.dim() != 4 or k_pages.shape[3] != like.shape[2]:
        raise _fail(op, "k_pages", k_pages, f"[num_pages, page_size, Hkv, {like.shape[2]}], to go with {like_name}")
    shape = k_pages.shape
    _like(op, "k_pages", k_pages, shape, like, like_name)
    _like(op, "v_pages", v_pages, shape, k_pages, "k_pages")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"{op}: k_pages and v_pages must be contiguous, for they are read and written in place")


def no_forest(crossing: int) -> str:
    """The message for a token whose subtree extends past that of an ancestor."""
    return f"end is no forest in depth-first order: the subtree of token {crossing} ends behind one that holds it"


def first_crossing(end: Sequence[int]) -> int:
    """The first token whose subtree extends past that of an ancestor; -1 if there is none."""
    above: list[int] = []
    for token, stop in enumerate(end):
        while above and above[-1] <= token:
            above.pop()
        if above and stop > above[-1]:
            return token
        above.append(stop)
    return -1


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> None:
    op = "tree_attention"
    _floating(op, "q", q, 3)
    _floating(op, "k", k, 3)
    num_tokens, num_heads, head_dim = q.shape
    _heads(op, num_heads, k.shape[1], "k")
    _like(op, "k", k, (num_tokens, k.shape[1], head_dim), q, "q")
    _like(op, "v", v, tuple(k.shape), q, "q")
    _index(op, "end", end, (num_tokens,), torch.int32, q, "q")
    _finite(op, "scale", scale)
    if end.is_cpu and num_tokens:
        ahead = end - torch.arange(num_tokens, dtype=torch.int32, device=end.device)
        if ahead.amin() < 1 or end.amax() > num_tokens:
            bad = int(((ahead < 1) | (end > num_tokens)).nonzero()[0])
            raise ValueError(f"{op}: end[{bad}] = {int(end[bad])}; expected an index in ({bad}, {num_tokens}]")


def plan_decode(page_table: Tensor, rows: Tensor, lengths: Tensor, page_size: int) -> None:
    op = "plan_decode"
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or not page_table.is_contiguous():
        raise _fail(op, "page_table", page_table, "a contiguous torch.int32 [R, P]")
    if rows.dim() != 1:
        raise _fail(op, "rows", rows, "torch.int32 [B]")
    _index(op, "rows", rows, tuple(rows.shape), torch.int32, page_table, "page_table")
    _index(op, "lengths", lengths, tuple(rows.shape), torch.int32, page_table, "page_table and rows")
    if not (rows.is_contiguous() and lengths.is_contiguous()):
        raise ValueError(f"{op}: rows and lengths must be contiguous, for the plan refers to them")
    if page_size < 1:
        raise ValueError(f"{op}: page_size={page_size} must be at least 1")


def planner(page_table: Tensor, page_size: int) -> None:
    none = page_table.new_empty(0, dtype=torch.int32)
    plan_decode(page_table, none, none, page_size)
    if not page_table.is_cpu:
        raise _fail("DecodePlanner", "page_table", page_table, "a table on the CPU; name the GPU as device=")


def plan_in_range(page_table: Tensor, rows: Tensor, lengths: Tensor, page_size: int) -> None:
    _in_range("plan_decode", "rows", rows, 0, page_table.shape[0])
    _in_range("plan_decode", "lengths", lengths, 0, page_table.shape[1] * page_size + 1)


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> None:
    op = "tree_decode"
    _floating(op, "q", q, 3)
    _same_pages(op, k_pages, v_pages, q, "q")
    _heads(op, q.shape[1], k_pages.shape[2], "k_pages")
    if plan.page_size != k_pages.shape[1]:
        raise ValueError(f"{op}: the plan has pages of {plan.page_size} slots, k_pages of {k_pages.shape[1]}")
    if len(plan.rows) != len(q) or plan.rows.device != q.device:
        raise _fail(op, "q", q, f"{len(plan.rows)} queries on {plan.rows.device}, as the plan has")
    _finite(op, "scale", scale)


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, op: str = "append_kv") -> None:
    _floating(op, "k", k, 3)
    _same_pages(op, k_pages, v_pages, k, "k")
    shape = (k.shape[0], k_pages.shape[2], k.shape[2])
    _like(op, "k", k, shape, k_pages, "k_pages")
    _like(op, "v", v, shape, k, "k")
    _index(op, "slots", slots, (shape[0],), torch.int64, k, "k")


def slots_in_range(slots: Tensor, k_pages: Tensor) -> None:
    _in_range("append_kv", "slots", slots, -1, k_pages.shape[0] * k_pages.shape[1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    _floating("rms_norm", "x", x, max(x.dim(), 1))
    _like("rms_norm", "weight", weight, (x.shape[-1],), x, "x")
    _eps("rms_norm", eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    op = "add_rms_norm"
    _floating(op, "x", x, max(x.dim(), 1))
    _like(op, "residual", residual, tuple(x.shape), x, "x")
    _like(op, "weight", weight, (x.shape[-1],), x, "x")
    _eps(op, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, op: str = "rope", name: str = "x") -> None:
    _floating(op, name, x, 3)
    if x.shape[2] % 2:
        raise _fail(op, name, x, "an even head size")
    shape = (x.shape[0], x.shape[2] // 2)
    if not (cos.dtype == sin.dtype and cos.is_floating_point()):
        raise ValueError(f"{op}: cos is {cos.dtype} and sin {sin.dtype}; expected one floating-point dtype for both")
    _index(op, "cos", cos, shape, cos.dtype, x, name)
    _index(op, "sin", sin, shape, cos.dtype, x, name)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    op = "rope_append"
    rope(q, cos, sin, op, name="q")
    append_kv(k, v, k_pages, v_pages, slots, op)
    _like(op, "q", q, (k.shape[0], q.shape[1], k.shape[2]), k, "k")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _like(op, name, weight, (q.shape[2],), q, "q")
    _eps(op, eps)


def silu_mul(gate: Tensor, up: Tensor) -> None:
    _floating("silu_mul", "gate", gate, gate.dim())
    _like("silu_mul", "up", up, tuple(gate.shape), gate, "gate")


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "batch_invariant_linear"
    _floating(op, "x", x, max(x.dim(), 1))
    _floating(op, "weight", weight, 2)
    _like(op, "weight", weight, (weight.shape[0], x.shape[-1]), x, "x")
    if bias is not None:
        _like(op, "bias", bias, (weight.shape[0],), weight, "weight")


def _edges(
    op: str, rows: Tensor, targets: Tensor, temperature: float, source: Tensor, source_name: str, vocabulary: int
) -> None:
    """Check (row, target) pairs into the rows of `source`, and a temperature."""
    if rows.dim() != 1:
        raise _fail(op, "rows", rows, "torch.int64 [E]")
    _index(op, "rows", rows, tuple(rows.shape), torch.int64, source, source_name)
    _index(op, "targets", targets, tuple(rows.shape), torch.int64, source, f"{source_name} and rows")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature={temperature} must be greater than 0 and finite")
    _in_range(op, "rows", rows, 0, source.shape[0])
    _in_range(op, "targets", targets, 0, vocabulary)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    op: str = "linear_logprob",
) -> None:
    _floating(op, "hidden", hidden, 2)
    _floating(op, "weight", weight, 2)
    _like(op, "weight", weight, (weight.shape[0], hidden.shape[1]), hidden, "hidden")
    if weight.shape[0] == 0:
        raise _fail(op, "weight", weight, "at least one vocabulary entry")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap={softcap} must be greater than 0 and finite, or None for no cap")
    _edges(op, rows, targets, temperature, hidden, "hidden", weight.shape[0])


def sampled_logprob(logits: Tensor, rows: Tensor, targets: Tensor, temperature: float) -> None:
    op = "sampled_logprob"
    _floating(op, "logits", logits, 2)
    if logits.shape[1] == 0:
        raise _fail(op, "logits", logits, "at least one vocabulary entry")
    _edges(op, rows, targets, temperature, logits, "logits", logits.shape[1])


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor,
    min_p: float | Tensor,
) -> None:
    op = "sample"
    _floating(op, "logits", logits, 2)
    if logits.shape[1] == 0:
        raise _fail(op, "logits", logits, "at least one vocabulary entry")
    _index(op, "keys", keys, (logits.shape[0], 2), torch.int64, logits, "logits")
    _parameter(op, "temperature", temperature, logits, lambda x: (x >= 0) & (x < math.inf), "in [0, inf)")
    _parameter(op, "top_p", top_p, logits, lambda x: (x > 0) & (x <= 1), "in (0, 1]")
    if not (isinstance(top_k, int) or (isinstance(top_k, Tensor) and top_k.dtype in (torch.int32, torch.int64))):
        kind = top_k.dtype if isinstance(top_k, Tensor) else repr(top_k)
        raise ValueError(f"{op}: top_k is {kind}; expected an int, or torch.int32 or torch.int64 [{len(logits)}]")
    _parameter(op, "top_k", top_k, logits, _is_count, "0 (off) or a count below 2^63")
    _parameter(op, "min_p", min_p, logits, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")


def _is_count(x: Any) -> Any:
    return (x >= 0) & (isinstance(x, Tensor) or x < 1 << 63)


def _parameter(
    op: str, name: str, value: float | Tensor, logits: Tensor, valid: Callable[[Any], Any], expected: str
) -> None:
    """Check a sampling parameter: one number, or one a row."""
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float) or abs(value) > _MOST or not valid(value):
            raise ValueError(f"{op}: {name}={value!r:.40} must be {expected}")
        return
    if value.shape != logits.shape[:1] or value.device != logits.device or value.is_complex():
        raise _fail(op, name, value, f"one real number, or [{logits.shape[0]}] on {logits.device}")
    if value.is_cpu and not valid(value).all():
        raise ValueError(f"{op}: {name} has a row that is not {expected}")


def named(what: str, tensors: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless each tensor that is not None has its shape."""
    for name, x in tensors.items():
        if x is not None and x.shape != shapes[name]:
            raise ValueError(f"{what}: {name} is {list(x.shape)}; expected {list(shapes[name])}")


def decoder(
    embedding: Tensor, norm: Tensor, head: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int,
    eps: float,
) -> None:  # fmt: skip
    op = "Decoder"
    _floating(op, "embedding", embedding, 2)
    _floating(op, "cos", cos, 2)
    _eps(op, eps)
    _heads(op, num_heads, num_kv_heads, "k")
    given = {"norm": norm, "head": head, "sin": sin}
    named(op, given, {"norm": embedding.shape[1:], "head": embedding.shape, "sin": cos.shape})


def decoder_pages(k_pages: Tensor, v_pages: Tensor, like: tuple[int, int, int]) -> None:
    """`like`: (layers, Hkv, D)."""
    layers, heads, head_dim = like
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        fits = x.dim() == 5 and (x.shape[0], *x.shape[3:]) == like and x.shape == k_pages.shape
        if not (fits and x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()):
            shape = f"[{layers}, num_pages, page_size, {heads}, {head_dim}]"
            raise _fail("Decoder", name, x, f"contiguous torch.float32 {shape} on cpu")


def decoder_forward(
    tokens: Tensor, pos: Tensor, slots: Tensor, plan: DecodePlan, k_pages: Tensor, v_pages: Tensor,
    like: tuple[int, int, int],
) -> None:  # fmt: skip
    decoder_pages(k_pages, v_pages, like)
    for name, x in (("tokens", tokens), ("pos", pos), ("slots", slots)):
        if x.shape != plan.rows.shape or x.dtype is not torch.int64 or not x.is_cpu:
            raise _fail("Decoder", name, x, f"torch.int64 {list(plan.rows.shape)} on cpu, one a row of the plan")
    if plan.page_size != k_pages.shape[2] or not plan.rows.is_cpu:
        raise ValueError(
            f"Decoder: plan has pages of {plan.page_size} slots on {plan.rows.device}; expected {k_pages.shape[2]} on "
            "cpu, as in k_pages"
        )
