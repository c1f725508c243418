"""The public ops. Each checks its arguments, then runs on the backend chosen by `dispatch`.

Shapes: N packed tokens, B queries (live branches), T rows, E edges, Hq/Hkv query and key/value heads, D head size,
H hidden, V vocabulary. Tensors of one call share device and float dtype unless said otherwise.
"""

from __future__ import annotations

from torch import Tensor

from ibtpo_kernels import checks, library
from ibtpo_kernels.dispatch import direct, direct_forward, implementation
from ibtpo_kernels.one_pass import Loss
from ibtpo_kernels.plan import DecodePlan


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention over packed trees: query i sees key j <=> j <= i < end[j].

    Args:
        q: [N, Hq, D]; k, v: [N, Hkv, D] with Hq a multiple of Hkv; tokens in depth-first pre-order.
        end: int32 [N], exclusive end of each token's subtree, in (i, N].
        scale: of the scores; default 1 / sqrt(D).

    Returns:
        [N, Hq, D]; differentiable in q, k and v. The backward is deterministic.

    Raises:
        ValueError: a shape, dtype, device or `end` is wrong.

    Source: ours; the tiling is FlashAttention-2 (Dao, 2023) with the mask reduced to two integers a key block.
    """
    if library.traced(q):
        traced: Tensor = library.call(library.tree_attention, q, k, v, end, _scale(scale, q))
        return traced
    factor = _scale(scale, q)
    checks.tree_attention(q, k, v, end, factor)
    out: Tensor = implementation(q).tree_attention(q, k, v, end, factor)
    return out


def plan_decode(
    page_table: Tensor, rows: Tensor, lengths: Tensor, *, page_size: int = 16, uniform: bool = False
) -> DecodePlan:
    """Find which queries share which pages, so that `tree_decode` reads a shared page once.

    Sharing is found between neighbours, so give queries in depth-first order. Results never depend on what is found.

    Args:
        page_table: int32 [R, P], page ids of each row's path in depth order; -1 past a row's pages, never read.
        rows: int32 [B], the table row of each query; equal neighbours (a chunked prefill) share everything.
        lengths: int32 [B], query b sees slots [0, lengths[b]) of its path, its own included.
        page_size: slots a page.
        uniform: see `DecodePlan`.

    Returns:
        A `DecodePlan` that refers to these tensors: `lengths` may grow and pages be added to the table in place without
        a new plan; replacing a page needs one.

    Raises:
        ValueError: a shape, dtype or device is wrong, a row lies outside the table, a length exceeds the table's width.
    """
    checks.plan_decode(page_table, rows, lengths, page_size)
    items: Tensor = implementation(page_table).plan_decode(page_table, rows, lengths, page_size)
    return DecodePlan(page_table, rows, lengths, items, page_size, uniform=uniform)


def tree_decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, *, scale: float | None = None) -> Tensor:
    """Attention of B queries, each against its own path of a paged cache; no autograd.

    Each query visits its pages one by one in depth order, so its result does not depend on the rest of the batch; on a
    GPU its last bits may, unless the plan is `uniform`.

    Args:
        q: [B, Hq, D]; k_pages, v_pages: contiguous [num_pages, page_size, Hkv, D].
        plan: from `plan_decode`, for these B queries and this page size.
        scale: of the scores; default 1 / sqrt(D).

    Returns:
        [B, Hq, D]; zeros for a query of length 0.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a page that a query needs is not in the table or the cache.
    """
    if (fast := direct()) is not None:
        table, rows, lengths, items = plan.page_table, plan.rows, plan.lengths, plan.items
        done = fast.tree_decode(q, k_pages, v_pages, table, rows, lengths, items, plan.page_size, scale)
        if done is not None:
            return done
    factor = _scale(scale, q)
    checks.tree_decode(q, k_pages, v_pages, plan, factor)
    out: Tensor = implementation(q).tree_decode(q, k_pages, v_pages, plan, factor)
    return out


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write keys and values into the paged cache, in place.

    Args:
        k, v: [T, Hkv, D]; k_pages, v_pages: contiguous [num_pages, page_size, Hkv, D].
        slots: int64 [T], page * page_size + offset; -1 skips the row. A slot given twice keeps one of its rows.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a slot lies outside the cache.
    """
    if (fast := direct()) is not None and fast.append_kv(k, v, k_pages, v_pages, slots) is not None:
        return
    checks.append_kv(k, v, k_pages, v_pages, slots)
    implementation(k).append_kv(k, v, k_pages, v_pages, slots)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; differentiable.

    Args:
        x: [..., H]; weight: [H].

    Returns:
        [..., H]; computed in float32, rounded to x's dtype, then multiplied by `weight`, as transformers' Qwen3RMSNorm.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Source: Zhang and Sennrich, "Root mean square layer normalization" (2019).
    """
    if (fast := direct_forward()) is not None and (done := fast.rms_norm(x, weight, eps)) is not None:
        return done
    if library.traced(x):
        traced: Tensor = library.call(library.rms_norm, x, weight, eps)
        return traced
    checks.rms_norm(x, weight, eps)
    out: Tensor = implementation(x).rms_norm(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum, in one pass; differentiable.

    Args:
        x, residual: [..., H]; weight: [H].

    Returns:
        (rms_norm(x + residual), x + residual), each [..., H]; the sum is rounded to x's dtype, then normed as in
        `rms_norm`.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    if (fast := direct_forward()) is not None and (done := fast.add_rms_norm(x, residual, weight, eps)) is not None:
        return done
    checks.add_rms_norm(x, residual, weight, eps)
    normed, total = implementation(x).add_rms_norm(x, residual, weight, eps)
    return normed, total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half layout: (x1 cos - x2 sin, x2 cos + x1 sin); differentiable in x.

    Args:
        x: [N, H, D] with D even; x1 and x2 are its halves along D.
        cos, sin: float [N, D/2].

    Returns:
        [N, H, D].

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Source: Su et al., "RoFormer" (2021), in the layout of transformers.
    """
    if (fast := direct_forward()) is not None and (done := fast.rope(x, cos, sin)) is not None:
        return done
    if library.traced(x):
        traced: Tensor = library.call(library.rope, x, cos, sin)
        return traced
    checks.rope(x, cos, sin)
    out: Tensor = implementation(x).rope(x, cos, sin)
    return out


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Norm, rotate and append, between the qkv projection and `tree_decode`, in one pass; no autograd.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D]; cos, sin: float [T, D/2].
        k_pages, v_pages: contiguous [num_pages, page_size, Hkv, D], written at `slots` as in `append_kv`.
        q_weight, k_weight: [D], weights of a per-head rms_norm (Qwen3); None leaves it out.
        eps: of that norm.

    Returns:
        [T, Hq, D], the normed and rotated q.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a slot lies outside the cache.
    """
    if (fast := direct()) is not None:
        done = fast.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, q_weight, k_weight, eps)
        if done is not None:
            return done
    checks.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, q_weight, k_weight, eps)
    out: Tensor = implementation(q).rope_append(q, k, v, cos, sin, k_pages, v_pages, slots, q_weight, k_weight, eps)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the gate of a SwiGLU MLP (Shazeer, 2020); any shape, both the same; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices differ.
    """
    if (fast := direct_forward()) is not None and (done := fast.silu_mul(gate, up)) is not None:
        return done
    if library.traced(gate):
        traced: Tensor = library.call(library.silu_mul, gate, up)
        return traced
    checks.silu_mul(gate, up)
    out: Tensor = implementation(gate).silu_mul(gate, up)
    return out


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, where a row's result has the same bits alone and in any batch; differentiable.

    The sum over K has one order, whatever the number of rows and threads; it differs between backends, dtypes and
    instruction sets. The backward uses plain products, without that promise.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N].

    Returns:
        [..., N] in the dtype of x; 16-bit inputs are summed in float32 and rounded once.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Source: ours; the insight that batch-dependent sums make inference vary is from Thinking Machines Lab, "Defeating
    nondeterminism in LLM inference" (2025).
    """
    checks.batch_invariant_linear(x, weight, bias)
    out: Tensor = implementation(x).batch_invariant_linear(x, weight, bias)
    return out


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of (row, target) edges and the entropy of each row under the softmax of a linear head.

    The logits are z = u / temperature with u = hidden @ weight.T; with a soft-cap z = softcap * tanh(u / softcap) /
    temperature: the cap comes first, as a Gemma model caps its logits before a sampler divides by the temperature.

    Args:
        hidden: [T, H]; weight: [V, H].
        rows, targets: int64 [E]; edge e asks for targets[e] under the distribution of row rows[e]. A row may have any
            number of edges, including none.
        temperature: above 0, finite.
        softcap: above 0, Gemma 2's `final_logit_softcapping`; None for no cap.

    Returns:
        (logprob [E], entropy [T]) in nats, float32 (float64 for float64 inputs); both differentiable in hidden and
        weight. No [T, V] tensor is made; for an input that needs no gradient none is computed, and nothing allocated.

    Raises:
        ValueError: a shape, dtype, device or index is wrong, or temperature or softcap is not positive.
    """
    if library.traced(hidden):
        logprob, stats = library.call(library.linear_logprob, hidden, weight, rows, targets, temperature, softcap)
        return logprob, stats[2]
    checks.linear_logprob(hidden, weight, rows, targets, temperature, softcap)
    run = implementation(hidden, also=library.HALF).linear_logprob
    logprob, entropy = run(hidden, weight, rows, targets, temperature, softcap)
    return logprob, entropy


