"""policy_head: forward and backward in one pass equal the loss of linear_logprob and its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from kernel_cases import BACKENDS, assert_within_budget
from test_kernels_logprob import CAPS, SHAPES, problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ibtpo_kernels as K
from ibtpo_kernels import cpu, logprob, one_pass
from ibtpo_kernels.one_pass import Loss, Selection
from ibtpo_kernels.reference import plain_policy_head


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 30 rows in tiles of 9 rows and 7 columns at most."""
    for module, name, value in (
        (one_pass, "_CHUNK_ELEMENTS", 1),
        (one_pass, "_CHUNK_ROWS", 30),
        (logprob, "_TILE_ELEMENTS", 1),
        (logprob, "_TILE_ROWS", 9),
        (logprob, "_TILE_COLS", 7),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def one_chunk() -> None:
    """As shipped: shapes this small are one chunk and one tile."""


def curved_loss(num_edges: int, num_rows: int) -> Loss:
    """Not linear in either output, and different for every edge and row."""
    g, h = torch.randn(num_edges).double(), torch.randn(num_rows).double()

    def loss(logprob: Tensor, entropy: Tensor, edges: Selection, rows: Selection) -> Tensor:
        of_edges = g[edges].to(logprob.dtype) * logprob.exp()
        return of_edges.sum() + (h[rows].to(entropy.dtype) * entropy.square()).sum()

    return loss


def run(op: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], *rest: object, **options: object) -> list[Tensor]:
    """[loss, logprob, entropy, and the gradients of 1.5 times the loss]."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value, logprob, entropy = op(*leaves, *rest, **options)
    assert not logprob.requires_grad
    assert not entropy.requires_grad
    return [value.detach(), logprob, entropy, *torch.autograd.grad(1.5 * value, leaves)]


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", ["one_chunk", "small_chunks"])
def test_equals_the_plain_composition_in_float64(
    shape: tuple[int, int, int, int], chunks: str, softcap: float | None, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(chunks)
    hidden, weight, rows, targets = problem(*shape)
    inputs, loss = [hidden.double(), weight.double()], curved_loss(shape[1], shape[0])
    ours = run(K.policy_head, inputs, rows, targets, loss, temperature=0.7, softcap=softcap)
    plain = run(plain_policy_head, inputs, rows, targets, loss, 0.7, softcap)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", ["one_chunk", "small_chunks"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_within_budget(
    backend: str,
    shape: tuple[int, int, int, int],
    chunks: str,
    softcap: float | None,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(chunks)
    hidden, weight, rows, targets = problem(*shape)
    loss = curved_loss(shape[1], shape[0])
    with K.backend(backend):
        ours = run(K.policy_head, [hidden, weight], rows, targets, loss, temperature=1.3, softcap=softcap)
    plain = run(plain_policy_head, [hidden, weight], rows, targets, loss, 1.3, softcap)
    exact = run(plain_policy_head, [hidden.double(), weight.double()], rows, targets, loss, 1.3, softcap)
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_within_budget(x, y, z, floor=1e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled module is missing")
@pytest.mark.parametrize("chunks", ["one_chunk", "small_chunks"])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32-products", "bfloat16-products"])
def test_bfloat16_within_budget(
    rounded: bool, chunks: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(chunks)
    monkeypatch.setattr(cpu, "_has_bf16_products", lambda: rounded)
    hidden, weight, rows, targets = problem(130, 61, 24, 257)
    inputs, loss = [hidden.bfloat16(), weight.bfloat16()], curved_loss(61, 130)

    def plain_bfloat16(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = ((hidden @ weight.t()) / 1.3).log_softmax(-1)
        logprob, entropy = log_p[rows, targets], -(log_p.exp() * log_p).sum(-1)
        return loss(logprob, entropy, slice(None), slice(None)), logprob.detach(), entropy.detach()

    ours = run(K.policy_head, inputs, rows, targets, loss, temperature=1.3)
    exact = run(plain_policy_head, [x.double() for x in inputs], rows, targets, loss, 1.3)
    for x, y, z in zip(ours, run(plain_bfloat16, inputs), exact, strict=True):
        assert_within_budget(x, y, z, floor=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wanted", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2)], ids=str)
def test_six_operations_a_weight_and_row(backend: str, wanted: tuple[bool, bool], products: int) -> None:
    """Each logit is computed once: 6 T H V in all, 4 with a frozen weight or frozen hidden states."""
    hidden, weight, rows, targets = problem(130, 61, 24, 257)
    hidden, weight = hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    with K.backend(backend), FlopCounterMode(display=False) as counter:
        K.policy_head(hidden, weight, rows, targets, curved_loss(61, 130))[0].backward()
    assert counter.get_total_flops() == products * 2 * 130 * 24 * 257
    assert (hidden.grad is not None, weight.grad is not None) == wanted


@pytest.mark.usefixtures("small_chunks")
def test_every_edge_and_row_is_asked_for_once() -> None:
    hidden, weight, rows, targets = problem(130, 61, 24, 257)
    seen_edges: Counter[int] = Counter()
    seen_rows: Counter[int] = Counter()
    expected, entropies = K.linear_logprob(hidden, weight, rows, targets)

    def loss(logprob: Tensor, entropy: Tensor, edges: Selection, chunk: Selection) -> Tensor:
        seen_edges.update(torch.arange(61)[edges].tolist())
        seen_rows.update(torch.arange(130)[chunk].tolist())
        torch.testing.assert_close(logprob, expected[edges])
        torch.testing.assert_close(entropy, entropies[chunk])
        return logprob.sum()

    K.policy_head(hidden.requires_grad_(), weight, rows, targets, loss)
    assert seen_edges == Counter(range(61))
    assert seen_rows == Counter(range(130))


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    hidden, weight, rows, targets = problem(19, 40, 16, 33)
    loss = curved_loss(40, 19)
    with FlopCounterMode(display=False) as counter:
        value, _, _ = K.policy_head(hidden, weight, rows, targets, loss)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        again, _, _ = K.policy_head(hidden.requires_grad_(), weight, rows, targets, loss)
    assert counter.get_total_flops() == without.get_total_flops() == 2 * 19 * 16 * 33
    assert not value.requires_grad
    assert torch.equal(value, again)


def test_a_loss_of_one_output_or_of_none() -> None:
    hidden, weight, rows, targets = problem(19, 40, 16, 33)
    for loss in (lambda a, b, e, r: a.sum(), lambda a, b, e, r: b.sum(), lambda a, b, e, r: torch.ones(1)):
        ours = run(K.policy_head, [hidden, weight], rows, targets, loss)[3:]
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = loss(*K.linear_logprob(*leaves, rows, targets), slice(None), slice(None))
        if value.requires_grad:
            (1.5 * value).backward()
        for x, leaf in zip(ours, leaves, strict=True):
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_backward_may_be_taken_twice_and_adds_up() -> None:
    hidden, weight, rows, targets = problem(19, 40, 16, 33)
    hidden.requires_grad_(), weight.requires_grad_()
    value, _, _ = K.policy_head(hidden, weight, rows, targets, curved_loss(40, 19))
    value.backward(retain_graph=True)
    assert hidden.grad is not None
    once = hidden.grad.clone()
    value.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    hidden, weight, rows, targets = problem(5, 4, 3, 7)
    with pytest.raises(ValueError, match="policy_head: loss must return a tensor of one element"):
        K.policy_head(hidden, weight, rows, targets, lambda logprob, entropy, edges, chunk: logprob)
    with pytest.raises(ValueError, match="policy_head: softcap=-1 must be greater than 0"):
        K.policy_head(hidden, weight, rows, targets, lambda *given: torch.zeros(()), softcap=-1)
