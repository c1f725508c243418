"""tree_attention: equal to softmax over each token's own path, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, ISAS, assert_within_budget, forest, on_isa, path_of, qkv
from torch import Tensor

import ibtpo_kernels as K

SHAPES = [  # tokens, query heads, key/value heads, head size
    (0, 2, 1, 8),
    (1, 1, 1, 32),
    (37, 4, 2, 32),
    (257, 7, 1, 40),
    (300, 4, 2, 24),
    (513, 2, 2, 16),
    (190, 3, 3, 80),
    (150, 2, 1, 128),
    (70, 2, 2, 256),
    (97, 1, 1, 5),
]


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, end: Tensor, d_out: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv]"""
    with K.backend(backend):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = K.tree_attention(*leaves, end)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_match_float64(backend: str, shape: tuple[int, int, int, int]) -> None:
    q, k, v = qkv(*shape)
    end, d_out = forest(shape[0]), torch.randn_like(q)
    exact = run("reference", q.double(), k.double(), v.double(), end, d_out.double())
    plain = run("reference", q, k, v, end, d_out)
    for actual, torch_fp32, float64 in zip(run(backend, q, k, v, end, d_out), plain, exact, strict=True):
        assert_within_budget(actual, torch_fp32, float64)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(isa: str) -> None:
    q, k, v = qkv(150, 4, 2, 40)
    end, d_out = forest(150), torch.randn_like(q)
    exact = run("reference", q.double(), k.double(), v.double(), end, d_out.double())
    plain = run("reference", q, k, v, end, d_out)
    with on_isa(isa):
        ours = run("cpu", q, k, v, end, d_out)
    for actual, torch_fp32, float64 in zip(ours, plain, exact, strict=True):
        assert_within_budget(actual, torch_fp32, float64)


