"""batch_invariant_linear: right to rounding, and a row's bits do not depend on the rest of the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BACKENDS, ISAS, assert_within_budget, on_isa
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels import cpu, fastest, linear

SHAPES = [  # leading shape of x, K, N
    ((1,), 96, 256),
    ((5,), 1, 1),
    ((7,), 37, 5),
    ((2, 3), 24, 20),
    ((), 40, 12),
    ((67,), 100, 67),
    ((130,), 256, 9),
    ((0,), 8, 3),
    ((3,), 8, 0),
]


def leaves(shape: tuple[int, ...], depth: int, num_cols: int, *, bias: bool) -> list[Tensor]:
    inputs = [torch.randn(*shape, depth), torch.randn(num_cols, depth)]
    return [*inputs, torch.randn(num_cols)] if bias else inputs


def run(backend: str, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[out, gradient of each input]."""
    variables = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with K.backend(backend):
        out = K.batch_invariant_linear(*variables)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, variables, d_out)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_match_float64(backend: str, case: tuple[tuple[int, ...], int, int], bias: bool) -> None:
    inputs = leaves(*case, bias=bias)
    exact = [x.double().requires_grad_() for x in inputs]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    expected = []
    for variables in (exact, plain):
        out = F.linear(*variables)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        expected.append([out.detach(), *torch.autograd.grad(out, variables, d_out)])
    for actual, float64, torch_fp32 in zip(run(backend, inputs, torch.float32), *expected, strict=True):
        assert actual.shape == float64.shape
        assert_within_budget(actual, torch_fp32, float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(backend: str) -> None:
    inputs = [x.bfloat16() for x in leaves((2, 9), 33, 17, bias=True)]
    with K.backend(backend):
        actual = K.batch_invariant_linear(*inputs)
        assert torch.equal(K.batch_invariant_linear(inputs[0][1, 3], *inputs[1:]), actual[1, 3])
    exact = F.linear(*(x.double() for x in inputs))
    torch.testing.assert_close(actual, exact.bfloat16(), atol=1e-6, rtol=2**-7)
    grads = run(backend, inputs, torch.bfloat16)[1:]
    assert [x.dtype for x in grads] == [torch.bfloat16] * 3


def assert_rows_are_alone(depth: int, num_cols: int, dtype: torch.dtype) -> None:
    """Batches of 1 to 67 rows, beginning anywhere, dense and strided."""
    x, weight, bias = (y.to(dtype) for y in leaves((67,), depth, num_cols, bias=True))
    alone = torch.stack([K.batch_invariant_linear(row, weight, bias) for row in x])
    for size in range(1, 68):
        first = (5 * size) % (68 - size)
        rows = x[first : first + size]
        assert torch.equal(K.batch_invariant_linear(rows, weight, bias), alone[first : first + size])
    assert torch.equal(K.batch_invariant_linear(x.T.contiguous().T, weight, bias), alone)
    trained = K.batch_invariant_linear(x.view(67, 1, depth), weight.clone().requires_grad_(), bias)
    assert torch.equal(trained[:, 0], alone)


DEPTHS = pytest.mark.parametrize(("depth", "num_cols"), [(96, 256), (256, 96), (37, 21), (1024, 130)])


@DEPTHS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_has_the_same_bits_in_every_batch(backend: str, depth: int, num_cols: int) -> None:
    with K.backend(backend):
        assert_rows_are_alone(depth, num_cols, torch.float32)


@DEPTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_so_it_has_on_every_instruction_set(isa: str, dtype: torch.dtype, depth: int, num_cols: int) -> None:
    with on_isa(isa):
        assert_rows_are_alone(depth, num_cols, dtype)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_rounded_once(isa: str, case: tuple[tuple[int, ...], int, int]) -> None:
    """From sums in float32, as close to float64 as a library's product of bfloat16."""
    inputs = [y.bfloat16() for y in leaves(*case, bias=True)]
    with on_isa(isa):
        actual = K.batch_invariant_linear(*inputs)
    assert actual.dtype == torch.bfloat16
    plain, exact = (F.linear(*(y.to(t) for y in inputs)) for t in (torch.bfloat16, torch.float64))
    assert_within_budget(actual, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_columns_and_threads_cannot_be_seen(isa: str, dtype: torch.dtype) -> None:
    """Any slice of the weight, on one thread and on three."""
    x, weight = (y.to(dtype) for y in leaves((200,), 333, 150, bias=False))
    threads = torch.get_num_threads()
    try:
        with on_isa(isa):
            torch.set_num_threads(1)
            whole = K.batch_invariant_linear(x, weight)
            for first, last in ((0, 1), (3, 70), (64, 150), (149, 150)):
                assert torch.equal(K.batch_invariant_linear(x, weight[first:last]), whole[:, first:last])
            torch.set_num_threads(3)
            assert torch.equal(K.batch_invariant_linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sum_is_the_bias(backend: str) -> None:
    bias = torch.randn(4)
    with K.backend(backend):
        out = K.batch_invariant_linear(torch.randn(3, 0), torch.randn(4, 0), bias)
    assert torch.equal(out, bias.expand(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend: str) -> None:
    x, weight, bias = leaves((6,), 9, 4, bias=True)
    with K.backend(backend):
        for wanted in range(3):
            inputs = [y.clone().requires_grad_(i == wanted) for i, y in enumerate((x, weight, bias))]
            K.batch_invariant_linear(*inputs).sum().backward()
            assert [y.grad is not None for y in inputs] == [i == wanted for i in range(3)]


@pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_where_torch_is_slow_bfloat16_is_multiplied_by_us(
    case: tuple[tuple[int, ...], int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward by the compiled kernel, backward in float32; as close to float64 as torch's own products."""
    monkeypatch.setattr(linear, "_bf16_is_slow", lambda: True)
    inputs = leaves(*case, bias=True)
    found = []
    for dtype, product in ((torch.bfloat16, K.fastest_linear), (torch.bfloat16, F.linear), (torch.float64, F.linear)):
        variables = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        with K.backend("cpu"):
            out = product(*variables)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        found.append([out.detach(), *torch.autograd.grad(out, variables, d_out)])
    for actual, plain, exact in zip(*found, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_within_budget(actual, plain, exact)
    with K.backend("cpu"):
        assert torch.equal(found[0][0], K.batch_invariant_linear(*(x.bfloat16() for x in inputs)))


def test_elsewhere_a_linear_layer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []
    monkeypatch.setattr(fastest, "batch_invariant_linear", lambda x, *rest: used.append(x.dtype))
    inputs = leaves((6,), 9, 4, bias=True)
    for slow in (True, False):
        monkeypatch.setattr(linear, "_bf16_is_slow", lambda slow=slow: slow)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            variables = [x.to(dtype) for x in inputs]
            with K.backend("reference"):
                assert torch.equal(K.fastest_linear(*variables), F.linear(*variables))
            if not (slow and dtype is torch.bfloat16):
                assert torch.equal(K.fastest_linear(*variables), F.linear(*variables))
    assert used == []


@pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4", "v4bf16", "v4amx"])
def test_few_rows_of_a_large_weight_are_multiplied_by_us(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_bf16_is_slow", lambda: False)
    if isa != cpu.native.isa():
        monkeypatch.setattr(fastest.cpu, "native", SimpleNamespace(isa=lambda: isa))
    weight, small = torch.randn(256, 640), torch.randn(64, 640)  # more and less than LEAST_WEIGHTS in float32
    in_float, in_half = isa != "baseline", isa in ("v4", "v4bf16")
    cases = [(1, weight, in_float), (128, weight, in_float), (5, weight.bfloat16(), in_half)]
    cases += [(0, weight, False), (129, weight, False), (5, small, False), (5, small.bfloat16(), in_half)]
    cases += [(5, small[:4].bfloat16(), False), (5, weight.double(), False)]
    for rows, w, ours in cases:
        x = torch.randn(rows, 640).to(w.dtype)
        assert K.ours_is_faster(x, w) is ours, (rows, w.shape, w.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not K.ours_is_faster(x, w)
    monkeypatch.undo()
    for rows, w, _ in cases:
        x = torch.randn(rows, 640).to(w.dtype)
        product = K.batch_invariant_linear if K.ours_is_faster(x, w) else F.linear
        assert torch.equal(K.fastest_linear(x, w), product(x, w))
        with K.backend("reference"):
            assert torch.equal(K.fastest_linear(x, w), F.linear(x, w))


def test_errors_name_the_argument() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"batch_invariant_linear: weight is .* expected \[5, 8\]"):
        K.batch_invariant_linear(x, weight[:, :7])
    with pytest.raises(ValueError, match="batch_invariant_linear: weight is"):
        K.batch_invariant_linear(x, weight.double())
    with pytest.raises(ValueError, match=r"batch_invariant_linear: bias is .* expected \[5\]"):
        K.batch_invariant_linear(x, weight, torch.randn(4))
    with pytest.raises(ValueError, match="batch_invariant_linear: x is"):
        K.batch_invariant_linear(x.long(), weight)