def policy_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss of log-probs and entropies, forward and backward in one pass over the logits: 6 T H V operations, not 8.

    Gives the same value and gradients as

        logprob, entropy = linear_logprob(hidden, weight, rows, targets, temperature=temperature, softcap=softcap)
        value = loss(logprob, entropy, slice(None), slice(None))

    for a loss that is a sum over edges and rows. Rows are processed a chunk at a time, so that only one chunk's logits
    exist; the gradients are formed at once, and the scalar's backward multiplies them by the incoming one.

    Args:
        hidden, weight, rows, targets, temperature, softcap: as in `linear_logprob`.
        loss: called with (logprob [e], entropy [t], edges, rows) of a chunk, returns its share of the sum, one element.
            `edges` and `rows` are indices or slices: logprob belongs to rows[edges] and targets[edges], entropy to
            hidden[rows]. A chunk may have no edges. Differentiated once, by log-prob and entropy only: other tensors
            that `loss` reads get no gradient.

    Returns:
        (value, logprob [E], entropy [T]) as from `linear_logprob`, of which only the scalar `value` is differentiable.

    Raises:
        ValueError: as `linear_logprob`, or `loss` does not return one element.
    """
    if library.traced(hidden):
        logprob, entropy = linear_logprob(hidden, weight, rows, targets, temperature=temperature, softcap=softcap)
        return loss(logprob, entropy, slice(None), slice(None)), logprob.detach(), entropy.detach()
    checks.linear_logprob(hidden, weight, rows, targets, temperature, softcap, op="policy_head")
    run = implementation(hidden, also=library.HALF).policy_head
    value, logprob, entropy = run(hidden, weight, rows, targets, loss, temperature, softcap)
    return value, logprob, entropy


def sample(
    logits: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    min_p: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one token a row; the random number is a function of the row's key alone.

    Filters keep the `top_k` most likely tokens (0: all), of those the shortest prefix, most likely first, with at least
    `top_p` of their mass, and of those the ones at least `min_p` times as likely as the most likely token, that is
    z_v - max z >= temperature log(min_p). The token is the first, in vocabulary order, whose cumulative kept
    probability exceeds u times the total; u comes from Philox4x32-10 (see `philox`). All sums are in double.

    Args:
        logits: [B, V]; keys: int64 [B, 2] = (stream, position).
        temperature: at least 0; 0 is greedy (lowest index among ties, logprob 0).
        top_p: in (0, 1]; top_k: at least 0.
        min_p: in [0, 1]; 0 is off, 1 keeps the most likely token and its equals. Greedy rows ignore all three.
            Each of the four is a number or a tensor [B].

    Returns:
        (token int64 [B], logprob, logprob_raw, entropy, all float32 [B]): `logprob` under the distribution sampled
        from, `logprob_raw` and `entropy` (nats) under the full softmax at temperature 1.

    Raises:
        ValueError: a shape, dtype, device or parameter is wrong, or a row has NaN or +inf logits.
    """
    if (fast := direct()) is not None:
        done = fast.sample(logits, keys, temperature, top_p, top_k, min_p)
        if done is not None:
            return done
    checks.sample(logits, keys, temperature, top_p, top_k, min_p)
    drawn = implementation(logits).sample(logits, keys, temperature, top_p, top_k, min_p)
    token, logprob, logprob_raw, entropy = drawn
    return token, logprob, logprob_raw, entropy


def _scale(scale: float | None, q: Tensor) -> float:
    """The default is 1 / sqrt(D), or 1 for a q without a head size, which the checks reject next."""
    return (q.shape[-1] if q.dim() and q.shape[-1] else 1) ** -0.5 if scale is None else scale
