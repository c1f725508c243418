"""The CPU kernels beside torch's own attention, in one run: `make bench`, or pytest bench/bench_kernels.py.

Each group holds one problem; times are wall clock. The peers of tree_decode are scaled_dot_product_attention on keys
and values duplicated for every branch, and in two calls, one over the shared prefix and one over the suffixes, merged
by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import ibtpo_kernels as K

PAGE = 16


class DecodeProblem:
    """B branches that share `prefix` slots and own `suffix` slots each; keys and values in every layout compared."""

    def __init__(self, branches: int, prefix: int, suffix: int, heads: int, kv_heads: int, dim: int) -> None:
        shared, own = prefix // PAGE, suffix // PAGE
        table = torch.empty(branches, shared + own, dtype=torch.int32)
        table[:, :shared] = torch.arange(shared)
        table[:, shared:] = shared + torch.arange(branches * own).view(branches, own)
        self.q = torch.randn(branches, heads, dim)
        self.k_pages, self.v_pages = torch.randn(2, shared + branches * own, PAGE, kv_heads, dim).unbind()
        self.table, self.rows = table, torch.arange(branches, dtype=torch.int32)
        self.lengths = torch.full((branches,), prefix + suffix, dtype=torch.int32)
        self.plan = K.plan_decode(table, self.rows, self.lengths, page_size=PAGE)
        self.prefix = prefix
        # [B, Hkv, length, D], every branch with its own copy of the prefix
        self.k, self.v = (
            x[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for x in (self.k_pages, self.v_pages)
        )
        self.k_suffix, self.v_suffix = (x[:, :, prefix:].contiguous() for x in (self.k, self.v))

    def tree_decode(self) -> Tensor:
        return K.tree_decode(self.q, self.k_pages, self.v_pages, self.plan)

    def sdpa_duplicated(self) -> Tensor:
        return scaled_dot_product_attention(self.q[:, :, None], self.k, self.v, enable_gqa=True)[:, :, 0]

    def sdpa_shared_prefix(self) -> Tensor:
        """The queries of all branches (and of a group) as rows of one call over the prefix, then one over suffixes."""
        branches, heads, dim = self.q.shape
        kv_heads = self.k.shape[1]
        rows = self.q.view(branches, kv_heads, -1, dim)
        upper, upper_lse = _flash(
            rows.transpose(0, 1).reshape(1, kv_heads, -1, dim),
            self.k[:1, :, : self.prefix],
            self.v[:1, :, : self.prefix],
        )
        lower, lower_lse = _flash(rows, self.k_suffix, self.v_suffix)
        upper = upper.view(kv_heads, branches, -1, dim).transpose(0, 1)
        upper_lse = upper_lse.view(kv_heads, branches, -1).transpose(0, 1)
        share = torch.sigmoid(upper_lse - lower_lse)[..., None]
        return (upper * share + lower * (1 - share)).reshape(branches, heads, dim)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


DECODE = {  # branches, prefix, suffix, heads, key/value heads, head size
    "B32 prefix1024 suffix64 H8 D64": (32, 1024, 64, 8, 8, 64),
    "B32 unshared1088 H8 D64": (32, 0, 1088, 8, 8, 64),
    "B256 prefix64 suffix32 H4:2 D32": (256, 64, 32, 4, 2, 32),
}


@pytest.mark.parametrize("how", ["tree_decode", "sdpa_duplicated", "sdpa_shared_prefix"])
@pytest.mark.parametrize("name", DECODE)
def test_decode(benchmark: Any, name: str, how: str) -> None:
    problem = DecodeProblem(*DECODE[name])
    run: Callable[[], Tensor] = getattr(problem, how)
    if how == "sdpa_shared_prefix" and problem.prefix == 0:
        run = problem.sdpa_duplicated  # nothing is shared: the two forms are one
    torch.testing.assert_close(run(), problem.sdpa_duplicated(), atol=1e-5, rtol=1e-4)
    benchmark.group = f"decode {name}"
    benchmark(run)


@pytest.mark.parametrize("branches", [32, 256])
def test_plan(benchmark: Any, branches: int) -> None:
    problem = DecodeProblem(branches, 1024, 64, 4, 2, 32)
    benchmark.group = "plan_decode"
    benchmark(K.plan_decode, problem.table, problem.rows, problem.lengths)


def chain(num_tokens: int) -> Tensor:
    return torch.full((num_tokens,), num_tokens, dtype=torch.int32)


def fan(prefix: int, branches: int, suffix: int) -> Tensor:
    """A prompt and many short branches, the shape of the built-in policy's trees."""
    ends = prefix + suffix * torch.arange(1, branches + 1, dtype=torch.int32)
    return torch.cat((torch.full((prefix,), int(ends[-1]), dtype=torch.int32), ends.repeat_interleave(suffix)))


