"""append_kv, rms_norm, add_rms_norm, rope, rope_append, silu_mul, and the choice of a backend."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from kernel_cases import BACKENDS, ISAS, assert_within_budget, on_isa
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import ibtpo_kernels as K

Op = Callable[..., Tensor | tuple[Tensor, Tensor]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def angles(num_tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(num_tokens, dim // 2) * 6
    return x.cos(), x.sin()


def check(backend: str, op: Op, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Values and every gradient within budget of float64, for inputs stored as `dtype`."""
    inputs = tuple(x.to(dtype) for x in inputs)

    def run(name: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        with K.backend(name):
            result = op(*leaves)
            outs = result if isinstance(result, tuple) else (result,)
            generator = torch.Generator().manual_seed(1)
            d_outs = [torch.randn(out.shape, generator=generator).to(dtype).to(kind) for out in outs]
            return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, d_outs, materialize_grads=True)]

    exact, plain = run("reference", torch.float64), run("reference", dtype)
    for actual, torch_plain, float64 in zip(run(backend, dtype), plain, exact, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, torch_plain, float64, floor=3e-6 if dtype is torch.float32 else 1e-4)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 7, 24), (200, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(backend, lambda x, w: K.rms_norm(x, w, eps=1e-6), torch.randn(shape), torch.randn(shape[-1]), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 7, 24), (200, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_rms_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    check(backend, lambda x, r, w: K.add_rms_norm(x, r, w, eps=1e-6), x, residual, weight, dtype=dtype)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_rms_norm_with_the_gradient_of_one_result(backend: str, used: int) -> None:
    check(backend, lambda *inputs: K.add_rms_norm(*inputs, eps=1e-6)[used], *torch.randn(2, 6, 20), torch.randn(20))


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_rms_norm_is_the_sum_and_its_norm(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit, with and without a gradient asked for."""
    x, residual, weight = (torch.randn(9, 37, dtype=dtype, requires_grad=True) for _ in range(3))
    with K.backend(backend):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                normed, total = K.add_rms_norm(x, residual, weight[0], eps=1e-6)
                assert torch.equal(total, x + residual)
                assert torch.equal(normed, K.rms_norm(x + residual, weight[0], eps=1e-6))


@DTYPES
def test_rms_norm_rounds_like_transformers(dtype: torch.dtype) -> None:
    x, norm = torch.randn(9, 64, dtype=dtype), Qwen3RMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data.normal_()
    with K.backend("reference"):
        assert torch.equal(K.rms_norm(x, norm.weight, eps=1e-6), norm(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_rounded_where_the_reference_rounds(backend: str) -> None:
    """The same numbers but for the few whose float32 value lies within rounding of a tie."""
    x, y, weight = torch.randn(64, 3, 70).bfloat16(), torch.randn(64, 3, 70).bfloat16(), torch.randn(70).bfloat16()
    cos, sin = angles(64, 70)
    for op in (
        lambda: K.rms_norm(x, weight, eps=1e-6),
        lambda: K.add_rms_norm(x, y, weight, eps=1e-6)[0],
        lambda: K.silu_mul(4 * x, y),
        lambda: K.rope(x, cos, sin),
    ):
        with K.backend("reference"):
            expected = op()
        with K.backend(backend), torch.no_grad():
            actual = op()
        assert actual.dtype is torch.bfloat16
        assert (actual != expected).double().mean() < 2e-3
        torch.testing.assert_close(actual, expected, atol=0, rtol=2**-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 14, 37, 64])
def test_every_instruction_set(isa: str, size: int) -> None:
    """Sizes below, at and above the width of a vector, in both types."""
    x, y, weight = torch.randn(5, 3, size), torch.randn(5, 3, size), torch.randn(size)
    cos, sin = angles(5, 2 * size)
    for dtype in (torch.float32, torch.bfloat16):
        with on_isa(isa):
            check("cpu", lambda *inputs: K.add_rms_norm(*inputs, eps=1e-6), x, y, weight, dtype=dtype)
            check("cpu", K.silu_mul, x, y, dtype=dtype)
            check("cpu", lambda x: K.rope(x, cos, sin), torch.cat((x, y), -1), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_keeps_what_is_not_finite(backend: str) -> None:
    gate = torch.tensor([torch.nan, torch.inf, 3.4e38, 1.0] * 5, dtype=torch.bfloat16)
    with K.backend(backend):
        out = K.silu_mul(gate, torch.full((20,), 2.0, dtype=torch.bfloat16))
    assert out[::4].isnan().all()
    assert (out[1::4] == torch.inf).all()
    assert (out[2::4] == torch.inf).all()
    assert out[3::4].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 2), (33, 3, 40), (64, 4, 32)], ids=str)
@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
def test_rope(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cos, sin = angles(shape[0], shape[2])
    check(backend, lambda x: K.rope(x, cos, sin), torch.randn(shape), dtype=dtype)


def test_rope_is_that_of_transformers() -> None:
    x, (cos, sin) = torch.randn(12, 3, 16), angles(12, 16)
    wide = [torch.cat((a, a), -1)[None] for a in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *wide)
    torch.testing.assert_close(K.rope(x, cos, sin), expected[0].transpose(0, 1))


@pytest.mark.parametrize("shape", [(0, 3), (7,), (33, 50), (2, 3, 5)], ids=str)
@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_mul(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(backend, K.silu_mul, 4 * torch.randn(shape), torch.randn(shape), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_mul_saturates(backend: str) -> None:
    with K.backend(backend):
        out = K.silu_mul(torch.tensor([-200.0, 0.0, 200.0]), torch.ones(3))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 200.0]), atol=1e-30, rtol=1e-6)


def test_silu_mul_of_the_halves_of_a_fused_projection() -> None:
    fused = torch.randn(9, 46)
    gate, up = fused.chunk(2, -1)
    assert torch.equal(K.silu_mul(gate, up), K.silu_mul(gate.contiguous(), up.contiguous()))


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
def test_append_kv_writes_the_slots_asked_for_and_no_other(backend: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 4, 2, 8, dtype=dtype).unbind()
    before = torch.randn(2, 3, 16, 2, 8, dtype=dtype)
    pages = before.clone()
    with K.backend(backend):
        K.append_kv(k, v, *pages, torch.tensor([17, -1, 0, 47]))
    expected = before.flatten(1, 2).clone()
    expected[0, [17, 0, 47]], expected[1, [17, 0, 47]] = k[[0, 2, 3]], v[[0, 2, 3]]
    assert torch.equal(pages.flatten(1, 2), expected)
    with K.backend(backend), pytest.raises(ValueError, match=r"append_kv: slots.*48"):
        K.append_kv(k, v, *pages, torch.tensor([0, 1, 2, 48]))


@DTYPES
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("fused", [True, False], ids=["view-of-qkv", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_append_is_norm_then_rope_then_append(backend: str, fused: bool, normed: bool, dtype: torch.dtype) -> None:
    qkv = torch.randn(6, 8, 24, dtype=dtype)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (cos, sin), slots = angles(6, 24), torch.tensor([3, 31, -1, 0, 16, 17])
    weights = torch.randn(2, 24, dtype=dtype).unbind() if normed else (None, None)
    pages, expected = torch.zeros(2, 2, 2, 16, 2, 24, dtype=dtype).unbind()
    with K.backend("reference"):
        normed_q = K.rms_norm(q, weights[0], eps=1e-5) if weights[0] is not None else q
        normed_k = K.rms_norm(k, weights[1], eps=1e-5) if weights[1] is not None else k
        K.append_kv(K.rope(normed_k, cos, sin), v, *expected, slots)
        expected_q = K.rope(normed_q, cos, sin)
    with K.backend(backend):
        out = K.rope_append(q, k, v, cos, sin, *pages, slots, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2**-7, "rtol": 2**-7}
    torch.testing.assert_close(out, expected_q, **tolerance)
    torch.testing.assert_close(pages, expected, **tolerance)
    with K.backend(backend), pytest.raises(ValueError, match="slots"):
        K.rope_append(q, k, v, cos, sin, *pages, slots + 1, q_weight=weights[0])


def test_errors_name_the_argument() -> None:
    x, (cos, sin) = torch.randn(4, 2, 8), angles(4, 8)
    with pytest.raises(ValueError, match=r"rope: cos is .* expected .*\[4, 4\]"):
        K.rope(x, cos[:3], sin)
    with pytest.raises(ValueError, match="rope: x is .* expected an even head size"):
        K.rope(x[:, :, :7], cos, sin)
    with pytest.raises(ValueError, match=r"rms_norm: weight is .* expected \[8\]"):
        K.rms_norm(x, torch.ones(7), eps=1e-6)
    with pytest.raises(ValueError, match="add_rms_norm: residual is .* with the dtype and device of x"):
        K.add_rms_norm(x, x.bfloat16(), torch.ones(8), eps=1e-6)
    with pytest.raises(ValueError, match=r"add_rms_norm: weight is .* expected \[8\]"):
        K.add_rms_norm(x, x, torch.ones(9), eps=1e-6)
    with pytest.raises(ValueError, match="silu_mul: up is"):
        K.silu_mul(x, x.double())
    with pytest.raises(ValueError, match="append_kv: slots is torch.int32"):
        K.append_kv(x, x, *torch.zeros(2, 1, 16, 2, 8), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="append_kv: v is"):
        K.append_kv(x, x[:, :1], *torch.zeros(2, 1, 16, 2, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be contiguous"):
        K.append_kv(x, x, *torch.zeros(2, 1, 16, 4, 8)[:, :, :, ::2], torch.zeros(4, dtype=torch.int64))


def test_backends_nest_and_belong_to_their_thread() -> None:
    default = K.active_backend("cpu")
    assert default == BACKENDS[-1]
    seen: list[str] = []
    with K.backend("reference"):
        with K.backend(default):
            assert K.active_backend("cpu") == default
        assert K.active_backend("cpu") == "reference"
        thread = threading.Thread(target=lambda: seen.append(K.active_backend("cpu")))
        thread.start()
        thread.join()
    assert seen == [default]
    assert K.active_backend("cpu") == default


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "not one of 'reference', 'cpu'")],
)
def test_an_unavailable_backend_says_what_is_missing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), K.backend(name):
        pass
