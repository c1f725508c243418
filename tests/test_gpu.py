"""Every op on a GPU against the float64 reference on the same device, in float32, float16 and bfloat16.

Needs CUDA (`bench/gpu.sh` runs it there). With `-p emulated_cuda` and TRITON_INTERPRET=1 the same tests run on the CPU
in Triton's interpreter, at small shapes and without bfloat16, whose products the interpreter gets wrong:
`test_triton_interpreter` does that wherever Triton is installed, so that this file is known to work before it meets a
GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import test_kernels_attention as attention_tests
import test_kernels_decode as decode_tests
import test_kernels_logprob as logprob_tests
import test_kernels_sample as sample_tests
import torch
from gpu_only import DEVICE, INTERPRETED, LARGE
from kernel_cases import assert_within_budget, forest, paged, qkv
from torch import Tensor

import ibtpo_kernels as K

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
REPEATS = 10 if LARGE else 2
FLOOR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # a few roundings of the result

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def by_shape(small: Sequence[tuple[int, ...]], large: Sequence[tuple[int, ...]]) -> Any:
    """Small shapes in the interpreter; on a GPU large ones too."""
    return pytest.mark.parametrize("shape", [*small, *(large if LARGE else ())], ids=str)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """What a test makes without naming a device is on the one tested, and ops there run on Triton."""
    with torch.device(DEVICE), K.backend("triton"):
        yield


Op = Callable[..., Tensor | tuple[Tensor, ...]]


def evaluate(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, backend: str, seed: int = 0) -> list[Tensor]:
    """[outputs, gradients of all inputs] of `op` on copies of `inputs` in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with K.backend(backend):
        out = op(*leaves)
    outputs = (out,) if isinstance(out, Tensor) else out
    generator = torch.Generator(DEVICE).manual_seed(seed)
    d_out = [torch.randn(y.shape, generator=generator).half().to(y.dtype) for y in outputs]  # the same in any type
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, d_out)]


def assert_op_within_budget(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, plain: Op | None = None) -> None:
    """`plain` is how eager torch computes it; the op on the reference backend where that is the same."""
    rounded = [x.to(dtype) for x in inputs]
    ours = evaluate(op, rounded, dtype, "triton")
    theirs = evaluate(plain or op, rounded, dtype, "reference")
    exact = evaluate(op, rounded, torch.float64, "reference")
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert_within_budget(x, y, z, floor=FLOOR[dtype])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
    """In the inputs' own type throughout."""
    index, group = torch.arange(len(q)), q.shape[1] // k.shape[1]
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@by_dtype
@by_shape(
    [(0, 2, 1, 8), (1, 1, 1, 32), (67, 4, 2, 24), (70, 2, 1, 128)],
    [(1000, 16, 8, 64), (1337, 32, 8, 128), (777, 12, 2, 128), (333, 3, 1, 40), (401, 2, 2, 256), (2051, 4, 1, 96)],
)
def test_tree_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    end = forest(shape[0])
    assert_op_within_budget(
        lambda q, k, v: K.tree_attention(q, k, v, end),
        qkv(*shape),
        dtype,
        lambda q, k, v: plain_attention(q, k, v, end),
    )


@by_dtype
def test_the_backward_of_attention_is_the_same_every_time(dtype: torch.dtype) -> None:
    shape = (3001, 8, 2, 64) if LARGE else (50, 2, 1, 16)
    inputs, end = [x.to(dtype) for x in qkv(*shape)], forest(shape[0])
    first, *others = (
        evaluate(lambda q, k, v: K.tree_attention(q, k, v, end), inputs, dtype, "triton") for _ in range(REPEATS)
    )
    assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))