ATTENTION = {  # subtree ends, (prefix, branches, suffix) for the unpacked peer, heads, key/value heads, head size
    "chain1024 H8 D64": (chain(1024), (0, 1, 1024), 8, 8, 64),
    "chain1024 H4:2 D32": (chain(1024), (0, 1, 1024), 4, 2, 32),
    "prompt64+32x32 H4:2 D32": (fan(64, 32, 32), (64, 32, 32), 4, 2, 32),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("how", ["tree_attention", "sdpa_unpacked"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(benchmark: Any, name: str, how: str, backward: bool) -> None:
    """The peer unpacks the tree: causal attention over every trajectory, the prompt repeated in each."""
    end, (prefix, branches, suffix), heads, kv_heads, dim = ATTENTION[name]
    if how == "tree_attention":
        q, k, v = (torch.randn(len(end), h, dim, requires_grad=backward) for h in (heads, kv_heads, kv_heads))

        def forward() -> Tensor:
            return K.tree_attention(q, k, v, end)

    else:
        length = prefix + suffix
        q, k, v = (torch.randn(branches, h, length, dim, requires_grad=backward) for h in (heads, kv_heads, kv_heads))

        def forward() -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

    d_out = torch.randn_like(forward())
    benchmark.group = f"attention {name} {'forward+backward' if backward else 'forward'}"
    if backward:
        benchmark(lambda: torch.autograd.grad(forward(), (q, k, v), d_out))
    else:
        benchmark(forward)


@pytest.mark.parametrize("how", ["batch_invariant_linear", "F.linear"])
@pytest.mark.parametrize("rows", [1, 32, 256])
@pytest.mark.parametrize(("depth", "columns"), [(96, 256), (256, 96), (1024, 4096)])
def test_linear(benchmark: Any, depth: int, columns: int, rows: int, how: str) -> None:
    """What a fixed order of summation costs."""
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    product = K.batch_invariant_linear if how == "batch_invariant_linear" else linear
    benchmark.group = f"linear M{rows} K{depth} N{columns}"
    with torch.inference_mode():
        benchmark(product, x, weight)


@pytest.mark.parametrize("how", ["linear_logprob", "log_softmax"])
@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(2048, 64, 32), (512, 256, 32768)])
def test_logprob(benchmark: Any, how: str, rows: int, hidden: int, vocabulary: int) -> None:
    """Forward and backward of log-prob and entropy."""
    x, w = torch.randn(rows, hidden, requires_grad=True), torch.randn(vocabulary, hidden, requires_grad=True)
    index, targets = torch.arange(rows), torch.randint(0, vocabulary, (rows,))

    def ours() -> tuple[Tensor, Tensor]:
        return K.linear_logprob(x, w, index, targets)

    def eager() -> tuple[Tensor, Tensor]:
        log_p = (x @ w.t()).log_softmax(-1)
        return log_p[index, targets], -(log_p.exp() * log_p).sum(-1)

    forward = ours if how == "linear_logprob" else eager
    benchmark.group = f"logprob T{rows} H{hidden} V{vocabulary}"
    benchmark(lambda: torch.autograd.grad(sum(y.sum() for y in forward()), (x, w)))


@pytest.mark.parametrize("vocabulary", [32, 32768])
@pytest.mark.parametrize("how", ["sample", "torch"])
def test_sample(benchmark: Any, how: str, vocabulary: int) -> None:
    """64 rows; the peer draws with multinomial and computes log-probs and entropy."""
    logits, keys = torch.randn(64, vocabulary), torch.randint(0, 2**62, (64, 2))

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        token = torch.multinomial(p, 1)
        return token, log_p.gather(1, token), -(p * log_p).sum(-1)

    benchmark.group = f"sample B64 V{vocabulary}"
    benchmark((lambda: K.sample(logits, keys)) if how == "sample" else eager)
