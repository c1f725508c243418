"""The Triton kernels in Triton's interpreter, float32 and float16, against the float64 reference.

Collected by `test_triton_interpreter.py`, with TRITON_INTERPRET=1 in the environment. What the kernel tests say of a
backend is said here of "triton"; what is only true of these kernels (kinds of blocks, work lists, tiles) is added.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import test_kernels_attention as attention_tests
import test_kernels_compile as compile_tests
import test_kernels_decode as decode_tests
import test_kernels_guards as guard_tests
import test_kernels_linear as linear_tests
import test_kernels_logprob as logprob_tests
import test_kernels_policy_head as head_tests
import test_kernels_sample as sample_tests
import test_kernels_small as small_tests
import torch
import triton
import triton.language as tl
from kernel_cases import assert_within_budget, forest, paged, qkv
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels.gpu import blocks, configs, work
from ibtpo_kernels.gpu.configs import Tiles
from ibtpo_kernels.philox import uniform
from ibtpo_kernels.reference import plain_policy_head

gpu_sample = import_module("ibtpo_kernels.gpu.sample")
gpu_logprob = import_module("ibtpo_kernels.gpu.logprob")

SAID_OF_EVERY_BACKEND = [
    *(
        getattr(attention_tests, name)
        for name in (
            "test_a_row_is_causal_attention_over_its_own_path",
            "test_swapping_siblings_leaves_every_path_alone",
            "test_depth_one_returns_the_values",
            "test_extreme_scores_stay_finite",
        )
    ),
    *(
        getattr(decode_tests, name)
        for name in (
            "test_chunked_prefill_is_packed_attention",
            "test_a_query_may_grow_without_a_new_plan",
            "test_queries_of_length_zero_or_without_heads_and_empty_batches",
            "test_a_missing_page_is_an_error",
            "test_plan_errors_name_the_argument",
        )
    ),
    logprob_tests.test_all_logits_very_negative,
    *(
        getattr(sample_tests, name)
        for name in (
            "test_greedy_takes_the_first_of_equals_with_logprob_zero",
            "test_parameters_per_row_equal_parameters_per_call",
            "test_min_p_at_the_very_limit",
        )
    ),
]
ATTENTION = [  # tokens, query heads, key/value heads, head size
    (0, 2, 1, 8),
    (1, 1, 1, 32),
    (37, 4, 2, 16),
    (150, 4, 2, 24),
    (97, 3, 1, 5),
    (70, 2, 2, 80),
    (45, 2, 1, 96),
    (66, 2, 1, 128),
    (40, 1, 1, 256),
    (33, 4, 2, 200),  # float32 walks heads of more than 128 in steps
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that few tokens make many skipped, full and partial blocks; splits of 64 keys."""
    for name in ("tree_forward", "tree_backward_keys", "tree_backward_queries"):
        monkeypatch.setattr(configs, name, lambda *shape: Tiles(16, 16, 4, 1))
    monkeypatch.setattr(configs, "SPLIT", 64)
    monkeypatch.setattr(gpu_sample, "_BLOCK", 64)
    monkeypatch.setattr(gpu_logprob, "_BLOCK", 64)


@pytest.mark.parametrize("test", SAID_OF_EVERY_BACKEND, ids=lambda test: test.__name__)
def test_holds_for_triton_too(test: Any) -> None:
    test("triton")


