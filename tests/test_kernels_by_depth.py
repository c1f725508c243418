"""Packed attention in the order of depth has decode's bits, tree_attention's values and its gradient; log-probs of
given tokens have the sampler's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import BACKENDS, ISAS, assert_within_budget, forest, on_isa, path_of, qkv
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels import sampled

PAGE = 16
by_isa = pytest.mark.parametrize("isa", ISAS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def alone(q: Tensor, k: Tensor, v: Tensor, path: list[int]) -> Tensor:
    """[Hq, D]: the last token of a path by decode, its keys and values in pages of its own."""
    n = len(path)
    pages = torch.zeros(2, -(-n // PAGE), PAGE, *k.shape[1:], dtype=q.dtype)
    for rows, x in zip(pages, (k, v), strict=True):
        rows.view(-1, *k.shape[1:])[:n] = x[path]
    table = torch.arange(pages.shape[1], dtype=torch.int32)[None]
    plan = K.plan_decode(table, torch.zeros(1, dtype=torch.int32), torch.tensor([n], dtype=torch.int32))
    return K.tree_decode(q[path[-1]][None], *pages, plan)[0]


@by_dtype
@pytest.mark.parametrize("case", [(1, 2, 2, 8), (16, 4, 2, 8), (150, 4, 1, 24), (331, 6, 2, 20)], ids=str)
@by_isa
def test_every_query_has_the_bits_that_decode_gives_it_alone(
    isa: str, case: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    num, *shape = case
    q, k, v = (x.to(dtype) for x in qkv(num, *shape))
    end = forest(num, branch=0.1)
    with on_isa(isa):
        out = K.tree_attention_by_depth(q, k, v, K.plan_by_depth(end))
        depths = set()
        for i in range(num):
            path = path_of(end, i)
            assert torch.equal(out[i], alone(q, k, v, path)), i
            depths.add(len(path) % PAGE)
    assert num < 100 or len(depths) == PAGE, "every place in a page should have been met"


@by_isa
def test_how_trees_are_packed_cannot_be_seen(isa: str) -> None:
    """A tree alone, and with others before and after it; `tree_attention` itself does see it."""
    end = forest(200, root=0.0, branch=0.06)
    before, after = forest(37, root=0.0), forest(55, root=0.0)
    packed = torch.cat([before, end + 37, after + 237])
    q, k, v = qkv(292, 4, 2, 32)
    mine = slice(37, 237)
    with on_isa(isa):
        together = K.tree_attention_by_depth(q, k, v, K.plan_by_depth(packed))[mine]
        assert torch.equal(together, K.tree_attention_by_depth(q[mine], k[mine], v[mine], K.plan_by_depth(end)))
        plain = K.tree_attention(q, k, v, packed)[mine]
        assert not torch.equal(plain, K.tree_attention(q[mine], k[mine], v[mine], end)), "then this proves nothing"


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_are_those_of_tree_attention(backend: str, page_size: int) -> None:
    end, inputs = forest(120), qkv(120, 4, 2, 12)
    d_out = torch.randn(120, 4, 12)
    with K.backend(backend):
        ours, plain, exact = (_evaluate(inputs, end, d_out, dtype, page) for dtype, page in (
            (torch.float32, page_size), (torch.float32, None), (torch.float64, None)
        ))  # fmt: skip
    assert len(ours) == 4
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_within_budget(x, y, z)
    for gradient, other in zip(ours[1:], plain[1:], strict=True):
        assert torch.equal(gradient, other)


def _evaluate(
    inputs: tuple[Tensor, ...], end: Tensor, d_out: Tensor, dtype: torch.dtype, page_size: int | None
) -> list[Tensor]:
    """[out, dq, dk, dv]; by `tree_attention` without a page size."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    if page_size is None:
        out = K.tree_attention(q, k, v, end)
    else:
        out = K.tree_attention_by_depth(q, k, v, K.plan_by_depth(end, page_size=page_size))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out.to(dtype))]


