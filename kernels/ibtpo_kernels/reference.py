"""Every op in plain torch: the specification, which tests compare with.

Any float dtype and device. bf16 and fp16 are computed in float32 and rounded once at the end; float64 stays float64.

Shapes: N packed tokens, B queries, T rows, E edges, Hq/Hkv heads, D head size, H hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ibtpo_kernels import checks, one_pass
from ibtpo_kernels.logits import TORCH_OPS
from ibtpo_kernels.logprob import linear_logprob, linear_logprob_grads, linear_logprob_stats
from ibtpo_kernels.one_pass import Loss
from ibtpo_kernels.philox import uniform
from ibtpo_kernels.plan import DecodePlan, plan_items

__all__ = [
    "add_rms_norm",
    "append_kv",
    "batch_invariant_linear",
    "linear_logprob",
    "linear_logprob_grads",
    "linear_logprob_stats",
    "plain_linear_logprob",
    "plain_policy_head",
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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, where query i sees key j <=> j <= i < end[j]."""
    group = q.shape[1] // k.shape[1]
    k_NHD, v_NHD = (_wide(x).repeat_interleave(group, 1) for x in (k, v))
    index = torch.arange(len(q), device=q.device)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])  # [query, key]
    scores = torch.einsum("ihd,jhd->hij", _wide(q), k_NHD) * scale
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", p, v_NHD).to(q.dtype)