def decode_problem(case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """q, pages [2, P, page, Hkv, D], page table, rows, lengths, page size."""
    lengths, shares, page_size, heads, kv_heads, dim = case
    table, rows, seen, num_pages = paged(lengths, shares, page_size)
    pages = torch.randn(2, num_pages, page_size, kv_heads, dim).to(dtype)
    return torch.randn(len(lengths), heads, dim).to(dtype), pages, table, rows, seen, page_size


DECODE = decode_tests.CASES[: None if LARGE else 3] + (
    [
        ([1600] * 16, [0] + [64] * 15, 16, 32, 8, 128),
        ([4096, 4100, 300, 5000], [0, 200, 10, 0], 16, 12, 2, 64),
        ([513] * 130, [0] + [31] * 129, 16, 16, 8, 128),
    ]
    if LARGE
    else []
)


@by_dtype
@pytest.mark.parametrize("case", DECODE, ids=lambda c: f"B{len(c[0])}-page{c[2]}-{c[3]}:{c[4]}-D{c[5]}")
def test_tree_decode(case: Any, dtype: torch.dtype) -> None:
    q, pages, table, rows, lengths, page_size = decode_problem(case, dtype)
    plan = K.plan_decode(table, rows, lengths, page_size=page_size)
    actual = K.tree_decode(q, *pages, plan)
    with K.backend("reference"):
        plain, exact = K.tree_decode(q, *pages, plan), K.tree_decode(q.double(), *pages.double(), plan)
    assert_within_budget(actual, plain, exact, floor=FLOOR[dtype])


@by_dtype
def test_a_graph_of_tree_decode_replays_after_lengths_grew(dtype: torch.dtype) -> None:
    """Captured once; then branches grow over a page and over many splits; their pages join the table in place."""
    table, rows, lengths, num_pages = paged([70, 90, 500], [0, 3, 4], 16, spare=60)
    pages, q = torch.randn(2, num_pages + 120, 16, 2, 64).to(dtype), torch.randn(3, 8, 64).to(dtype)
    plan = K.plan_decode(table, rows, lengths)
    out = torch.empty_like(q)
    out.copy_(K.tree_decode(q, *pages, plan))  # compiles, and makes the work list
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(K.tree_decode(q, *pages, plan))
    for seen in ([71, 91, 501], [81, 97, 520], [900, 98, 1100]):
        for row, length in enumerate(seen):
            free = table[row, : -(-length // 16)] < 0
            table[row, : -(-length // 16)][free] = num_pages + torch.arange(int(free.sum()), dtype=torch.int32)
        lengths.copy_(torch.tensor(seen, dtype=torch.int32))
        q.copy_(torch.randn(q.shape))
        graph.replay()
        fresh = K.tree_decode(q, *pages, K.plan_decode(table, rows, lengths))
        assert torch.equal(out, fresh)
        with K.backend("reference"):
            exact = K.tree_decode(q.double(), *pages.double(), K.plan_decode(table, rows, lengths))
        assert_within_budget(out, exact.to(dtype), exact, floor=FLOOR[dtype])


class Branches:
    """Four branches that feed themselves: what is sampled is embedded, normed, rotated, appended, attended to."""

    HEADS, KV_HEADS, DIM, VOCABULARY = 4, 2, 64, 300
    LENGTHS = (250, 260, 30, 15)  # close to a split's end, past it, close to a page's end

    def __init__(self, dtype: torch.dtype, steps: int) -> None:
        count = len(self.LENGTHS)
        generator = torch.Generator(DEVICE).manual_seed(3)
        widths = (self.HEADS + 2 * self.KV_HEADS) * self.DIM
        self.embedding = torch.randn(self.VOCABULARY, widths, generator=generator).to(dtype)
        self.head = (torch.randn(self.HEADS * self.DIM, self.VOCABULARY, generator=generator) / 8).to(dtype)
        self.weight = torch.ones(self.DIM, dtype=dtype)
        angle = torch.arange(400)[:, None] * torch.rand(self.DIM // 2, generator=generator)
        self.cos, self.sin = angle.cos(), angle.sin()
        table, rows, lengths, num_pages = paged([n + steps for n in self.LENGTHS], [0, 3, 1, 0], 16)
        self.pages = torch.randn(2, num_pages, 16, self.KV_HEADS, self.DIM, generator=generator).to(dtype)
        self.table = table
        lengths.copy_(torch.tensor(self.LENGTHS, dtype=torch.int32))
        self.lengths = lengths
        self.plan = K.plan_decode(table, rows, lengths)
        self.tokens = torch.arange(count)
        self.streams = torch.arange(count) * 7919
        self.results = torch.empty(3, count)
        self._first = [x.clone() for x in (self.tokens, self.lengths, self.pages)]

    def restart(self) -> None:
        for x, first in zip((self.tokens, self.lengths, self.pages), self._first, strict=True):
            x.copy_(first)

    def step(self) -> None:
        """One token a branch, all of it on the device: lengths grow there, too."""
        pos = self.lengths.long()
        page = self.table.gather(1, (pos // 16)[:, None])[:, 0].long()
        sizes = [self.HEADS * self.DIM, self.KV_HEADS * self.DIM, self.KV_HEADS * self.DIM]
        q, k, v = (x.unflatten(1, (-1, self.DIM)) for x in self.embedding[self.tokens].split(sizes, 1))
        q = K.rope_append(
            q, k, v, self.cos[pos], self.sin[pos], *self.pages, page * 16 + pos % 16,
            q_weight=self.weight, k_weight=self.weight,
        )  # fmt: skip
        self.lengths.add_(1)
        logits = K.tree_decode(q, *self.pages, self.plan).flatten(1) @ self.head
        token, *rest = K.sample(logits, torch.stack((self.streams, pos), -1), temperature=0.8, top_p=0.95)
        self.tokens.copy_(token)
        self.results.copy_(torch.stack(rest))

    def run(self, step: Callable[[], object], steps: int) -> list[Tensor]:
        """[what was sampled and recorded at each step; the pages at the end]"""
        found: list[Tensor] = []
        for _ in range(steps):
            step()
            found += [self.tokens.clone(), self.results.clone()]
        return [*found, self.pages.clone()]


@by_dtype
def test_a_graph_of_a_decode_step_is_the_step(dtype: torch.dtype) -> None:
    """rope_append, tree_decode and sample, captured once and replayed while branches grow past pages and a split: bit
    for bit what the same calls give one by one."""
    steps = 2 if INTERPRETED else 20
    branches = Branches(dtype, steps)
    one_by_one = branches.run(branches.step, steps)
    assert int((one_by_one[0] != one_by_one[2]).sum()) > 0, "tokens change"
    branches.restart()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        branches.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        branches.step()
    branches.restart()
    for x, y in zip(branches.run(graph.replay, steps), one_by_one, strict=True):
        assert torch.equal(x, y)


def plain_logprob(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The product in the inputs' type, the rest in at least float32, as a training script does it."""
    logits = hidden @ weight.t()
    log_p = (logits if logits.dtype is torch.float64 else logits.float()).log_softmax(-1)
    return log_p[rows, targets], -(log_p.exp() * log_p).sum(-1)


def logprob_problem(shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, weight] of logits around 1, and edges: rows with none, one and many, some twice."""
    hidden, weight, rows, targets = logprob_tests.problem(*shape)
    rows[:4], targets[:4] = 0, shape[3] - 1
    return [hidden, weight * shape[2] ** -0.5], rows, targets


LOGPROB_SHAPES = (
    [(1, 3, 16, 7), (66, 61, 24, 131)],
    [(257, 300, 512, 50257), (1937, 2100, 256, 12992), (40, 40, 1024, 151936)],
)


@by_dtype
@by_shape(*LOGPROB_SHAPES)
def test_linear_logprob(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, rows, targets = logprob_problem(shape)
    assert_op_within_budget(
        lambda x, w: K.linear_logprob(x, w, rows, targets),
        inputs,
        dtype,
        lambda x, w: plain_logprob(x, w, rows, targets),
    )


def test_the_backward_of_logprob_is_the_same_every_time() -> None:
    inputs, rows, targets = logprob_problem((300, 900, 64, 5003) if LARGE else (20, 60, 16, 131))
    first, *others = (
        evaluate(lambda x, w: K.linear_logprob(x, w, rows, targets), inputs, DTYPES[-1], "triton")
        for _ in range(REPEATS)
    )
    assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))


@pytest.mark.skipif(not LARGE, reason="needs a GPU of 16 GB")
@pytest.mark.parametrize("frozen", ["", "weight", "hidden"])
def test_logprob_of_a_large_vocabulary_needs_less_than_a_gibibyte(frozen: str) -> None:
    """Beside inputs, outputs and gradients, at 8,192 rows of 4,096 and a vocabulary of 151,936 in bfloat16."""
    hidden, weight = torch.randn(8192, 4096).bfloat16(), torch.randn(151936, 4096).mul_(1 / 64).bfloat16()
    inputs = {"hidden": hidden, "weight": weight}
    leaves = [x.requires_grad_() for name, x in inputs.items() if name != frozen]
    rows, targets = torch.arange(8192), torch.randint(0, 151936, (8192,))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprob, entropy = K.linear_logprob(**inputs, rows=rows, targets=targets)
    forward = torch.cuda.max_memory_allocated() - before
    grads = torch.autograd.grad(logprob.sum() + entropy.sum(), leaves)
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in grads)
    assert forward < 1 << 30
    assert torch.cuda.max_memory_allocated() - before - kept < 1 << 30
    assert all(bool(x.isfinite().all()) for x in (logprob, entropy, *grads))


@pytest.mark.skipif(not hasattr(K, "policy_head"), reason="this build has no policy_head")
@by_dtype
@by_shape(*LOGPROB_SHAPES)
def test_policy_head_is_logprob_then_loss(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, rows, targets = logprob_problem(shape)
    old = torch.randn(len(rows)) - 3

    def loss(logprob: Tensor, entropy: Tensor, edges: Any, of: Any) -> Tensor:
        return ((logprob - old[edges]).clamp(-1, 1).exp()).sum() - 0.01 * entropy.sum()

    def fused(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return K.policy_head(x, w, rows, targets, loss)[:1]  # type: ignore[attr-defined,no-any-return]

    def apart(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (loss(*plain_logprob(x, w, rows, targets), slice(None), slice(None)),)

    leaves = [x.to(dtype) for x in inputs]
    ours = evaluate(fused, leaves, dtype, "triton")
    plain, exact = evaluate(apart, leaves, dtype, "reference"), evaluate(apart, leaves, torch.float64, "reference")
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_within_budget(x, y, z, floor=FLOOR[dtype])


@pytest.mark.parametrize("parameters", sample_tests.PARAMETERS, ids=str)
@by_shape([(5, 100)], [(64, 1000), (33, 50257), (8, 151936)])
def test_sampling_draws_the_tokens_of_the_reference(shape: tuple[int, int], parameters: dict[str, Any]) -> None:
    logits = 3 * torch.randn(shape)
    logits[:, ::3] = logits[:, ::3].round()  # ties
    keys = torch.randint(-(2**62), 2**62, (shape[0], 2))
    actual = K.sample(logits, keys, **parameters)
    with K.backend("reference"):
        expected = K.sample(logits, keys, **parameters)
    assert torch.equal(actual[0], expected[0])
    for x, y in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    if K.has_compiled():
        on_host = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in parameters.items()}
        with torch.device("cpu"), K.backend("cpu"):
            assert torch.equal(actual[0].cpu(), K.sample(logits.cpu(), keys.cpu(), **on_host)[0])


ROWS = ([(1, 1), (5, 37), (9, 130)], [(300, 4096), (4097, 1023), (17, 8192)])


@by_dtype
@by_shape(*ROWS)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_op_within_budget(lambda x, w: K.rms_norm(x, w, eps=1e-6), [torch.randn(shape), torch.randn(shape[1])], dtype)


@pytest.mark.skipif(not hasattr(K, "add_rms_norm"), reason="this build has no add_rms_norm")
@by_dtype
@by_shape(*ROWS)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape), torch.randn(shape), torch.randn(shape[1])]
    assert_op_within_budget(lambda x, r, w: K.add_rms_norm(x, r, w, eps=1e-6), inputs, dtype)  # type: ignore[attr-defined]


@by_dtype
@by_shape(*ROWS)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_op_within_budget(K.silu_mul, [torch.randn(shape), torch.randn(shape)], dtype)


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = 100 * torch.rand(tokens, dim // 2)
    return angle.cos(), angle.sin()


@by_dtype
@by_shape([(13, 3, 20), (5, 2, 64)], [(4099, 16, 128), (1000, 12, 96)])
def test_rope(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cos, sin = angles(shape[0], shape[2])
    assert_op_within_budget(lambda x: K.rope(x, cos, sin), [torch.randn(shape)], dtype)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@by_dtype
@by_shape([(11, 4, 2, 24)], [(517, 32, 8, 128), (33, 12, 2, 64)])
def test_rope_append_and_append_kv(shape: tuple[int, int, int, int], dtype: torch.dtype, normed: bool) -> None:
    """Into shuffled slots, some rows skipped; slots that nobody named keep what they held."""
    tokens, _, kv_heads, dim = shape
    q, k, v = (x.to(dtype) for x in qkv(*shape))
    cos, sin = angles(tokens, dim)
    weights = torch.randn(2, dim).to(dtype).unbind() if normed else (None, None)
    num_pages = tokens // 16 + 2
    slots = torch.randperm(num_pages * 16)[:tokens]
    slots[::5] = -1
    before = torch.randn(2, num_pages, 16, kv_heads, dim).to(dtype)

    def fused(kind: torch.dtype) -> list[Tensor]:
        pages, (q_weight, k_weight) = before.to(kind, copy=True), (None if w is None else w.to(kind) for w in weights)
        inputs = (x.to(kind) for x in (q, k, v))
        return [K.rope_append(*inputs, cos, sin, *pages, slots, q_weight=q_weight, k_weight=k_weight), pages]

    def append() -> Tensor:
        pages = before.clone()
        K.append_kv(k, v, *pages, slots)
        return pages

    ours, appended = fused(dtype), append()
    with K.backend("reference"):
        plain, exact, expected = fused(dtype), fused(torch.float64), append()
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_within_budget(x, y, z, floor=FLOOR[dtype])
    assert torch.equal(appended, expected)


@pytest.mark.skipif(not hasattr(K, "batch_invariant_linear"), reason="this build has no batch_invariant_linear")
@by_dtype
@by_shape([(5, 100, 20)], [(300, 1024, 1000), (129, 4096, 515), (1, 896, 4864)])
def test_batch_invariant_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
    op: Any = K.batch_invariant_linear  # type: ignore[attr-defined]
    assert_op_within_budget(op, [x, weight, torch.randn(outputs)], dtype, torch.nn.functional.linear)
    if not INTERPRETED:  # its product is numpy's, whose rows know their place
        x, weight = x.to(dtype), weight.to(dtype)
        whole = op(x, weight)
        for chosen in (slice(0, 1), slice(rows // 2, rows), slice(rows - 1, rows)):
            assert torch.equal(op(x[chosen], weight), whole[chosen])


@pytest.mark.parametrize(
    "test",
    [
        attention_tests.test_a_row_is_causal_attention_over_its_own_path,
        attention_tests.test_a_thousand_way_fork,
        attention_tests.test_depth_one_returns_the_values,
        attention_tests.test_extreme_scores_stay_finite,
        decode_tests.test_chunked_prefill_is_packed_attention,
        decode_tests.test_a_query_may_grow_without_a_new_plan,
        decode_tests.test_queries_of_length_zero_or_without_heads_and_empty_batches,
        logprob_tests.test_all_logits_very_negative,
        sample_tests.test_greedy_takes_the_first_of_equals_with_logprob_zero,
        sample_tests.test_parameters_per_row_equal_parameters_per_call,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
@pytest.mark.skipif(INTERPRETED, reason="triton_interpreter_cases has these")
def test_holds_on_the_device_too(test: Any) -> None:
    test("triton")


def test_attention_in_the_order_of_depth() -> None:
    """The value of decode over pages, the gradient of `tree_attention`, both to rounding."""
    end = forest(70 if LARGE else 40).to(DEVICE)
    inputs = [x.to(DEVICE) for x in qkv(len(end), 4, 2, 16)]
    assert_op_within_budget(
        lambda q, k, v: K.tree_attention_by_depth(q, k, v, K.plan_by_depth(end)),
        inputs,
        torch.float32,
        plain=lambda q, k, v: plain_attention(q, k, v, end),
    )