def test_paths_share_whole_pages_and_copy_the_one_a_fork_cuts() -> None:
    """The picture of the module: q q q q a a a b b in pages of 2."""
    end = torch.tensor([9, 9, 9, 9, 7, 7, 7, 9, 9], dtype=torch.int32)
    layout = K.plan_by_depth(end, page_size=2)
    assert layout.plan.page_table.tolist() == [[0, 1, 2, 3], [0, 1, 4, -1]]
    assert layout.tokens.view(-1, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 6], [7, 8]]
    assert layout.plan.lengths.tolist() == [1, 2, 3, 4, 5, 6, 7, 5, 6]
    assert layout.plan.rows.tolist() == [0] * 7 + [1] * 2
    cut = K.plan_by_depth(torch.tensor([5, 5, 5, 4, 5], dtype=torch.int32), page_size=2)
    assert cut.tokens.view(-1, 2).tolist() == [[0, 1], [2, 3], [2, 4]]
    none = K.plan_by_depth(torch.zeros(0, dtype=torch.int32))
    assert K.tree_attention_by_depth(*qkv(0, 2, 2, 4), none).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("end", "page_size", "message"),
    [
        ([2, 2], 0, "page_size=0 must be at least 1"),
        ([3, 2], 16, r"indices in \(i, 2\]"),
        ([0, 2], 16, r"indices in \(i, 2\]"),
        ([2, 3, 3], 16, "no forest in depth-first order"),
    ],
)
def test_layout_errors_say_what_is_wrong(end: list[int], page_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K.plan_by_depth(torch.tensor(end, dtype=torch.int32), page_size=page_size)
    with pytest.raises(ValueError, match="expected torch.int32"):
        K.plan_by_depth(torch.tensor([1]))


# ---- log-probs of given tokens ---------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("vocabulary", [1, 7, 40, 1000, 5001])
@by_isa
def test_a_given_token_has_the_log_probs_it_was_sampled_with(isa: str, vocabulary: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(50, vocabulary)).to(dtype)
    keys = torch.arange(100).view(50, 2)
    rows = torch.arange(50).flip(0)
    with on_isa(isa):
        for temperature in (1.0, float(np.float32(0.7)), 3.0):
            token, logprob, raw, _ = K.sample(logits, keys, temperature=temperature)
            found = K.sampled_logprob(logits, rows, token[rows], temperature=temperature)
            assert torch.equal(found[0], logprob[rows])
            assert torch.equal(found[1], raw[rows])


@by_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_head_in_chunks_they_are_those_of_linear_logprob(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding; rows without edges and rows with several, in any order; how they are cut changes no bit."""
    hidden, weight = torch.randn(13, 32).to(dtype), torch.randn(50, 32).to(dtype)
    rows, targets = torch.tensor([12, 0, 5, 5, 7, 5]), torch.tensor([3, 49, 0, 1, 2, 0])
    with K.backend(backend):
        whole = K.linear_sampled_logprob(hidden, weight, rows, targets, temperature=0.8)
        monkeypatch.setattr(sampled, "_CHUNK_ELEMENTS", 150)
        parts = K.linear_sampled_logprob(hidden, weight, rows, targets, temperature=0.8)
        for temperature, x, y in zip((0.8, 1.0), whole, parts, strict=True):
            expected, _ = K.linear_logprob(hidden, weight, rows, targets, temperature=temperature)
            assert torch.equal(x, y)
            torch.testing.assert_close(x, expected, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=0)
        empty = K.linear_sampled_logprob(hidden, weight, rows[:0], targets[:0])
    assert whole[0][2] == whole[0][5]
    assert [len(x) for x in empty] == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_errors_name_the_argument(backend: str) -> None:
    logits, index = torch.randn(3, 5), torch.tensor([0])
    with K.backend(backend):
        for arguments, temperature, message in (
            ((logits, index + 3, index), 1.0, "rows spans"),
            ((logits, index, index + 5), 1.0, "targets spans"),
            ((logits, index, index), 0.0, "temperature=0.0 must be greater than 0"),
            ((logits, index.int(), index), 1.0, "rows is torch.int32"),
            ((logits[:, :0], index, index), 1.0, "vocabulary"),
            ((logits * float("nan"), index, index), 1.0, "row 0 has no distribution"),
        ):
            with pytest.raises(ValueError, match=message):
                K.sampled_logprob(*arguments, temperature=temperature)


def test_the_value_of_one_and_the_gradient_of_another() -> None:
    x = torch.randn(5, requires_grad=True)
    value = torch.randn(5, requires_grad=True)
    out = K.with_value_of(3 * x, value)
    assert torch.equal(out, value)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))
    assert value.grad is None