def plan_decode(
    page_table: Tensor, rows: Tensor, lengths: Tensor, page_size: int, state: Tensor | None = None
) -> Tensor:
    """The plan's items, int32 [I, 4] on the device of `page_table`; computed on the host."""
    checks.plan_in_range(page_table, rows, lengths, page_size)
    known = None if state is None else state.numpy()
    items = plan_items(page_table.cpu().numpy(), rows.cpu().numpy(), lengths.cpu().numpy(), page_size, known)
    return torch.from_numpy(items).to(page_table.device)


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """Each query against slots [0, lengths[b]) of its own path; a query of length 0 gets zeros."""
    group = q.shape[1] // k_pages.shape[2]
    out = torch.zeros_like(q)
    rows, lengths = plan.rows.tolist(), plan.lengths.tolist()
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        pages = plan.page_table[row, : -(-length // plan.page_size)].long()
        if length > plan.page_table.shape[1] * plan.page_size or bool(((pages < 0) | (pages >= len(k_pages))).any()):
            raise ValueError(f"tree_decode: query {b} of length {length} needs a page that table row {row} lacks")
        k_LHD, v_LHD = (_wide(x[pages].flatten(0, 1)[:length]).repeat_interleave(group, 1) for x in (k_pages, v_pages))
        p = (torch.einsum("hd,lhd->hl", _wide(q[b]), k_LHD) * scale).softmax(-1)
        if length:
            out[b] = torch.einsum("hl,lhd->hd", p, v_LHD).to(q.dtype)
    return out


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write row t of k and v to flat slot slots[t]; -1 writes nothing."""
    checks.slots_in_range(slots, k_pages)
    used = slots >= 0
    for source, pages in ((k, k_pages), (v, v_pages)):
        pages.flatten(0, 1)[slots[used]] = source[used].to(pages.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, then times weight: the order of transformers' Qwen3RMSNorm."""
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to x's dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = _wide(x).chunk(2, -1)
    cos_N1D, sin_N1D = cos[:, None].to(x1.dtype), sin[:, None].to(x1.dtype)
    return torch.cat((x1 * cos_N1D - x2 * sin_N1D, x2 * cos_N1D + x1 * sin_N1D), -1).to(x.dtype)


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
    """Norm q and k if weights are given, rotate both, append k and v; returns the rotated q."""
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    append_kv(rope(k, cos, sin), v, k_pages, v_pages, slots)
    return rope(q, cos, sin)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both factors in the input's dtype as in transformers' MLP."""
    return torch.nn.functional.silu(gate) * up


def plain_linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` with all logits at once and torch's autograd: the tiled form must equal it."""
    u = _wide(hidden) @ _wide(weight).t()
    log_p = ((u if softcap is None else softcap * (u / softcap).tanh()) / temperature).log_softmax(-1)
    return log_p[rows, targets], -(log_p.exp() * log_p).sum(-1)


def policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: Loss,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprob [E], entropy [T])."""
    return one_pass.policy_head(hidden, weight, rows, targets, loss, temperature, softcap, _HEAD)


_HEAD = one_pass.tiled(TORCH_OPS)


def plain_policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: Loss,
    temperature: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the outputs of `plain_linear_logprob`, in one piece: `policy_head` must equal it."""
    logprob, entropy = plain_linear_logprob(hidden, weight, rows, targets, temperature, softcap)
    return loss(logprob, entropy, slice(None), slice(None)), logprob.detach(), entropy.detach()


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor,
    min_p: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution in vocabulary order; all sums in double."""
    z = logits.double()
    raw = z.log_softmax(-1)
    if bool(raw.isnan().any()):
        raise ValueError(f"sample: row {int(raw.isnan().any(-1).nonzero()[0])} has no distribution (NaN or inf logits)")
    temperature, top_p, top_k = (_column(x, logits) for x in (temperature, top_p, top_k))
    floor = temperature * _column(log_of(min_p), logits)
    greedy, x = temperature == 0, z - z.amax(-1, keepdim=True)
    w = torch.where(greedy, (x == 0).double(), (x / torch.where(greedy, 1.0, temperature)).exp())
    w = w.masked_fill(~_kept(x, w, torch.where(greedy, 1.0, top_k), torch.where(greedy, 1.0, top_p)), 0.0)
    w = w.masked_fill(~greedy & (x < floor), 0.0)
    cumulative = w.cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total
    token = torch.searchsorted(cumulative, torch.minimum(uniform(keys)[:, None] * total, below), right=True)
    logprob = (w.gather(-1, token) / total).log()[:, 0]
    entropy = torch.special.entr(raw.exp()).sum(-1)
    return token[:, 0], logprob.float(), raw.gather(-1, token)[:, 0].float(), entropy.float()


def sampled_logprob(logits: Tensor, rows: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logprob [E] at this temperature, logprob_raw [E] at 1) of the targets; sums in double."""
    z = logits.double()
    found = []
    for log_p in ((z / temperature).log_softmax(-1), z.log_softmax(-1)):
        if bool((bad := log_p[rows].isnan().any(-1)).any()):
            row = int(rows[bad.nonzero()[0, 0]])
            raise ValueError(f"sampled_logprob: row {row} has no distribution (NaN or inf logits)")
        found.append(log_p[rows, targets].float())
    return found[0], found[1]


def log_of(min_p: float | Tensor) -> float | Tensor:
    """log(min_p) in double, by the C library as in C++, so that all backends agree on a token at the very limit."""
    if isinstance(min_p, Tensor):
        logs = [log_of(value) for value in min_p.tolist()]
        return torch.tensor(logs, dtype=torch.float64, device=min_p.device)
    return math.log(min_p) if min_p > 0 else -math.inf


def _column(value: float | Tensor, logits: Tensor) -> Tensor:
    """A per-row parameter as float64 [B, 1]."""
    return torch.as_tensor(value, dtype=torch.float64, device=logits.device).expand(len(logits))[:, None]


def _kept(x: Tensor, w: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool [B, V]: the top_k most likely, then the shortest prefix of those, most likely first, with mass >= top_p.

    Ordered by logits x, since different logits may have equal weights w.
    """
    order = x.argsort(dim=-1, descending=True, stable=True)
    by_weight = w.gather(-1, order)
    rank = torch.arange(w.shape[-1], device=w.device)
    in_top_k = (top_k == 0) | (rank < top_k)
    cumulative = (by_weight * in_top_k).cumsum(-1)
    before = torch.nn.functional.pad(cumulative, (1, 0))[:, :-1]  # mass of all heavier tokens
    in_top_p = (top_p >= 1) | (before < top_p * cumulative[:, -1:]) | (rank == 0)
    return torch.zeros_like(in_top_k & in_top_p).scatter(-1, order, in_top_k & in_top_p)


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, one k after the other in ascending order."""
    out = _wide(x).new_zeros(*x.shape[:-1], weight.shape[0])
    for x_k, weight_k in zip(_wide(x).unbind(-1), _wide(weight).unbind(-1), strict=True):
        out = out + x_k[..., None] * weight_k
    return (out if bias is None else out + _wide(bias)).to(x.dtype)
