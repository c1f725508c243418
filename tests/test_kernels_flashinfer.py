"""Backend "flashinfer": the arrays we hand over, run by a plain-torch account of what FlashInfer does with them.

`Emulated` is written from FlashInfer's documentation and headers (cascade.cuh, page.cuh): attention by request without
a mask, an empty request gives zeros and a log-sum-exp of minus infinity, log-sum-exp to base 2, and levels merged in
place into the last one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import paged
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels import flashinfer_backend
from ibtpo_kernels.cascade import levels

Pages = tuple[Tensor, Tensor]


def level_state(q: Tensor, pages: Pages, arrays: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, D], base-2 log-sum-exp [B, Hq]) of one level."""
    qo_indptr, kv_indptr, kv_indices, last_page_len = (x.tolist() for x in arrays)
    assert qo_indptr[0] == kv_indptr[0] == 0 and qo_indptr[-1] == len(q) and kv_indptr[-1] == len(kv_indices)
    page_size, group = pages[0].shape[1], q.shape[1] // pages[0].shape[2]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=q.dtype)
    for i, last in enumerate(last_page_len):
        ours, theirs = slice(qo_indptr[i], qo_indptr[i + 1]), kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        if not theirs:
            continue
        assert 1 <= last <= page_size
        seen = (len(theirs) - 1) * page_size + last
        k, v = (x[theirs].flatten(0, 1)[:seen].repeat_interleave(group, 1) for x in pages)
        scores = torch.einsum("bhd,lhd->bhl", q[ours], k) * scale
        out[ours] = torch.einsum("bhl,lhd->bhd", scores.softmax(-1), v)
        lse[ours] = scores.logsumexp(-1) / math.log(2)
    return out, lse


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(lse, other_lse)
    base = torch.where(top.isinf(), 0.0, top)
    a, b = torch.exp2(lse - base), torch.exp2(other_lse - base)
    total = a + b
    safe = torch.where(total == 0, 1.0, total)[..., None]
    return (out * a[..., None] + other * b[..., None]) / safe, total.log2() + base


class Emulated:
    """The two wrappers, with FlashInfer's signatures as far as they are used; counts its plans."""

    plans = 0

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels

    def plan_cascade(
        self,
        qo: list[Tensor],
        indptr: list[Tensor],
        indices: list[Tensor],
        last: list[Tensor],
        *sizes: int,
        **more: Any,
    ) -> None:
        assert len(qo) == self.num_levels
        self.arrays, self.scale = list(zip(qo, indptr, indices, last, strict=True)), more["sm_scale"]
        Emulated.plans += 1

    def plan_decode(self, indptr: Tensor, indices: Tensor, last: Tensor, *sizes: int, **more: Any) -> None:
        every = torch.arange(len(last) + 1)
        self.plan_cascade([every], [indptr], [indices], [last], *sizes, **more)

    def run(self, q: Tensor, pages: Pages) -> Tensor:
        wide = q.double(), (pages[0].double(), pages[1].double())
        *upper, last = (level_state(*wide, arrays, self.scale) for arrays in self.arrays)
        for other in upper:
            last = merged(*last, *other)
        return last[0].to(q.dtype)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashInfer's module replaced by the emulation, on the CPU."""

    def cascade(num_levels: int, workspace: Tensor, layout: str) -> Emulated:
        made = Emulated(num_levels)
        made.plan = made.plan_cascade  # type: ignore[attr-defined]
        return made

    def decode(workspace: Tensor, layout: str, use_tensor_cores: bool) -> Emulated:
        made = Emulated(1)
        made.plan = made.plan_decode  # type: ignore[attr-defined]
        return made

    module = SimpleNamespace(MultiLevelCascadeAttentionWrapper=cascade, BatchDecodeWithPagedKVCacheWrapper=decode)
    monkeypatch.setattr(flashinfer_backend, "import_module", lambda name: module)
    monkeypatch.setattr(flashinfer_backend, "_WORKSPACE_BYTES", 16)
    monkeypatch.setattr(flashinfer_backend, "_WRAPPERS", {})
    monkeypatch.setattr(Emulated, "plans", 0)
    yield


