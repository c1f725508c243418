"""linear_logprob: the chunked, analytic form equals autograd through log_softmax, in both outputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, assert_within_budget
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ibtpo_kernels as K
from ibtpo_kernels import cpu
from ibtpo_kernels import logprob as tiled
from ibtpo_kernels.reference import plain_linear_logprob

CAPS = [None, 2.5]
SHAPES = [  # T, E, H, V; on the CPU rows of up to 64 logits are summed side by side
    (0, 0, 8, 5), (1, 0, 8, 1), (1, 3, 4, 7), (19, 40, 16, 33), (130, 61, 24, 257), (17, 20, 8, 64), (33, 9, 8, 65),
]  # fmt: skip


def problem(num_rows: int, num_edges: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random edges: some rows have several, some none."""
    rows = torch.randint(0, max(num_rows, 1), (num_edges,))
    targets = torch.randint(0, vocabulary, (num_edges,))
    return torch.randn(num_rows, hidden), torch.randn(vocabulary, hidden), rows, targets


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    return list(torch.autograd.grad(loss, inputs))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 9 rows and 7 columns at most: several of both, the last ones cut."""
    for name, value in (("_TILE_ELEMENTS", 1), ("_TILE_ROWS", 9), ("_TILE_COLS", 7)):
        monkeypatch.setattr(tiled, name, value)


@pytest.fixture
def one_tile() -> None:
    """As shipped: shapes this small are one tile."""


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", ["one_tile", "small_tiles"])
def test_equals_autograd_through_log_softmax_in_float64(
    shape: tuple[int, int, int, int], tiles: str, softcap: float | None, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(tiles)
    hidden, weight, rows, targets = problem(*shape)
    inputs = [x.double().requires_grad_() for x in (hidden, weight)]
    weights = [torch.randn(shape[1]), torch.randn(shape[0])]
    ours = K.linear_logprob(*inputs, rows, targets, temperature=0.7, softcap=softcap)
    plain = plain_linear_logprob(*inputs, rows, targets, 0.7, softcap)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    for x, y in zip(gradients(ours, inputs, weights), gradients(plain, inputs, weights), strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", ["one_tile", "small_tiles"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_within_budget(
    backend: str,
    shape: tuple[int, int, int, int],
    tiles: str,
    softcap: float | None,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(tiles)
    hidden, weight, rows, targets = problem(*shape)
    weights = [torch.randn(shape[1]), torch.randn(shape[0])]

    def run(dtype: torch.dtype, plain: bool) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with K.backend(backend):
            outputs = (
                plain_linear_logprob(*inputs, rows, targets, 1.3, softcap)
                if plain
                else K.linear_logprob(*inputs, rows, targets, temperature=1.3, softcap=softcap)
            )
        return [*(x.detach() for x in outputs), *gradients(outputs, inputs, weights)]

    exact, plain, ours = run(torch.float64, True), run(torch.float32, True), run(torch.float32, False)
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_within_budget(x, y, z, floor=1e-5)


@pytest.mark.parametrize("softcap", CAPS)
def test_gradcheck_of_both_outputs_with_repeated_and_missing_rows(softcap: float | None) -> None:
    hidden, weight = torch.randn(5, 4).double().requires_grad_(), torch.randn(7, 4).double().requires_grad_()
    rows, targets = torch.tensor([0, 0, 0, 3]), torch.tensor([1, 1, 6, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: K.linear_logprob(h, w, rows, targets, temperature=0.5, softcap=softcap), (hidden, weight)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1], ids=["logprob", "entropy"])
@pytest.mark.parametrize("wanted", [0, 1], ids=["hidden", "weight"])
def test_each_gradient_alone(backend: str, output: int, wanted: int) -> None:
    hidden, weight, rows, targets = problem(19, 40, 16, 33)
    inputs = [hidden.requires_grad_(wanted == 0), weight.requires_grad_(wanted == 1)]
    with K.backend(backend):
        (ours,) = torch.autograd.grad(K.linear_logprob(*inputs, rows, targets)[output].sum(), inputs[wanted])
    (plain,) = torch.autograd.grad(plain_linear_logprob(*inputs, rows, targets, 1.0)[output].sum(), inputs[wanted])
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [3e4, 1e30])
def test_probabilities_that_vanish_give_no_nan(backend: str, spread: float) -> None:
    """One-hot features make logits of 0 and -spread: all but one probability underflow."""
    hidden = torch.eye(4).requires_grad_()
    weight = (-spread * (1 - torch.eye(4))).requires_grad_()
    with K.backend(backend):
        logprob, entropy = K.linear_logprob(hidden, weight, torch.arange(4), torch.arange(4))
        grads = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert torch.equal(logprob, torch.zeros(4))
    assert torch.equal(entropy, torch.zeros(4))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [5, 33, 70])
def test_a_row_that_is_nan_or_forbids_tokens_concerns_no_other(backend: str, vocabulary: int) -> None:
    hidden, weight, _, _ = problem(40, 0, 8, vocabulary)
    rows, targets = torch.arange(40), torch.arange(40) % vocabulary
    hidden[:, 0], weight[:, 0] = -1.0, 0.0
    others = torch.arange(vocabulary) != 2
    without = hidden.double() @ weight[others].double().T
    weight[2, 0] = torch.inf  # every logit of token 2 is -inf
    hidden[17, 3], hidden[18] = torch.nan, torch.nan
    with K.backend(backend):
        logprob, entropy = K.linear_logprob(hidden, weight, rows, targets)
    kept = torch.ones(40, dtype=torch.bool)
    kept[[17, 18]] = False
    assert logprob[~kept].isnan().all()
    assert entropy[~kept].isnan().all()
    assert torch.equal(logprob[kept] == -torch.inf, targets[kept] == 2)
    log_p = without.log_softmax(-1)
    torch.testing.assert_close(entropy[kept].double(), -(log_p.exp() * log_p).sum(-1)[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_logits_very_negative(backend: str) -> None:
    with K.backend(backend):
        logprob, entropy = K.linear_logprob(
            torch.ones(1, 1), torch.full((8, 1), -1e30), torch.tensor([0]), torch.tensor([3])
        )
    torch.testing.assert_close(logprob, torch.tensor([-2.0794415]))
    torch.testing.assert_close(entropy, torch.tensor([2.0794415]))


def test_the_cap_comes_before_the_temperature() -> None:
    """Gemma 2: logits are capped by the model, then divided by the sampler."""
    hidden, weight = torch.tensor([[3.0]]), torch.tensor([[1.0], [2.0]])
    capped = 2.0 * torch.tanh(torch.tensor([3.0, 6.0]) / 2.0)
    expected = (capped / 0.5).log_softmax(-1)
    logprob, _ = K.linear_logprob(
        hidden, weight, torch.tensor([0, 0]), torch.tensor([0, 1]), temperature=0.5, softcap=2.0
    )
    torch.testing.assert_close(logprob, expected)


class Allocations(TorchDispatchMode):
    """Counts the shapes of all tensors that ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.shapes[tuple(out.shape)] += 1
        return out


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wanted", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2)], ids=str)
def test_nothing_is_computed_for_what_is_frozen(backend: str, wanted: tuple[bool, bool], products: int) -> None:
    """One product forward; backward one for the logits and one for each gradient wanted."""
    num_rows, size, vocabulary = 130, 24, 257
    hidden, weight, rows, targets = problem(num_rows, 61, size, vocabulary)
    hidden, weight = hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    product = 2 * num_rows * size * vocabulary
    with K.backend(backend):
        with FlopCounterMode(display=False) as forward:
            logprob, entropy = K.linear_logprob(hidden, weight, rows, targets)
        assert forward.get_total_flops() == product
        loss = logprob.sum() + entropy.sum()
        with FlopCounterMode(display=False) as backward, Allocations() as made:
            loss.backward()
    assert backward.get_total_flops() == products * product
    assert (hidden.grad is not None, weight.grad is not None) == wanted
    assert (made.shapes[num_rows, size] > 0, made.shapes[vocabulary, size] > 0) == wanted
    assert made.shapes[num_rows, vocabulary] == 0


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled module is missing")
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("tiles", ["one_tile", "small_tiles"])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32-products", "bfloat16-products"])
def test_bfloat16_within_budget(
    rounded: bool, tiles: str, softcap: float | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to multiply, whichever this processor would choose; plain torch rounds everything to bfloat16."""
    request.getfixturevalue(tiles)
    monkeypatch.setattr(cpu, "_has_bf16_products", lambda: rounded)
    hidden, weight, rows, targets = problem(130, 61, 24, 257)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    weights = [torch.randn(61), torch.randn(130)]
    results = []
    for dtype, ours in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float64, False)):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if ours:
            outputs = K.linear_logprob(*inputs, rows, targets, temperature=1.3, softcap=softcap)
        else:
            u = inputs[0] @ inputs[1].t()
            log_p = ((u if softcap is None else softcap * (u / softcap).tanh()) / 1.3).log_softmax(-1)
            outputs = log_p[rows, targets], -(log_p.exp() * log_p).sum(-1)
        results.append([*(x.detach() for x in outputs), *gradients(outputs, inputs, weights)])
    for x, y, z in zip(*results, strict=True):
        assert_within_budget(x, y, z, floor=1e-5)


def test_bfloat16_accumulates_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor does not multiply bfloat16, logits are as exact as float32's."""
    monkeypatch.setattr(cpu, "_has_bf16_products", lambda: False)
    hidden, weight, rows, targets = problem(19, 40, 16, 33)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    logprob, entropy = K.linear_logprob(hidden, weight, rows, targets)
    expected = plain_linear_logprob(hidden.float(), weight.float(), rows, targets, 1.0)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprob, entropy), expected, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(logprob.sum(), hidden)[0].dtype == torch.bfloat16