def attend(q: Tensor, k: Tensor, v: Tensor, end: Tensor, d_out: Tensor, backend: str) -> list[Tensor]:
    return attention_tests.run(backend, q, k, v, end, d_out)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, d_out: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] in the inputs' own type throughout, as eager torch would compute it."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    index, group = torch.arange(len(q)), q.shape[1] // k.shape[1]
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    keys, values = (x.repeat_interleave(group, 1) for x in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", leaves[0], keys) * q.shape[2] ** -0.5
    out = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_and_its_gradients_match_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """At the shipped tiles; the error is at most twice that of torch in the same type."""
    q, k, v = (x.to(dtype) for x in qkv(*shape))
    end, d_out = forest(shape[0]), torch.randn(q.shape).to(dtype)
    exact = attend(q.double(), k.double(), v.double(), end, d_out.double(), "reference")
    plain = plain_attention(q, k, v, end, d_out)
    for ours, theirs, float64 in zip(attend(q, k, v, end, d_out, "triton"), plain, exact, strict=True):
        assert_within_budget(ours, theirs, float64, floor=3e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("branch", "root"), [(0.0, 0.0), (0.05, 0.0), (0.3, 0.05)], ids=["chain", "tree", "forest"])
@pytest.mark.parametrize("capability", [8, 9], ids=["pointers", "descriptors"])
def test_every_kind_of_block_is_met(
    branch: float, root: float, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "capability", lambda device: capability)
    q, k, v = qkv(135, 2, 1, 16)
    end, d_out = forest(135, branch=branch, root=root, seed=1), torch.randn(135, 2, 16)
    exact = attend(q.double(), k.double(), v.double(), end, d_out.double(), "reference")
    plain = plain_attention(q, k, v, end, d_out)
    ours = attend(q, k, v, end, d_out, "triton")
    for mine, theirs, float64 in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine, theirs, float64)