CASES = [  # lengths, pages shared with the query before, query heads, key/value heads
    ([40, 60, 20], [0, 2, 1], 4, 2),
    ([100] * 9, [0] + [5] * 8, 7, 1),
    ([33, 64, 65, 200, 16], [0, 2, 2, 4, 0], 8, 8),
    ([0, 1, 16, 17, 0], [0, 0, 1, 1, 0], 2, 1),
    ([50, 60, 70], [0, 0, 0], 4, 2),
    ([96, 96, 96, 96, 96, 96], [0, 1, 2, 3, 4, 5], 2, 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[0])))
def test_decode_is_that_of_the_reference(emulated: None, case: tuple[list[int], list[int], int, int]) -> None:
    lengths, shares, heads, kv_heads = case
    table, rows, seen, num_pages = paged(lengths, shares, 16)
    pages, q = torch.randn(2, num_pages, 16, kv_heads, 64).double(), torch.randn(len(lengths), heads, 64).double()
    plan = K.plan_decode(table, rows, seen)
    expected = K.tree_decode(q, *pages, plan)
    actual = flashinfer_backend.tree_decode(q, *pages, plan, 64**-0.5)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=200)
@given(
    queries=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 12), st.booleans()), min_size=1, max_size=12),
    max_levels=st.integers(1, 6),
)
def test_levels_have_every_key_of_every_query_once(queries: list[tuple[int, int, bool]], max_levels: int) -> None:
    """For any tree and number of levels; a chunk of queries on one path shares only pages that all of it is past."""
    table, rows, lengths, _ = paged([q[0] for q in queries], [q[1] for q in queries], 16)
    for b, (_, _, repeat) in enumerate(queries):
        if b and repeat:
            rows[b], lengths[b] = rows[b - 1], max(int(lengths[b - 1]) - 1, 0)
    items = K.plan_decode(table, rows, lengths).items.numpy()
    found = levels(items, table.numpy(), rows.numpy(), lengths.numpy(), 16, max_levels)
    assert 1 <= len(found) <= max_levels
    seen: list[list[int]] = [[] for _ in queries]
    for at, level in enumerate(found):
        assert level.qo_indptr[0] == 0 and level.qo_indptr[-1] == len(queries)
        sizes = np.diff(level.qo_indptr.numpy())
        assert (sizes > 0).all() and len(sizes) == len(level.last_page_len) == len(level.kv_indptr) - 1
        assert at < len(found) - 1 or (sizes == 1).all(), "the last level is each query's own"
        for i, last in enumerate(level.last_page_len.tolist()):
            mine = level.kv_indices[level.kv_indptr[i] : level.kv_indptr[i + 1]].tolist()
            keys = [page * 16 + offset for page in mine for offset in range(16)]
            for b in range(int(level.qo_indptr[i]), int(level.qo_indptr[i + 1])):
                seen[b] += keys[: len(keys) - 16 + last] if mine else []
    for b, keys in enumerate(seen):
        path = [int(page) * 16 + offset for page in table[rows[b]].tolist() for offset in range(16)]
        assert sorted(keys) == sorted(path[: int(lengths[b])])