def test_backward_twice_is_bit_identical() -> None:
    hidden, weight, rows, targets = problem(130, 300, 24, 257)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    logprob, entropy = K.linear_logprob(*inputs, rows, targets)
    loss = logprob.sum() + entropy.sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_errors_name_the_argument() -> None:
    hidden, weight, rows, targets = problem(5, 4, 3, 7)
    with pytest.raises(ValueError, match=r"rows spans .* expected values in \[0, 5\)"):
        K.linear_logprob(hidden, weight, rows + 5, targets)
    with pytest.raises(ValueError, match=r"targets spans .* expected values in \[0, 7\)"):
        K.linear_logprob(hidden, weight, rows, targets - 7)
    with pytest.raises(ValueError, match="temperature=0 must be greater than 0"):
        K.linear_logprob(hidden, weight, rows, targets, temperature=0)
    with pytest.raises(ValueError, match="softcap=0 must be greater than 0 and finite"):
        K.linear_logprob(hidden, weight, rows, targets, softcap=0)
    with pytest.raises(ValueError, match=r"weight is .* expected at least one vocabulary entry"):
        K.linear_logprob(hidden, weight[:0], rows[:0], targets[:0])
    with pytest.raises(ValueError, match=r"weight is .* expected \[7, 3\]"):
        K.linear_logprob(hidden, weight[:, :2], rows, targets)
    with pytest.raises(ValueError, match="targets is torch.int32"):
        K.linear_logprob(hidden, weight, rows, targets.int())
