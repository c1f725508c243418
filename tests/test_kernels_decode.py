"""plan_decode and tree_decode: each query equals attention over its own path, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, ISAS, assert_within_budget, forest, on_isa, paged, path_of, qkv
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels.plan import plan_items

CASES = [  # lengths, pages shared with the query before, page size, query heads, key/value heads, head size
    ([1], [0], 16, 4, 2, 32),
    ([40, 60, 20], [0, 2, 1], 16, 4, 2, 32),
    ([100] * 9, [0] + [5] * 8, 16, 7, 1, 40),
    ([33, 64, 65, 200, 16], [0, 2, 2, 4, 0], 16, 8, 8, 64),
    ([7, 12, 3], [0, 1, 0], 5, 2, 2, 24),
    ([20, 30], [0, 1], 8, 3, 1, 200),
    ([90, 91], [0, 2], 32, 2, 1, 128),
    ([50] * 70, [0] + [3] * 69, 16, 2, 2, 16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"B{len(c[0])}-page{c[2]}-{c[3]}:{c[4]}-D{c[5]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_matches_float64(isa: str, dtype: torch.dtype, case: tuple[list[int], list[int], int, int, int, int]) -> None:
    """Every instruction set there is, against scores, softmax and sum as torch ops in the same dtype."""
    lengths, shares, page_size, heads, kv_heads, dim = case
    table, rows, seen, num_pages = paged(lengths, shares, page_size)
    pages = torch.randn(2, num_pages, page_size, kv_heads, dim, dtype=dtype)
    q = torch.randn(len(lengths), heads, dim, dtype=dtype)
    plan = K.plan_decode(table, rows, seen, page_size=page_size)
    with on_isa(isa):
        actual = K.tree_decode(q, *pages, plan)
    with K.backend("reference"):
        exact = K.tree_decode(q.double(), *pages.double(), plan)
    assert actual.dtype == dtype
    assert_within_budget(actual, _plain(q, pages, plan), exact)


def _plain(q: Tensor, pages: Tensor, plan: K.DecodePlan) -> Tensor:
    """Each query alone, in q's dtype throughout."""
    out = []
    for b, length in enumerate(plan.lengths.tolist()):
        columns = plan.page_table[plan.rows[b], : -(-length // plan.page_size)].long()
        k, v = (x[columns].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], 1) for x in pages)
        p = (torch.einsum("hd,lhd->hl", q[b], k) * q.shape[2] ** -0.5).softmax(-1)
        out.append(torch.einsum("hl,lhd->hd", p, v))
    return torch.stack(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_is_a_row_of_packed_attention(backend: str) -> None:
    """Every token of a tree asked as a query against the pages of its own path, page tables built token by token."""
    num_tokens, page_size = 120, 4
    end = forest(num_tokens, root=0.0)
    q, k, v = qkv(num_tokens, 4, 2, 16)
    paths = [path_of(end, i) for i in range(num_tokens)]
    width = max(len(p) for p in paths)
    table = torch.full((num_tokens, -(-width // page_size)), -1, dtype=torch.int32)
    k_pages, v_pages = torch.full((2, num_tokens * table.shape[1], page_size, 2, 16), torch.nan).unbind()
    for i, path in enumerate(paths):
        for column in range(-(-len(path) // page_size)):
            page = i * table.shape[1] + column
            tokens = path[column * page_size : (column + 1) * page_size]
            table[i, column] = page
            k_pages[page, : len(tokens)], v_pages[page, : len(tokens)] = k[tokens], v[tokens]
    lengths = torch.tensor([len(p) for p in paths], dtype=torch.int32)
    with K.backend(backend):
        plan = K.plan_decode(table, torch.arange(num_tokens, dtype=torch.int32), lengths, page_size=page_size)
        torch.testing.assert_close(
            K.tree_decode(q, k_pages, v_pages, plan), K.tree_attention(q, k, v, end), atol=3e-6, rtol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_prefill_is_packed_attention(backend: str) -> None:
    """A chunk of 50 queries on one path after a cached prefix of 37, against a chain of 87."""
    q, k, v = qkv(87, 4, 2, 32)
    pages = torch.full((2, 6, 16, 2, 32), torch.nan)
    slots = torch.arange(87)
    with K.backend(backend):
        K.append_kv(k, v, *pages, slots)
        lengths = torch.arange(38, 88, dtype=torch.int32)
        table = torch.arange(6, dtype=torch.int32)[None]
        plan = K.plan_decode(table, torch.zeros(50, dtype=torch.int32), lengths)
        assert plan.items.tolist() == [[0, 50, 0, 6]]
        expected = K.tree_attention(q, k, v, torch.full((87,), 87, dtype=torch.int32))[37:]
        torch.testing.assert_close(K.tree_decode(q[37:], *pages, plan), expected, atol=3e-6, rtol=1e-5)


def assert_no_query_notices_its_batch(group: int, dtype: torch.dtype) -> None:
    """Bit for bit the same alone, in any sub-batch, with sharing found or not, on one thread or two."""
    lengths = [200, 210, 190, 64, 64, 17, 300]
    table, rows, seen, num_pages = paged(lengths, [0, 9, 10, 3, 4, 1, 0], 16)
    pages, q = 3 * torch.randn(2, num_pages, 16, 2, 32, dtype=dtype), torch.randn(7, 2 * group, 32, dtype=dtype)
    together = K.tree_decode(q, *pages, K.plan_decode(table, rows, seen))
    for chosen in ([0], [5], [6, 1], [2, 3, 4], [6, 5, 4, 3, 2, 1, 0]):
        index = torch.tensor(chosen)
        plan = K.plan_decode(table, rows[index], seen[index])
        assert torch.equal(K.tree_decode(q[index], *pages, plan), together[index])
    torch.set_num_threads(2)
    assert torch.equal(K.tree_decode(q, *pages, K.plan_decode(table, rows, seen)), together)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_a_query_does_not_notice_its_batch(isa: str, dtype: torch.dtype, group: int) -> None:
    with on_isa(isa):
        assert_no_query_notices_its_batch(group, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_may_grow_without_a_new_plan(backend: str) -> None:
    table, rows, lengths, num_pages = paged([30, 20], [0, 1], 16, spare=3)
    plan = K.plan_decode(table, rows, lengths)
    pages, q = torch.randn(2, num_pages + 1, 16, 2, 16), torch.randn(2, 2, 16)
    lengths[0] = 45
    table[0, 2] = num_pages
    with K.backend(backend):
        fresh = K.tree_decode(q, *pages, K.plan_decode(table, rows, lengths))
        assert torch.equal(K.tree_decode(q, *pages, plan), fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_length_zero_or_without_heads_and_empty_batches(backend: str) -> None:
    table = torch.zeros(1, 2, dtype=torch.int32)
    pages = torch.randn(2, 1, 16, 1, 8)
    with K.backend(backend):
        none = torch.zeros(1, dtype=torch.int32)
        out = K.tree_decode(torch.randn(1, 2, 8), *pages, K.plan_decode(table, none, none))
        assert torch.equal(out, torch.zeros(1, 2, 8))
        empty = K.plan_decode(table, none[:0], none[:0])
        assert K.tree_decode(torch.randn(0, 2, 8), *pages, empty).shape == (0, 2, 8)
        assert K.tree_decode(torch.randn(1, 0, 8), *pages, K.plan_decode(table, none, none)).shape == (1, 0, 8)


def test_the_plan_of_the_picture() -> None:
    table = torch.tensor([[7, 3, 5, -1], [7, 3, 9, 2], [7, 4, -1, -1]], dtype=torch.int32)
    rows, lengths = torch.arange(3, dtype=torch.int32), torch.tensor([40, 60, 20], dtype=torch.int32)
    expected = [[0, 3, 0, 1], [0, 2, 1, 2], [0, 1, 2, 4], [1, 2, 2, 4], [2, 3, 1, 4]]
    for backend in BACKENDS:
        with K.backend(backend):
            assert K.plan_decode(table, rows, lengths).items.tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 6), st.booleans()), max_size=12))
def test_plans_cover_every_page_once_in_depth_order_and_backends_agree(
    queries: list[tuple[int, int, bool]],
) -> None:
    table, rows, lengths, _ = paged([q[0] for q in queries], [q[1] for q in queries], 16)
    for b, (_, _, repeat) in enumerate(queries):  # some neighbours ask for the same path
        if b and repeat:
            rows[b], lengths[b] = rows[b - 1], lengths[b - 1]
    items = K.plan_decode(table, rows, lengths).items
    assert items.tolist() == plan_items(table.numpy(), rows.numpy(), lengths.numpy(), 16).tolist()
    for b in range(len(queries)):
        mine = [(first, last) for begin, end, first, last in items.tolist() if begin <= b < end]
        assert [c for first, last in mine for c in range(first, last)] == list(range(table.shape[1]))
    for begin, end, first, last in items.tolist():
        same = table[rows[begin:end].long(), first:last]
        assert torch.equal(same, same[:1].expand_as(same))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_page_is_an_error(backend: str) -> None:
    table = torch.tensor([[0, -1]], dtype=torch.int32)
    pages, lengths = torch.randn(2, 1, 16, 1, 8), torch.tensor([20], dtype=torch.int32)
    with K.backend(backend):
        plan = K.plan_decode(table, torch.zeros(1, dtype=torch.int32), lengths)
        with pytest.raises(ValueError, match="query 0 of length 20 needs a page that table row 0 lacks"):
            K.tree_decode(torch.randn(1, 1, 8), *pages, plan)
        table[0, 1] = 99
        with pytest.raises(ValueError, match="needs a page"):
            K.tree_decode(torch.randn(1, 1, 8), *pages, plan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_errors_name_the_argument(backend: str) -> None:
    table, zero = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with K.backend(backend):
        with pytest.raises(ValueError, match="plan_decode: .*row"):
            K.plan_decode(table, zero + 2, zero)
        with pytest.raises(ValueError, match="plan_decode: .*length"):
            K.plan_decode(table, zero, zero + 49)
        with pytest.raises(ValueError, match="page_table is torch.int64"):
            K.plan_decode(table.long(), zero, zero)
        with pytest.raises(ValueError, match="page_size=0"):
            K.plan_decode(table, zero, zero, page_size=0)
        plan = K.plan_decode(table, zero, zero + 3)
        with pytest.raises(ValueError, match="the plan has pages of 16 slots, k_pages of 8"):
            K.tree_decode(torch.randn(1, 1, 8), *torch.randn(2, 1, 8, 1, 8), plan)
        with pytest.raises(ValueError, match="1 queries on cpu, as the plan has"):
            K.tree_decode(torch.randn(2, 1, 8), *torch.randn(2, 1, 16, 1, 8), plan)