def test_the_levels_of_the_picture() -> None:
    table = torch.tensor([[7, 3, 5, -1], [7, 3, 9, 2], [7, 4, -1, -1]], dtype=torch.int32)
    rows, lengths = torch.arange(3, dtype=torch.int32), torch.tensor([40, 60, 20], dtype=torch.int32)
    items = K.plan_decode(table, rows, lengths).items
    found = levels(items.numpy(), table.numpy(), rows.numpy(), lengths.numpy(), 16)
    assert [x.qo_indptr.tolist() for x in found] == [[0, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert [x.kv_indptr.tolist() for x in found] == [[0, 1], [0, 1, 1], [0, 1, 3, 4]]
    assert [x.kv_indices.tolist() for x in found] == [[7], [3], [5, 9, 2, 4]]
    assert [x.last_page_len.tolist() for x in found] == [[16], [16, 0], [8, 12, 4]]


def test_layers_plan_once_a_step(emulated: None) -> None:
    """Growth in place plans anew, and so does anything in inference mode, where growth cannot be seen."""
    table, rows, lengths, num_pages = paged([30, 20], [0, 1], 16)
    pages, q = torch.randn(2, num_pages, 16, 2, 64), torch.randn(2, 2, 64)
    plan = K.plan_decode(table, rows, lengths)
    for _ in range(3):
        flashinfer_backend.tree_decode(q, *pages, plan, 0.1)
    assert Emulated.plans == 1
    lengths += 1
    grown = flashinfer_backend.tree_decode(q, *pages, plan, 0.1)
    assert Emulated.plans == 2
    torch.testing.assert_close(grown, K.tree_decode(q, *pages, plan, scale=0.1))
    with torch.inference_mode():
        plan = K.plan_decode(table, rows, lengths.clone())
        for length in (31, 32):
            plan.lengths[0] = length
            out = flashinfer_backend.tree_decode(q, *pages, plan, 0.1)
            torch.testing.assert_close(out, K.tree_decode(q, *pages, plan, scale=0.1))


def test_a_missing_page_is_an_error(emulated: None) -> None:
    table = torch.tensor([[0, -1]], dtype=torch.int32)
    pages, lengths = torch.randn(2, 1, 16, 1, 64), torch.tensor([20], dtype=torch.int32)
    plan = K.plan_decode(table, torch.zeros(1, dtype=torch.int32), lengths)
    for page in (-1, 99):
        table[0, 1] = page
        with pytest.raises(ValueError, match="query 0 needs a page"):
            flashinfer_backend.tree_decode(torch.randn(1, 1, 64), *pages, plan, 0.1)
    lengths[0] = 33
    with pytest.raises(ValueError, match="query 0 of length 33 needs a page that table row 0 lacks"):
        flashinfer_backend.tree_decode(torch.randn(1, 1, 64), *pages, plan, 0.1)


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibtpo_kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"FlashInfer is missing; install ibtpo\[gpu\]"), K.backend("flashinfer"):
        pass
    monkeypatch.setattr("ibtpo_kernels.dispatch.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no CUDA device"), K.backend("flashinfer"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with K.backend("flashinfer"), pytest.raises(ValueError, match="was given a tensor on cpu; move it to a GPU"):
        K.silu_mul(torch.ones(3), torch.ones(3))


def test_every_other_op_is_that_of_triton() -> None:
    other = flashinfer_backend.fallback()
    for name in ("plan_decode", "tree_attention", "sample", "append_kv", "linear_logprob"):
        assert getattr(flashinfer_backend, name) is getattr(other, name)
    with pytest.raises(AttributeError):
        _ = flashinfer_backend.no_such_op


def test_the_installed_flashinfer_takes_these_arguments() -> None:
    """What the emulation assumes of the signatures."""
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is optional")
    cascade, decode = flashinfer.MultiLevelCascadeAttentionWrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    inspect.signature(cascade).bind(2, None, "NHD")
    inspect.signature(decode).bind(None, "NHD", use_tensor_cores=True)
    dtypes = {"sm_scale": 1.0, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    inspect.signature(cascade.plan).bind(None, [], [], [], [], 4, 2, 64, 16, **dtypes)
    inspect.signature(decode.plan).bind(None, None, None, None, 4, 2, 64, 16, **dtypes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[0])))
def test_on_a_gpu(case: tuple[list[int], list[int], int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("flashinfer", reason="FlashInfer is optional")
    lengths, shares, heads, kv_heads = case
    table, rows, seen, num_pages = (x.cuda() if isinstance(x, Tensor) else x for x in paged(lengths, shares, 16))
    pages = torch.randn(2, num_pages, 16, kv_heads, 64, device="cuda", dtype=dtype)
    q = torch.randn(len(lengths), heads, 64, device="cuda", dtype=dtype)
    plan = K.plan_decode(table, rows, seen)
    with K.backend("reference"):
        exact, plain = K.tree_decode(q.double(), *pages.double(), plan), K.tree_decode(q, *pages, plan)
    with K.backend("flashinfer"):
        actual = K.tree_decode(q, *pages, plan)
    error, theirs = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    assert error <= 2 * theirs + torch.finfo(dtype).eps