def test_reference_gradients_by_finite_differences() -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(9, 4, 2, 3))
    end = torch.tensor([7, 7, 4, 4, 7, 7, 7, 9, 9], dtype=torch.int32)
    with K.backend("reference"):
        assert torch.autograd.gradcheck(lambda *x: K.tree_attention(*x, end), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_causal_attention_over_its_own_path(backend: str) -> None:
    q, k, v = qkv(120, 4, 2, 16)
    end = forest(120)
    with K.backend(backend):
        out = K.tree_attention(q, k, v, end)
    for i in range(0, 120, 7):
        seen = path_of(end, i)
        keys, values = (x[seen].repeat_interleave(2, 1).double() for x in (k, v))
        p = (torch.einsum("hd,lhd->hl", q[i].double(), keys) / 4.0).softmax(-1)
        torch.testing.assert_close(out[i].double(), torch.einsum("hl,lhd->hd", p, values), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swapping_siblings_leaves_every_path_alone(backend: str) -> None:
    """Layout: prompt of 40, branches of 50 and 33 tokens; the same tree with the branches exchanged."""
    prompt, a, b = (list(range(s, e)) for s, e in ((0, 40), (40, 90), (90, 123)))
    order = torch.tensor(prompt + b + a)
    q, k, v = qkv(123, 4, 2, 32)
    first = torch.tensor([123] * 40 + [90] * 50 + [123] * 33, dtype=torch.int32)
    second = torch.tensor([123] * 40 + [73] * 33 + [123] * 50, dtype=torch.int32)
    d_out = torch.randn_like(q)
    here = run(backend, q, k, v, first, d_out)
    there = run(backend, q[order], k[order], v[order], second, d_out[order])
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x[order], y, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_way_fork(backend: str) -> None:
    end = torch.arange(1, 1006, dtype=torch.int32)
    end[:5] = 1005
    q, k, v = qkv(1005, 2, 1, 16)
    d_out = torch.randn_like(q)
    exact = run("reference", q.double(), k.double(), v.double(), end, d_out.double())
    plain = run("reference", q, k, v, end, d_out)
    for actual, torch_fp32, float64 in zip(run(backend, q, k, v, end, d_out), plain, exact, strict=True):
        assert_within_budget(actual, torch_fp32, float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depth_one_returns_the_values(backend: str) -> None:
    q, k, v = qkv(50, 2, 2, 8)
    with K.backend(backend):
        torch.testing.assert_close(K.tree_attention(q, k, v, torch.arange(1, 51, dtype=torch.int32)), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone_equals_its_part_of_all(backend: str, wanted: tuple[bool, ...]) -> None:
    tensors, end = qkv(77, 4, 2, 16), forest(77)
    d_out = torch.randn_like(tensors[0])
    together = run(backend, *tensors, end, d_out)[1:]
    leaves = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    with K.backend(backend):
        (alone,) = torch.autograd.grad(K.tree_attention(*leaves, end), [x for x in leaves if x.requires_grad], d_out)
    assert torch.equal(alone, together[wanted.index(True)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bit_identical_for_any_number_of_threads(backend: str) -> None:
    q, k, v = qkv(700, 4, 2, 32)
    end, d_out = forest(700), torch.randn_like(q)
    torch.set_num_threads(2)
    first, again = (run(backend, q, k, v, end, d_out) for _ in range(2))
    torch.set_num_threads(1)
    serial = run(backend, q, k, v, end, d_out) if backend == "cpu" else first
    for x, y, z in zip(first, again, serial, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend: str) -> None:
    q, k, v = qkv(90, 2, 1, 16)
    out, *grads = run(backend, q * 300, k * 300, v, forest(90), torch.ones_like(q))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_strided_inputs_equal_dense_ones() -> None:
    fused = torch.randn(40, 8, 16)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    end = forest(40)
    dense = K.tree_attention(q.contiguous(), k.contiguous(), v.contiguous(), end)
    assert torch.equal(K.tree_attention(q, k, v, end), dense)


@given(st.integers(1, 200), st.floats(0, 0.6), st.floats(0, 0.3), st.integers(0, 10**6))
def test_any_forest_matches_float64(num_tokens: int, branch: float, root: float, seed: int) -> None:
    end = forest(num_tokens, branch=branch, root=root, seed=seed)
    q, k, v = qkv(num_tokens, 2, 1, 8)
    with K.backend("reference"):
        exact = K.tree_attention(q.double(), k.double(), v.double(), end)
    torch.testing.assert_close(K.tree_attention(q, k, v, end).double(), exact, atol=3e-6, rtol=1e-5)


def test_bfloat16_falls_back_to_the_reference() -> None:
    q, k, v = (x.bfloat16() for x in qkv(20, 2, 1, 8))
    end = forest(20)
    with K.backend("reference"):
        expected = K.tree_attention(q, k, v, end)
    assert torch.equal(K.tree_attention(q, k, v, end), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"q": a["q"][0]}, "q is .* expected a floating-point tensor of 3 dimensions"),
        (lambda a: a | {"k": a["k"][:, :, :4]}, r"k is .*expected \[10, 2, 8\]"),
        (lambda a: a | {"v": a["v"].double()}, "v is torch.float64"),
        (lambda a: a | {"q": a["q"][:, :3]}, "3 query heads must be a multiple of 2"),
        (lambda a: a | {"end": a["end"].long()}, "end is torch.int64"),
        (lambda a: a | {"end": torch.zeros(10, dtype=torch.int32)}, r"end\[0\] = 0; expected an index in \(0, 10\]"),
        (lambda a: a | {"end": torch.full((10,), 11, dtype=torch.int32)}, r"end\[0\] = 11"),
    ],
)
def test_errors_name_the_argument(change, message: str) -> None:  # type: ignore[no-untyped-def]
    q, k, v = qkv(10, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        K.tree_attention(**change({"q": q, "k": k, "v": v, "end": torch.full((10,), 10, dtype=torch.int32)}))
