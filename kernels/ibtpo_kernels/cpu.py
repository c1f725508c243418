"""The ops on the compiled module `_cpu`, for float32 and bfloat16 tensors on the CPU.

Arguments arrive checked (see `checks`). `_cpu` takes addresses and sizes: tensors must be dense, or their strides
passed along; `_run` keeps them alive for the call. Nothing goes through torch.library, whose dispatch would cost more
than a decode step of a small model.

Torch is imported first on purpose: `_cpu` needs libgomp.so.1 and finds the one that torch has loaded, so the process
has one OpenMP runtime and torch.set_num_threads governs these kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from ibtpo_kernels import checks, gradients, linear, logprob, one_pass, reference
from ibtpo_kernels.gradients import needs_grad, once_differentiable
from ibtpo_kernels.logits import Grads, Head, LogitOps
from ibtpo_kernels.one_pass import Loss
from ibtpo_kernels.plan import DecodePlan

native: Any = None
with suppress(ImportError):
    native = import_module("ibtpo_kernels._cpu")


class DirectOps(Protocol):
    """Ops that take tensors (csrc/direct.cpp); each returns None for a call that it does not serve."""

    def add_rms_norm(self, *args: Any) -> tuple[Tensor, Tensor] | None: ...
    def append_kv(self, *args: Any) -> bool | None: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor | None: ...
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None: ...
    def rope_append(self, *args: Any) -> Tensor | None: ...
    def sample(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...
    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor | None: ...
    def tree_decode(self, *args: Any) -> Tensor | None: ...


def _open_direct() -> DirectOps | None:
    """The direct ops; None if this torch offers no C interface to its tensors."""
    interface = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or interface is None or not native.direct.open(interface, Tensor, torch.nn.Parameter):
        return None
    found: DirectOps = native.direct
    return found


direct = _open_direct()


def _address(x: Tensor) -> int:
    address = x.data_ptr()
    if address == 0 and x.numel():
        raise RuntimeError(f"ibtpo_kernels: a {type(x).__name__} {list(x.shape)} has no memory that this op could read")
    return address


def _run(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a kernel with the addresses of tensors, 0 for None; a number that may be a tensor comes as a float.

    Addresses are taken here, where the tensors are arguments and live through the call: torch.compile may break up the
    caller and drop tensors that it no longer names.
    """
    return kernel(*[_address(x) if isinstance(x, Tensor) else 0 if x is None else x for x in args])


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _angles(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _is_bf16(x: Tensor) -> bool:
    """Whether to run a kernel for bfloat16; its other element type is float32."""
    return x.dtype is torch.bfloat16


def _tree_forward(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, Hq, D], lse [Hq, N]) of dense tensors."""
    num_tokens, num_heads, head_dim = q.shape
    out, lse = torch.empty_like(q), q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    _run(
        native.tree_forward, q, k, v, end, out, lse, num_tokens, num_heads, k.shape[1], head_dim, float(scale),
        _is_bf16(q),
    )  # fmt: skip
    return out, lse


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
        out, lse = _tree_forward(q, k, v, end, scale)
        ctx.save_for_backward(q, k, v, out, lse, end)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse, end = ctx.saved_tensors
        d_out = _dense(d_out)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _run(
            native.tree_backward, q, k, v, out, lse, d_out, end, dq, dk, dv,
            q.shape[0], q.shape[1], k.shape[1], q.shape[2], float(ctx.scale), _is_bf16(q),
        )  # fmt: skip
        return dq, dk, dv, None, None


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
    head_dim = q.shape[2]
    if not q.numel():
        return reference.tree_attention(q, k, v, end, scale)
    if _is_bf16(q) and head_dim % 2:  # products take bf16 in pairs
        q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
        return tree_attention(q, k, v, end, scale)[..., :head_dim]
    q, k, v, end = _dense(q), _dense(k), _dense(v), _dense(end)
    crossing = _run(native.first_crossing, end, len(end))
    if crossing >= 0:  # the kernels skip blocks on the assumption of a forest
        raise ValueError(f"tree_attention: {checks.no_forest(crossing)}")
    if needs_grad(q, k, v):
        out: Tensor = _TreeAttention.apply(q, k, v, end, scale)  # type: ignore[no-untyped-call]
        return out
    return _tree_forward(q, k, v, end, scale)[0]


def plan_decode(
    page_table: Tensor, rows: Tensor, lengths: Tensor, page_size: int, state: Tensor | None = None
) -> Tensor:
    rows, lengths = _dense(rows), _dense(lengths)
    items = rows.new_empty(2 * len(rows), 4)
    count = _run(
        native.plan_decode, page_table, rows, lengths, items, state, *page_table.shape, len(rows), int(page_size)
    )  # fmt: skip
    if count < 0:
        b = -1 - count
        raise ValueError(
            f"plan_decode: query {b} has row {int(rows[b])} and length {int(lengths[b])}; expected a row in "
            f"[0, {page_table.shape[0]}) and a length in [0, {page_table.shape[1] * page_size}]"
        )
    return items[:count]


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    is_odd = _is_bf16(q) and (q.shape[2] % 2 or plan.page_size % 2)  # products take bf16 in pairs
    if is_odd or not q.numel():
        return reference.tree_decode(q, k_pages, v_pages, plan, scale)
    q = _dense(q)
    out = torch.empty_like(q)
    num_queries, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    table = plan.page_table
    failed = _run(
        native.tree_decode, q, k_pages, v_pages, table, plan.rows, plan.lengths, plan.items, out, num_queries,
        num_heads, num_kv_heads, head_dim, num_pages, page_size, *table.shape, len(plan.items), float(scale),
        _is_bf16(q),
    )  # fmt: skip
    if failed >= num_queries:
        item = plan.items[failed - num_queries].tolist()
        raise ValueError(f"tree_decode: item {item} of the plan names queries or pages that are not there")
    if failed >= 0:
        row, length = int(plan.rows[failed]), int(plan.lengths[failed])
        raise ValueError(f"tree_decode: query {failed} of length {length} needs a page that table row {row} lacks")
    return out


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k, v, slots = _packed_rows(k), _packed_rows(v), _dense(slots)
    num_pages, page_size, num_kv_heads, head_dim = k_pages.shape
    size = k.element_size()
    failed = _run(
        native.append_kv, k, v, k_pages, v_pages, slots,
        len(slots), num_kv_heads * head_dim * size, k.stride(0) * size, v.stride(0) * size, num_pages * page_size,
    )  # fmt: skip
    if failed >= 0:
        raise _bad_slot("append_kv", slots, failed, num_pages * page_size)


def _bad_slot(op: str, slots: Tensor, at: int, num_slots: int) -> ValueError:
    return ValueError(f"{op}: slots[{at}] = {int(slots[at])}; expected values in [-1, {num_slots})")


def _packed_rows(x: Tensor) -> Tensor:
    """x [T, H, D] with each token's [H, D] dense; tokens may be strided, as in a view of a fused qkv projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


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
) -> Tensor:
    q, k, v, slots = _packed_rows(q), _packed_rows(k), _packed_rows(v), _dense(slots)
    cos, sin = _angles(cos), _angles(sin)
    q_weight = None if q_weight is None else _dense(q_weight)
    k_weight = None if k_weight is None else _dense(k_weight)
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    num_slots = k_pages.shape[0] * k_pages.shape[1]
    failed = _run(
        native.rope_append, q, k, v, cos, sin, q_weight, k_weight, out, k_pages, v_pages, slots,
        num_tokens, num_heads, k.shape[1], head_dim, q.stride(0), k.stride(0), v.stride(0), num_slots, float(eps),
        _is_bf16(q),
    )  # fmt: skip
    if failed >= 0:
        raise _bad_slot("rope_append", slots, failed, num_slots)
    return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[-1]
    _run(native.rms_norm, x, weight, out, x.numel() // max(size, 1), size, float(eps), _is_bf16(x))
    return out


def _rms_norm_backward(
    x: Tensor, weight: Tensor, d_out: Tensor, d_total: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx, d_weight); `d_total`, if any, is added to dx."""
    d_out, dx, d_weight = _dense(d_out), torch.empty_like(x), torch.empty_like(weight)
    d_total = None if d_total is None else _dense(d_total)
    size = x.shape[-1]
    _run(
        native.rms_norm_backward, x, weight, d_out, dx, d_weight, x.numel() // max(size, 1), size, float(eps), d_total,
        _is_bf16(x),
    )  # fmt: skip
    return dx, d_weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gradients.rms_norm(_dense(x), _dense(weight), eps, _rms_norm, _rms_norm_backward)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    _run(native.add_rms_norm, x, residual, weight, out, total, x.numel() // max(size, 1), size, float(eps), _is_bf16(x))
    return out, total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual, weight = _dense(x), _dense(residual), _dense(weight)
    return gradients.add_rms_norm(x, residual, weight, eps, _add_rms_norm, _rms_norm_backward)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = _dense(x)
    out = torch.empty_like(x)
    _run(native.rope, x, cos, sin, out, *x.shape, direction, _is_bf16(x))
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return gradients.rope(x, _angles(cos), _angles(sin), _rotate)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of 2-D inputs may be strided, as in the halves of a fused gate-up projection."""
    if gate.dim() != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        gate, up = _dense(gate), _dense(up)
    out = gate.new_empty(gate.shape)
    rows, size = gate.shape if gate.dim() == 2 else (1, gate.numel())
    strides = (gate.stride(0), up.stride(0)) if gate.dim() == 2 else (size, size)
    _run(native.silu_mul, gate, up, out, rows, size, *strides, _is_bf16(gate))
    return out


def _silu_mul_backward(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, d_out = _dense(gate), _dense(up), _dense(d_out)
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _run(native.silu_mul_backward, gate, up, d_out, d_gate, d_up, gate.numel(), _is_bf16(gate))
    return d_gate, d_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gradients.silu_mul(gate, up, _silu_mul, _silu_mul_backward)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_cols, depth = weight.shape
    if _is_bf16(x) and depth % 2:  # products take bf16 in pairs
        return _linear(torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(weight, (0, 1)), bias)
    out = x.new_empty(*x.shape[:-1], num_cols)
    _run(native.linear, x, weight, bias, out, x.shape[:-1].numel(), num_cols, depth, depth, _is_bf16(x))
    return out


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear.batch_invariant_linear(x, weight, bias, _linear)


def _tile(u: Tensor, first_row: int, first_col: int, head: Head) -> tuple[Any, ...]:
    """The arguments of `_cpu` for a tile of logits and the edges."""
    return (
        u, *u.shape, first_row, first_col, 1.0 / float(head.temperature), float(head.softcap or 0.0), _is_bf16(u),
        head.rows, head.targets, head.num_edges,
    )  # fmt: skip


def _logit_stats(u: Tensor, first_row: int, first_col: int, head: Head, stats: Tensor, chosen: Tensor) -> None:
    tile = _tile(u, first_row, first_col, head)
    _run(native.logit_stats, *tile, stats, stats.shape[1], chosen)


def _logit_finish(head: Head, stats: Tensor, chosen: Tensor) -> None:
    _run(native.logit_finish, stats, stats.shape[1], head.rows, head.targets, head.num_edges, chosen)


def _logit_grad(u: Tensor, first_row: int, first_col: int, head: Head, stats: Tensor, grads: Grads) -> Tensor:
    tile = _tile(u, first_row, first_col, head)
    _run(native.logit_grad, *tile, stats, stats.shape[1], grads.rows, grads.entropy, grads.edges)
    return u


@cache
def _has_bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


_LOGIT_OPS = LogitOps(_logit_stats, _logit_finish, _logit_grad, lambda x: _is_bf16(x) and _has_bf16_products())
_HEAD = one_pass.tiled(_LOGIT_OPS)


def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    rows, targets = _dense(rows), _dense(targets)
    return logprob.linear_logprob(hidden, weight, rows, targets, temperature, softcap, _LOGIT_OPS)


def linear_logprob_stats(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return logprob.linear_logprob_stats(hidden, weight, _dense(rows), _dense(targets), *rest, ops=_LOGIT_OPS)


def linear_logprob_grads(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None]:
    return logprob.linear_logprob_grads(hidden, weight, _dense(rows), _dense(targets), *rest, ops=_LOGIT_OPS)


def policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: Loss,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = _dense(rows), _dense(targets)
    return one_pass.policy_head(hidden, weight, rows, targets, loss, temperature, softcap, _HEAD)


def _column(value: float | Tensor, dtype: torch.dtype) -> Tensor | None:
    """A per-row sampling parameter as `_cpu` reads it; None for a plain number."""
    return _dense(value.to(dtype)) if isinstance(value, Tensor) else None


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor,
    min_p: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, keys = _dense(logits), _dense(keys)
    num_rows, vocabulary = logits.shape
    columns = (
        _column(temperature, torch.float64),
        _column(top_p, torch.float64),
        _column(top_k, torch.int64),
        _column(min_p, torch.float64),
    )
    numbers = [x if not isinstance(x, Tensor) else 0 for x in (temperature, top_p, top_k, min_p)]
    token = keys.new_empty(num_rows)
    logprob, logprob_raw, entropy = logits.new_empty(3, num_rows, dtype=torch.float32).unbind()
    failed = _run(
        native.sample, logits, keys, *columns, *numbers, token, logprob, logprob_raw, entropy, num_rows, vocabulary,
        _is_bf16(logits),
    )  # fmt: skip
    if failed >= 0:
        raise ValueError(f"sample: row {failed} has no distribution (NaN or inf logits)")
    return token, logprob, logprob_raw, entropy


def sampled_logprob(logits: Tensor, rows: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits, rows, targets = _dense(logits), _dense(rows), _dense(targets)
    token = torch.empty_like(targets)
    logprob, logprob_raw, entropy = logits.new_empty(3, len(rows), dtype=torch.float32).unbind()
    failed = _run(
        native.sampled_logprob, logits, rows, targets, float(temperature), token, logprob, logprob_raw, entropy,
        len(rows), logits.shape[1], _is_bf16(logits),
    )  # fmt: skip
    if failed >= 0:
        raise ValueError(f"sampled_logprob: row {int(rows[failed])} has no distribution (NaN or inf logits)")
    return logprob, logprob_raw
