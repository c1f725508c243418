"""The useful work of every op: floating-point operations and bytes that must move. One place, tested by counting.

Useful work is what the result needs, not what a kernel happens to do. Masked tiles, recomputed scores and shared keys
read once a branch do not count, so they lower a kernel's share of the roof.

Letters: s bytes an element; N packed tokens, P visible pairs; B branches, L the sum of their path lengths, U unique
live slots; Hq/Hkv query and key/value heads of D; T rows, H hidden, V vocabulary. A function such as exp counts as one
operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROWS_A_PASS = 4096
"""Rows of a log-prob for which the weight must be read once: those whose tiles a matrix product has in flight."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work(0, 0)
"""The work of a plan, of which only the time is of interest."""


def visible_pairs(end: Tensor) -> int:
    """P = sum over j of (end[j] - j): pairs of a query i and a key j with j <= i < end[j]."""
    num_tokens = len(end)
    return int(end.long().sum()) - num_tokens * (num_tokens - 1) // 2


def tree_attention_forward(pairs: int, tokens: int, heads: int, kv_heads: int, dim: int, size: int) -> Work:
    """4 Hq D P; q, k, v read, out written, one float32 log-sum-exp a query and head."""
    return Work(4 * heads * dim * pairs, size * tokens * dim * (2 * heads + 2 * kv_heads) + 4 * heads * tokens)


def tree_attention_backward(pairs: int, tokens: int, heads: int, kv_heads: int, dim: int, size: int) -> Work:
    """10 Hq D P (scores, dP, dV, dK, dQ); q, k, v, out, d_out, log-sum-exp and delta read, dq, dk, dv written."""
    return Work(10 * heads * dim * pairs, size * tokens * dim * (4 * heads + 4 * kv_heads) + 8 * heads * tokens)


def tree_decode(
    path_lengths: int, unique_slots: int, branches: int, heads: int, kv_heads: int, dim: int, size: int
) -> Work:
    """4 Hq D L; each shared key and value read once, q read, out written."""
    moved = 2 * unique_slots * kv_heads * dim * size + 2 * branches * heads * dim * size
    return Work(4 * heads * dim * path_lengths, moved)


def _passes(rows: int) -> int:
    return -(-rows // ROWS_A_PASS)


def linear_logprob_forward(rows: int, hidden: int, vocabulary: int, size: int) -> Work:
    """2 T H V; hidden once, the weight once for every 4,096 rows, and no logits."""
    return Work(2 * rows * hidden * vocabulary, size * hidden * (rows + vocabulary * _passes(rows)))


def linear_logprob_backward(rows: int, hidden: int, vocabulary: int, size: int) -> Work:
    """6 T H V, including the recomputed logits; inputs read as in the forward, gradients of their sizes written."""
    forward = linear_logprob_forward(rows, hidden, vocabulary, size)
    return Work(3 * forward.flops, forward.bytes + size * hidden * (rows + vocabulary))


def policy_head(rows: int, hidden: int, vocabulary: int, size: int) -> Work:
    """6 T H V: forward and backward of a known loss, with logits made once."""
    forward = linear_logprob_forward(rows, hidden, vocabulary, size)
    return Work(3 * forward.flops, forward.bytes + size * hidden * (rows + vocabulary))


def batch_invariant_linear(rows: int, depth: int, columns: int, size: int) -> Work:
    """2 M N K; x and weight read, out written."""
    return Work(2 * rows * depth * columns, size * (rows * depth + depth * columns + rows * columns))


def sample(rows: int, vocabulary: int, size: int) -> Work:
    """Two exponentials, two subtractions and three sums a logit (at temperature 1 and at the sampler's); read once."""
    return Work(7 * rows * vocabulary, size * rows * vocabulary)


def rms_norm_forward(elements: int, size: int) -> Work:
    """Square, add, times 1/rms, times weight; x read, y written."""
    return Work(4 * elements, 2 * size * elements)


def rms_norm_backward(elements: int, size: int) -> Work:
    """dx = r (w dy - xh mean(w dy xh)) and dw = sum dy xh; x and dy read, dx written."""
    return Work(9 * elements, 3 * size * elements)


def add_rms_norm_forward(elements: int, size: int) -> Work:
    """One more addition than the norm; x and residual read, y and the sum written."""
    return Work(5 * elements, 4 * size * elements)


def add_rms_norm_backward(elements: int, size: int) -> Work:
    """As the norm's, with the gradient of the sum read and added."""
    return Work(10 * elements, 4 * size * elements)


def silu_mul_forward(elements: int, size: int) -> Work:
    """g / (1 + exp(-g)) u; both read, one written."""
    return Work(5 * elements, 3 * size * elements)


def silu_mul_backward(elements: int, size: int) -> Work:
    """Gate, up and dy read, two gradients written."""
    return Work(10 * elements, 5 * size * elements)


def rope(tokens: int, heads: int, dim: int, size: int) -> Work:
    """Two products and a sum an element; x read and written, and the float32 angles of each token."""
    elements = tokens * heads * dim
    return Work(3 * elements, 2 * size * elements + 4 * tokens * dim)


def append_kv(tokens: int, kv_heads: int, dim: int, size: int) -> Work:
    """k and v read and written; no arithmetic."""
    return Work(0, 4 * size * tokens * kv_heads * dim)


def rope_append(tokens: int, heads: int, kv_heads: int, dim: int, size: int) -> Work:
    """Norm and rotation of q and k, append of k and v."""
    q, k = tokens * heads * dim, tokens * kv_heads * dim
    return Work(7 * (q + k), size * (2 * q + 4 * k) + 4 * tokens * dim)
