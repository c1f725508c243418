"""append_kv, rms_norm, rope, rope_append, silu_mul, and the choice of a backend."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from kernel_cases import BACKENDS, assert_within_budget
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import ibtpo_kernels as K

Op = Callable[..., Tensor]


def angles(num_tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(num_tokens, dim // 2) * 6
    return x.cos(), x.sin()


def check(backend: str, op: Op, *inputs: Tensor) -> None:
    """Value and every gradient within budget of float64."""

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with K.backend(name):
            out = op(*leaves)
            d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    exact, plain = run("reference", torch.float64), run("reference", torch.float32)
    for actual, torch_fp32, float64 in zip(run(backend, torch.float32), plain, exact, strict=True):
        assert_within_budget(actual, torch_fp32, float64)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 7, 24), (200, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm(backend: str, shape: tuple[int, ...]) -> None:
    check(backend, lambda x, w: K.rms_norm(x, w, eps=1e-6), torch.randn(shape), torch.randn(shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_like_transformers(dtype: torch.dtype) -> None:
    x, norm = torch.randn(9, 64, dtype=dtype), Qwen3RMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data.normal_()
    with K.backend("reference"):
        assert torch.equal(K.rms_norm(x, norm.weight, eps=1e-6), norm(x))


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 2), (33, 3, 40), (64, 4, 32)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rope(backend: str, shape: tuple[int, int, int]) -> None:
    cos, sin = angles(shape[0], shape[2])
    check(backend, lambda x: K.rope(x, cos, sin), torch.randn(shape))


def test_rope_is_that_of_transformers() -> None:
    x, (cos, sin) = torch.randn(12, 3, 16), angles(12, 16)
    wide = [torch.cat((a, a), -1)[None] for a in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *wide)
    torch.testing.assert_close(K.rope(x, cos, sin), expected[0].transpose(0, 1))


@pytest.mark.parametrize("shape", [(0, 3), (7,), (33, 50), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_mul(backend: str, shape: tuple[int, ...]) -> None:
    check(backend, K.silu_mul, 4 * torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_mul_saturates(backend: str) -> None:
    with K.backend(backend):
        out = K.silu_mul(torch.tensor([-200.0, 0.0, 200.0]), torch.ones(3))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 200.0]), atol=1e-30, rtol=1e-6)


def test_silu_mul_of_the_halves_of_a_fused_projection() -> None:
    fused = torch.randn(9, 46)
    gate, up = fused.chunk(2, -1)
    assert torch.equal(K.silu_mul(gate, up), K.silu_mul(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_kv_writes_the_slots_asked_for_and_no_other(backend: str) -> None:
    k, v = torch.randn(2, 4, 2, 8).unbind()
    before = torch.randn(2, 3, 16, 2, 8)
    pages = before.clone()
    with K.backend(backend):
        K.append_kv(k, v, *pages, torch.tensor([17, -1, 0, 47]))
    expected = before.flatten(1, 2).clone()
    expected[0, [17, 0, 47]], expected[1, [17, 0, 47]] = k[[0, 2, 3]], v[[0, 2, 3]]
    assert torch.equal(pages.flatten(1, 2), expected)
    with K.backend(backend), pytest.raises(ValueError, match=r"append_kv: slots.*48"):
        K.append_kv(k, v, *pages, torch.tensor([0, 1, 2, 48]))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("fused", [True, False], ids=["view-of-qkv", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_append_is_norm_then_rope_then_append(backend: str, fused: bool, normed: bool) -> None:
    qkv = torch.randn(6, 8, 24)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (cos, sin), slots = angles(6, 24), torch.tensor([3, 31, -1, 0, 16, 17])
    weights = torch.randn(2, 24).unbind() if normed else (None, None)
    pages, expected = torch.zeros(2, 2, 2, 16, 2, 24).unbind()
    with K.backend("reference"):
        normed_q = K.rms_norm(q, weights[0], eps=1e-5) if weights[0] is not None else q
        normed_k = K.rms_norm(k, weights[1], eps=1e-5) if weights[1] is not None else k
        K.append_kv(K.rope(normed_k, cos, sin), v, *expected, slots)
        expected_q = K.rope(normed_q, cos, sin)
    with K.backend(backend):
        out = K.rope_append(q, k, v, cos, sin, *pages, slots, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    torch.testing.assert_close(out, expected_q, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pages, expected, atol=2e-6, rtol=1e-5)
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
