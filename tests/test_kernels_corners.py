"""Inputs at the edge of what an op serves: right there too, or refused by name, on the CPU's backends."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ibtpo_kernels as K

BACKENDS = ["reference", *(["cpu"] if K.has_compiled() else [])]
compiled = pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
KEYS = torch.zeros(1, 2, dtype=torch.int64)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with K.backend(request.param):
        yield request.param


def edges(row: int, target: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([row]), torch.tensor([target])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_log_probs_of_given_tokens_do_not_depend_on_torchs_defaults(dtype: torch.dtype, backend: str) -> None:
    logits, weight = torch.randn(4, 7), torch.randn(7, 5)
    rows, targets = torch.arange(4), torch.tensor([1, 0, 6, 3])

    def found() -> list[Tensor]:
        return [
            *K.sampled_logprob(logits, rows, targets),
            *K.linear_sampled_logprob(logits[:, :5], weight, rows, targets),
        ]

    expected = found()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            again = found()
            planner = K.DecodePlanner(torch.zeros(1, 1, dtype=torch.int32, device="cpu"))
            one = torch.ones(1, dtype=torch.int32, device="cpu")
            items = planner.plan(one - 1, one).items
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == y.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(expected, again, strict=True))
    assert items.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize(("rows", "targets"), [([4], [0]), ([-1], [0]), ([0], [7]), ([0], [0, 1])])
def test_edges_that_point_nowhere_are_refused(rows: list[int], targets: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match="linear_sampled_logprob"):
        K.linear_sampled_logprob(torch.randn(4, 5), torch.randn(7, 5), torch.tensor(rows), torch.tensor(targets))


@pytest.mark.parametrize(
    ("temperature", "target", "expected"), [(0.01, 1, -800.0), (1.0, 2, -800.0003354), (1.0, 1, -8.0003354)]
)
def test_a_log_prob_is_finite_where_its_probability_is_not_above_zero(
    temperature: float, target: int, expected: float, backend: str
) -> None:
    logits = torch.tensor([[0.0, -8.0, -800.0]])
    found, _ = K.sampled_logprob(logits, *edges(0, target), temperature=temperature)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert K.sampled_logprob(impossible, *edges(0, 1))[0].item() == -torch.inf


def crossing() -> Tensor:
    end = torch.arange(1, 97, dtype=torch.int32)
    end[0], end[20] = 40, 96
    return end


@compiled
def test_subtrees_that_cross_are_refused_where_kernels_rely_on_it() -> None:
    q = torch.randn(96, 2, 8, requires_grad=True)
    for attend in (lambda: K.tree_attention(q, q, q, crossing()), lambda: K.plan_by_depth(crossing())):
        with pytest.raises(ValueError, match="no forest in depth-first order: the subtree of token 20"):
            attend()


@pytest.mark.parametrize("gate", [-1e38, -3e38, -100.0, -88.1, -87.0])
def test_a_gate_far_below_zero_lets_nothing_through(gate: float, backend: str) -> None:
    x = torch.full((1, 4), gate, requires_grad=True)
    out = K.silu_mul(x, torch.ones(1, 4))
    out.sum().backward()
    assert x.grad is not None and out.abs().max() < 1e-30 and x.grad.abs().max() < 1e-30


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_the_gradient_of_a_certain_token_is_zero(temperature: float, backend: str) -> None:
    """Its probability is 1 and stays so: the backward pass must find the very maximum that the forward found."""
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(1, 4)
    logprob, _ = K.linear_logprob(hidden, weight, torch.arange(6), torch.zeros(6).long(), temperature=temperature)
    logprob.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_most_likely_token_is_that_of_the_largest_logit(dtype: torch.dtype, backend: str) -> None:
    """Also where weights are equal in double."""
    logits = torch.tensor([[-1e-20, 0.0, -1.0]], dtype=dtype)
    for options in ({"top_k": 1}, {"top_k": 1, "min_p": 1.0}, {"temperature": 0.0}):
        assert K.sample(logits, KEYS, **options)[0].item() == 1


@pytest.mark.parametrize("option", [{"top_k": 2**70}, {"temperature": 10**400}, {"temperature": "1"}, {"top_p": None}])
def test_a_parameter_that_is_no_such_number_is_named(option: dict[str, Any], backend: str) -> None:
    with pytest.raises(ValueError, match=rf"sample: {next(iter(option))}"):
        K.sample(torch.zeros(1, 3), KEYS, **option)


def test_a_number_of_a_type_that_is_not_taken_is_seen_for_what_it_is(backend: str) -> None:
    number = np.float32(0.5)
    with pytest.raises(ValueError, match=re.escape(f"sample: temperature={number!r} must be")):
        K.sample(torch.zeros(1, 3), KEYS, temperature=number)  # type: ignore[arg-type]


def one_page(length: int) -> tuple[Tensor, Tensor, Tensor, K.DecodePlan]:
    zero = torch.zeros(2, dtype=torch.int32)
    plan = K.plan_decode(zero[:1, None], zero, zero + length)
    return torch.randn(2, 2, 8), *torch.randn(2, 1, 16, 2, 8), plan


def test_lengths_that_grew_past_the_table_are_refused(backend: str) -> None:
    q, k, v, plan = one_page(3)
    plan.lengths.fill_(20)
    with pytest.raises(ValueError, match="query 0 of length 20 needs a page"):
        K.tree_decode(q, k, v, plan)


@compiled
@pytest.mark.parametrize("item", [[-1, 1, 0, 1], [10, 11, 0, 1], [0, 3, 0, 1], [0, 2, 0, 2], [1, 1, 0, 1]])
def test_items_that_name_what_is_not_there_are_refused(item: list[int]) -> None:
    q, k, v, plan = one_page(3)
    with pytest.raises(ValueError, match="of the plan names queries or pages that are not there"):
        K.tree_decode(q, k, v, replace(plan, items=torch.tensor([item], dtype=torch.int32)))


def test_a_copy_of_a_planner_is_told_of_what_is_rewritten() -> None:
    table = torch.zeros(2, 2, dtype=torch.int32)
    rows, lengths = torch.arange(2, dtype=torch.int32), torch.full((2,), 32, dtype=torch.int32)
    planner = K.DecodePlanner(table)
    planner.plan(rows, lengths)
    other = copy.deepcopy(planner)
    other.page_table[1] = 1
    other.rewrote(1)
    expected = K.plan_decode(other.page_table, rows, lengths)
    assert other.plan(rows, lengths).items.tolist() == expected.items.tolist()
    assert planner.plan(rows, lengths).items.tolist() == [[0, 2, 0, 2]]


def test_the_layout_by_depth_is_for_its_tokens() -> None:
    layout = K.plan_by_depth(torch.tensor([3, 2, 3], dtype=torch.int32))
    q = torch.randn(4, 2, 8)
    for tokens in (q, q[:2]):
        with pytest.raises(ValueError, match="the layout 3"):
            K.tree_attention_by_depth(q[:3], tokens, tokens, layout)


@pytest.mark.parametrize("scale", [65536.0, 1 / 3, 0.0])
def test_a_loss_scale_is_not_rounded_before_it_is_applied(scale: float, backend: str) -> None:
    """65,536 is no number of float16, and 1/3 not the one of bfloat16."""
    for dtype, within in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        grads = []
        for engine in ("head", "parts"):
            torch.manual_seed(0)
            hidden, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(9, 8).to(dtype)
            rows, targets = torch.arange(5), torch.arange(5)
            if engine == "head":
                value = K.policy_head(hidden, weight, rows, targets, lambda logprob, *_: 1e-4 * logprob.sum())[0]
            else:
                value = 1e-4 * K.linear_logprob(hidden, weight, rows, targets)[0].sum()
            (value * scale).backward()
            assert hidden.grad is not None
            grads.append(hidden.grad.float())
        assert torch.isfinite(grads[0]).all()
        torch.testing.assert_close(grads[0], grads[1], rtol=within, atol=within * float(grads[1].abs().max()))


def test_a_number_may_be_a_tensor_of_no_dimensions(backend: str) -> None:
    x, weight, rows = torch.randn(3, 8), torch.randn(5, 8), torch.arange(3)
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 1, 8)
    end = torch.full((3,), 3, dtype=torch.int32)

    def found(number: Any) -> list[Tensor]:
        head = {"temperature": number(0.7), "softcap": number(3.0)}
        return [
            K.tree_attention(q, k, k, end, scale=number(0.3)),
            K.rms_norm(q, weight[0], eps=number(1e-3)),
            *K.add_rms_norm(q, q, weight[0], eps=number(1e-3)),
            *K.linear_logprob(x, weight, rows, rows, **head),
            K.policy_head(x, weight, rows, rows, lambda logprob, *_: logprob.sum(), **head)[0],
            *K.sampled_logprob(x, rows, rows, temperature=number(0.7)),
        ]

    for y, expected in zip(found(lambda x: torch.tensor(x, dtype=torch.float64)), found(float), strict=True):
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_autocast_does_not_reach_the_products_of_a_head(backend: str) -> None:
    hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(1500, 8, requires_grad=True)  # several tiles
    rows = targets = torch.arange(600)

    def found() -> list[Tensor]:
        logprob, entropy = K.linear_logprob(hidden, weight, rows, targets)
        value, *_ = K.policy_head(hidden, weight, rows, targets, lambda x, h, *_: x.square().sum() + h.sum())
        product = K.batch_invariant_linear(hidden[:9], weight)
        sums = (logprob * entropy).sum(), value, product.sin().sum()
        grads = [grad for x in sums for grad in torch.autograd.grad(x, (hidden, weight))]
        return [logprob, entropy, value, product, *grads]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(found(), expected, strict=True):
            assert torch.equal(x, y)