@pytest.mark.usefixtures("small_tiles")
def test_the_backward_is_bit_identical() -> None:
    q, k, v = qkv(60, 2, 1, 16)
    end, d_out = forest(60), torch.randn(60, 2, 16)
    first, again = (attend(q, k, v, end, d_out, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_more_key_blocks_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,100 tokens are 132 blocks of 16, in chunks of 128; few queries see the first branch, all see the prompt."""
    monkeypatch.setattr(configs, "tree_forward", lambda *shape: Tiles(128, 16, 4, 1))
    q, k, v = qkv(2100, 1, 1, 4)
    end = torch.full((2100,), 2100, dtype=torch.int32)
    end[33:1000] = 1000
    with K.backend("reference"):
        exact = K.tree_attention(q.double(), k.double(), v.double(), end)
    with K.backend("triton"):
        torch.testing.assert_close(K.tree_attention(q, k, v, end).double(), exact, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    q, k, v = qkv(30, 2, 1, 8)
    with K.backend("reference"):
        expected = K.tree_attention(q, k, v, forest(30), scale=scale)
    with K.backend("triton"):
        torch.testing.assert_close(K.tree_attention(q, k, v, forest(30), scale=scale), expected, atol=3e-6, rtol=1e-5)


def test_strided_views_of_a_fused_projection() -> None:
    fused = torch.randn(40, 8, 16)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    with K.backend("triton"):
        dense = K.tree_attention(q.contiguous(), k.contiguous(), v.contiguous(), forest(40))
        assert torch.equal(K.tree_attention(q, k, v, forest(40)), dense)


DECODE = [case for case in decode_tests.CASES if len(case[0]) < 70]


@pytest.mark.parametrize("split", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", DECODE, ids=lambda c: f"B{len(c[0])}-page{c[2]}-{c[3]}:{c[4]}-D{c[5]}")
def test_decode_matches_float64(case: Any, dtype: torch.dtype, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SPLIT", split)
    lengths, shares, page_size, heads, kv_heads, dim = case
    table, rows, seen, num_pages = paged(lengths, shares, page_size)
    pages = torch.randn(2, num_pages, page_size, kv_heads, dim).to(dtype)
    q = torch.randn(len(lengths), heads, dim).to(dtype)
    plan = K.plan_decode(table, rows, seen, page_size=page_size)
    with K.backend("triton"):
        actual = K.tree_decode(q, *pages, plan)
    with K.backend("reference"):
        plain, exact = K.tree_decode(q, *pages, plan), K.tree_decode(q.double(), *pages.double(), plan)
    assert_within_budget(actual, plain, exact, floor=3e-6 if dtype is torch.float32 else 3e-4)


@pytest.mark.usefixtures("small_tiles")
def test_a_query_does_not_notice_its_batch_within_a_tile_height() -> None:
    """Seven queries, all in narrow tiles: bit for bit the same in any sub-batch, with sharing found or not."""
    with K.backend("triton"):
        decode_tests.assert_no_query_notices_its_batch(1, torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_lengths_grow_in_place_over_many_splits_bit_for_bit() -> None:
    """The captured-graph case: one plan made at 70 tokens, read again at 300, equals a plan made at 300."""
    table, rows, lengths, num_pages = paged([70, 90], [0, 3], 16, spare=20)
    pages, q = torch.randn(2, num_pages + 40, 16, 2, 16), torch.randn(2, 2, 16)
    with K.backend("triton"):
        plan = K.plan_decode(table, rows, lengths)
        K.tree_decode(q, *pages, plan)  # makes the work list
        table[0, 5:20] = torch.arange(num_pages, num_pages + 15)
        lengths[0] = 300
        fresh = K.tree_decode(q, *pages, K.plan_decode(table, rows, lengths))
        assert torch.equal(K.tree_decode(q, *pages, plan), fresh)


def test_the_work_list_of_the_picture() -> None:
    """Splits of 4 pages: three queries share a..d; two of them also e, f, which end inside a split."""
    table = torch.full((3, 12), -1, dtype=torch.int32)
    table[0, :7], table[1, :9] = torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12])
    table[2, :5] = torch.tensor([0, 1, 2, 3, 20])
    rows, lengths = torch.arange(3, dtype=torch.int32), torch.tensor([112, 144, 80], dtype=torch.int32)
    plan = K.plan_decode(table, rows, lengths)
    items, splits = work.cut(plan.items.numpy(), lengths.numpy().astype("int64"), 12, 16, 4)
    assert sorted(items.tolist()) == [[0, 1, 1, 1], [0, 3, 0, 0], [1, 1, 1, 0], [1, 1, 2, 1], [2, 1, 1, 1]]
    assert splits.tolist() == [2, 3, 2]


def some_paths(seed: int, *, most: int, longest: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Page table, rows and lengths of fewer than `most` queries; neighbours share pages, some of them all of them."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, most, (1,), generator=generator))
    lengths = torch.randint(0, longest, (count,), generator=generator).tolist()
    shares = torch.randint(0, shared, (count,), generator=generator).tolist()
    table, rows, seen, _ = paged(lengths, shares, 16)
    for b in range(1, count):
        if torch.rand((), generator=generator) < 0.2:
            rows[b], seen[b] = rows[b - 1], max(int(seen[b - 1]) - 1, 0)
    return table, rows, seen


@pytest.mark.parametrize("seed", range(30))
def test_work_covers_every_query_and_split_once(seed: int) -> None:
    table, rows, seen = some_paths(seed, most=12, longest=400, shared=20)
    count = len(rows)
    plan = K.plan_decode(table, rows, seen)
    on_host = seen.numpy().astype("int64")
    items, splits = work.cut(plan.items.numpy(), on_host, table.shape[1], 16, 4)
    items = work.tiled(items, on_host, 2, 16, 64, 64)
    for b in range(count):
        mine = sorted((s, is_open) for begin, n, s, is_open in items.tolist() if begin <= b < begin + n)
        assert [s for s, _ in mine] == list(range(int(splits[b])))
        assert [is_open for _, is_open in mine] == [0] * (len(mine) - 1) + [1]
        assert int(splits[b]) * 64 >= int(seen[b])
    for begin, n, split, is_open in items.tolist():
        columns = slice(split * 4, None if is_open else split * 4 + 4)
        pages = table[rows[begin : begin + n].long(), columns]
        assert torch.equal(pages, pages[:1].expand_as(pages))
        assert is_open or int((pages < 0).sum()) == 0
    cost = [
        (64 if n * 2 > 16 else 16) * min(max(int(seen[begin]) - split * 64, 0), 64)
        for begin, n, split, _ in items.tolist()
    ]
    assert cost == sorted(cost, reverse=True), "those that take longest come first"


@pytest.mark.skipif(not K.has_compiled(), reason="the compiled module is missing")
@pytest.mark.parametrize("seed", range(30))
def test_the_compiled_work_list_is_that_of_numpy(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows, seen = some_paths(seed, most=60, longest=900, shared=50)
    plan = K.plan_decode(table, rows, seen)
    for split, tiles in ((16, (2, 16, 64)), (64, (1, 16, 16)), (512, (7, 16, 32)), (128, (128, 16, 64))):
        monkeypatch.setattr(configs, "SPLIT", split)
        compiled = work.host_work(plan, *tiles)
        with monkeypatch.context() as patch:
            patch.setattr(work, "native", None)
            plain = work.host_work(plan, *tiles)
        assert compiled.items.tolist() == plain.items.tolist()
        assert compiled.first_slot.tolist() == plain.first_slot.tolist()
        assert compiled.has_wide == plain.has_wide and compiled.split_tokens == plain.split_tokens


@pytest.mark.filterwarnings("error")
def test_a_work_list_is_made_without_a_warning() -> None:
    """What the compiled module returns is read-only, of which torch warns, but once a process."""
    table, rows, lengths, _ = paged([70, 90], [0, 3], 16)
    torch.set_warn_always(True)
    try:
        work.work_list(K.plan_decode(table, rows, lengths), 2, 16, 64)
    finally:
        torch.set_warn_always(False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("chunk", "softcap"), [(1, None), (768 << 20, None), (1, 2.5)], ids=["many-chunks", "one-chunk", "capped"]
)
def test_logprob_and_entropy_match_float64(
    dtype: torch.dtype, chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabulary 131 divides nothing; rows with no, one and many edges, some twice; gradients alone and together."""
    monkeypatch.setattr(gpu_logprob, "_CHUNK_BYTES", chunk)
    hidden, weight, rows, targets = logprob_tests.problem(66, 61, 24, 131)
    rows[:9], targets[:9] = 5, torch.tensor([3, 130, 3, 0, 3, 9, 130, 8, 7])
    hidden, weight = (x.to(dtype) / 2 for x in (hidden, weight))
    g, h = torch.randn(61), torch.randn(66)
    alone = ((1, 0), (0, 1)) if chunk == 1 and softcap is None else ()
    for g_scale, h_scale in (*alone, (1, 1)):
        results = []
        for backend, kind in (("triton", dtype), ("reference", torch.float32), ("reference", torch.float64)):
            leaves = [x.to(kind).requires_grad_() for x in (hidden, weight)]
            with K.backend(backend):
                out = K.linear_logprob(*leaves, rows, targets, temperature=0.7, softcap=softcap)
            loss = (out[0] * g * g_scale).sum() + (out[1] * h * h_scale).sum()
            results.append([*(x.detach() for x in out), *torch.autograd.grad(loss, leaves)])
        for ours, plain, exact in zip(*results, strict=True):
            floor = 1e-5 if dtype is torch.float32 else 2e-3  # gradients are rounded to float16
            assert_within_budget(ours, plain, exact, floor=floor)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("dtype", "chunk", "softcap"),
    [
        (torch.float32, 768 << 20, None),
        (torch.float32, 1, 2.5),
        (torch.float16, 1, None),
        (torch.float16, 768 << 20, 2.5),
    ],
    ids=str,
)
def test_policy_head_matches_float64(
    dtype: torch.dtype, chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_logprob, "_CHUNK_BYTES", chunk)
    hidden, weight, rows, targets = logprob_tests.problem(66, 61, 24, 131)
    inputs, loss = [(x / 2).to(dtype) for x in (hidden, weight)], head_tests.curved_loss(61, 66)
    with K.backend("triton"):
        ours = head_tests.run(K.policy_head, inputs, rows, targets, loss, temperature=0.7, softcap=softcap)
    results = [
        head_tests.run(plain_policy_head, [x.to(kind) for x in inputs], rows, targets, loss, 0.7, softcap)
        for kind in (torch.float32, torch.float64)
    ]
    for mine, plain, exact in zip(ours, *results, strict=True):
        assert_within_budget(mine, plain, exact, floor=1e-5 if dtype is torch.float32 else 2e-3)


@pytest.mark.usefixtures("small_tiles")
def test_a_frozen_input_leaves_the_other_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are rows where only hidden is wanted, else columns: 131 of them, in blocks of 128."""
    monkeypatch.setattr(gpu_logprob, "_CHUNK_BYTES", 1)
    hidden, weight, rows, targets = logprob_tests.problem(70, 90, 24, 131)

    def grads(backend: str, *frozen: str) -> list[Tensor]:
        leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
        wanted = [x.requires_grad_() for name, x in leaves.items() if name not in frozen]
        with K.backend(backend):
            logprob, entropy = K.linear_logprob(**leaves, rows=rows, targets=targets)
        return list(torch.autograd.grad(logprob.sum() + entropy.square().sum(), wanted))

    expected = grads("reference")
    for actual in (grads("triton"), grads("triton", "weight") + grads("triton", "hidden")):
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_policy_head_of_nothing_and_of_frozen_inputs() -> None:
    with K.backend("triton"):
        head_tests.run(
            K.policy_head,
            [torch.randn(0, 8), torch.randn(5, 8)],
            *torch.zeros(2, 0).long(),
            head_tests.curved_loss(0, 0),
        )
        hidden, weight, rows, targets = logprob_tests.problem(5, 9, 8, 7)
        for frozen in (hidden, weight):
            other = weight if frozen is hidden else hidden
            other.requires_grad_()
            K.policy_head(hidden, weight, rows, targets, head_tests.curved_loss(9, 5))[0].backward()
            assert (frozen.grad is None, other.grad is None) == (True, False)
            other.requires_grad_(False).grad = None


@pytest.mark.parametrize("spread", [3e4, 1e30])
def test_probabilities_that_vanish_give_no_nan(spread: float) -> None:
    logprob_tests.test_probabilities_that_vanish_give_no_nan("triton", spread)


def test_logprob_of_nothing() -> None:
    with K.backend("triton"):
        logprob, entropy = K.linear_logprob(torch.randn(0, 8), torch.randn(5, 8), *torch.zeros(2, 0).long())
        assert (logprob.shape, entropy.shape) == ((0,), (0,))
        hidden = torch.randn(3, 8, requires_grad=True)
        K.linear_logprob(hidden, torch.randn(5, 8), *torch.zeros(2, 0).long())[1].sum().backward()
        assert hidden.grad is not None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("parameters", sample_tests.PARAMETERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 64, 100])
def test_sampling_draws_the_tokens_of_the_reference(vocabulary: int, parameters: dict[str, Any]) -> None:
    logits = 3 * torch.randn(3, vocabulary)
    logits[:, ::3] = logits[:, ::3].round()  # ties
    keys = torch.randint(-(2**62), 2**62, (3, 2), generator=torch.Generator().manual_seed(vocabulary))
    results = []
    for backend in ("reference", "triton"):
        with K.backend(backend):
            results.append(K.sample(logits, keys, **parameters))
    assert torch.equal(results[0][0], results[1][0])
    for x, y in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_a_row_does_not_notice_its_batch() -> None:
    logits, keys = torch.randn(4, 100), sample_tests.keys(4)
    with K.backend("triton"):
        together, alone = K.sample(logits, keys, top_p=0.9), K.sample(logits[2:3], keys[2:3], top_p=0.9)
    assert all(torch.equal(x[2:3], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_top_p_keeps_the_shortest_prefix_and_the_first_of_equals() -> None:
    logits, keys = torch.zeros(9, 4), sample_tests.keys(9)
    with K.backend("triton"):
        for parameters, kept in (({"top_p": 0.5}, 2), ({"top_p": 0.51}, 3), ({"top_k": 3, "top_p": 0.4}, 2)):
            assert set(K.sample(logits, keys, **parameters)[0].tolist()) == set(range(kept))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_is_named(bad: float) -> None:
    sample_tests.test_a_row_without_a_distribution_is_named("triton", bad)


@triton.jit
def store_uniform(keys_ptr, out_ptr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    u = gpu_sample._uniform(tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1))
    tl.store(out_ptr + row, u)


def test_the_sampler_uses_philox_bit_for_bit() -> None:
    keys = torch.randint(-(2**62), 2**62, (100, 2), generator=torch.Generator().manual_seed(1))
    keys[0] = 0
    out = torch.empty(100, dtype=torch.float64)
    store_uniform[(100,)](keys, out)
    assert torch.equal(out, uniform(keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 7, 24), (9, 130)], ids=str)
def test_rms_norm_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, d_out = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        with K.backend(backend):
            out = K.rms_norm(*leaves, eps=1e-6)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, d_out.to(kind))])
    for ours, plain, exact in zip(*results, strict=True):
        assert_within_budget(ours, plain, exact, floor=3e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 7, 24), (9, 130)], ids=str)
def test_add_rms_norm_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, d_out, d_total = torch.randn(4, *shape).to(dtype).unbind()
    weight = torch.randn(shape[-1]).to(dtype)
    results = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (x, residual, weight)]
        with K.backend(backend):
            outs = K.add_rms_norm(*leaves, eps=1e-6)
            with torch.no_grad():
                assert all(torch.equal(a, b) for a, b in zip(K.add_rms_norm(*leaves, eps=1e-6), outs, strict=True))
        grads = torch.autograd.grad(outs, leaves, (d_out.to(kind), d_total.to(kind)))
        results.append([*(out.detach() for out in outs), *grads])
    for ours, plain, exact in zip(*results, strict=True):
        assert_within_budget(ours, plain, exact, floor=3e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_rope_silu_and_their_gradients(dtype: torch.dtype) -> None:
    x, up = torch.randn(2, 13, 3, 20).to(dtype).unbind()
    cos, sin = torch.rand(2, 13, 10).unbind()
    for op, inputs in ((lambda a, b: K.rope(a, cos, sin) * b, (x, up)), (K.silu_mul, (x, up))):
        results = []
        for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
            leaves = [t.to(kind).requires_grad_() for t in inputs]
            with K.backend(backend):
                out = op(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        for ours, plain, exact in zip(*results, strict=True):
            assert_within_budget(ours, plain, exact, floor=3e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_rope_append_is_norm_then_rope_then_append(fused: bool, normed: bool) -> None:
    small_tests.test_rope_append_is_norm_then_rope_then_append("triton", fused, normed, torch.float32)


def test_append_kv_writes_the_slots_asked_for_and_no_other() -> None:
    small_tests.test_append_kv_writes_the_slots_asked_for_and_no_other("triton", torch.float32)


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    with K.backend("triton"):
        assert K.silu_mul(x, x).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "shape", [((5,), 1, 1), ((2, 3), 100, 20), ((67,), 40, 70), ((0,), 8, 3), ((3,), 70, 0)], ids=str
)
def test_linear_and_its_gradients_match_float64(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in linear_tests.leaves(*shape, bias=True)]
    plain = [x.clone().requires_grad_() for x in inputs]
    out = torch.nn.functional.linear(*plain)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [out.detach(), *torch.autograd.grad(out, plain, d_out)]
    exact = linear_tests.run("reference", [x.double() for x in inputs], torch.float64)
    floor = 3e-6 if dtype is torch.float32 else 1e-3
    for ours, theirs, float64 in zip(linear_tests.run("triton", inputs, dtype), expected, exact, strict=True):
        assert_within_budget(ours, theirs, float64, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_product_does_not_depend_on_the_rows_that_follow(dtype: torch.dtype) -> None:
    """Any number of rows from the start of a tile: the interpreter's `dot` is numpy's, whose rows know their place."""
    x, weight, bias = (y.to(dtype) for y in linear_tests.leaves((131,), 100, 70, bias=True))
    with K.backend("triton"):
        whole = K.batch_invariant_linear(x, weight, bias)
        for first in (0, 64):
            for size in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 67):
                rows = x[first : first + size]
                assert torch.equal(K.batch_invariant_linear(rows, weight, bias), whole[first : first + size])


def test_keys_are_streamed_through_descriptors_where_each_head_has_memory_of_its_own() -> None:
    """What a descriptor makes of heads, or rows, that are one in memory nobody has tried on a GPU."""
    tiles = Tiles(block_m=32, block_n=32, warps=4, stages=2)
    keys = torch.randn(40, 2, 32)
    for x, streams in ((keys, True), (keys[:, :1].expand(-1, 2, -1), False), (keys[:1].expand(40, -1, -1), False)):
        assert blocks.streamed(keys, x, 32, tiles)[2] is streams


@pytest.mark.parametrize("op", guard_tests.OPS)
def test_defaults_of_torch_do_not_matter(op: str) -> None:
    guard_tests.test_defaults_of_torch_do_not_matter(op, "triton")


@pytest.mark.parametrize("op", compile_tests.DIFFERENTIABLE)
def test_a_gradient_penalty_is_refused_and_not_dropped(op: str) -> None:
    with K.backend("triton"):
        compile_tests.test_a_gradient_penalty_is_refused_and_not_dropped(compile_tests.DIFFERENTIABLE[op], torch.sum)
