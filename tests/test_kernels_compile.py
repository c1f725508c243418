"""The training ops under torch.compile and torch.func: the same numbers as eager, without a graph break."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BACKENDS, forest
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import CustomOpDef, opcheck

import ibtpo_kernels as K
from ibtpo_kernels import library

NUM_TOKENS, NUM_EDGES, SIZE, HEADS, KV_HEADS, DIM, VOCABULARY = 13, 17, 24, 4, 2, 6, 29


class Block(nn.Module):
    """One transformer layer and the head, with every training op."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(1 + 0.1 * torch.randn(SIZE))
        self.qkv = nn.Linear(SIZE, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, SIZE, bias=False)
        self.up = nn.Linear(SIZE, 2 * SIZE, bias=False)
        self.down = nn.Linear(SIZE, SIZE, bias=False)
        self.head = nn.Parameter(torch.randn(VOCABULARY, SIZE))

    def forward(self, x: Tensor, end: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(K.rms_norm(x, self.norm, eps=1e-6)).unflatten(-1, (-1, DIM))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        x = x + self.out(K.tree_attention(K.rope(q, cos, sin), K.rope(k, cos, sin), v, end).flatten(1))
        gate, up = self.up(K.rms_norm(x, self.norm, eps=1e-6)).chunk(2, -1)
        return x + self.down(K.silu_mul(gate, up))

    def loss(self, x: Tensor, end: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        logprob, entropy = K.linear_logprob(
            self(x, end, cos, sin), self.head, rows, targets, temperature=0.7, softcap=9.0
        )
        return logprob.exp().sum() + entropy.square().sum()

    def one_pass(self, x: Tensor, end: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        def loss(logprob: Tensor, entropy: Tensor, edges: Any, of_rows: Any) -> Tensor:
            return logprob.exp().sum() + entropy.square().sum()

        hidden = self(x, end, cos, sin)
        return K.policy_head(hidden, self.head, rows, targets, loss, temperature=0.7, softcap=9.0)[0]


def batch(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, ...]:
    """(x, end, cos, sin, rows, targets)."""
    angles = torch.rand(num_tokens, DIM // 2)
    rows, targets = torch.randint(0, num_tokens, (NUM_EDGES,)), torch.randint(0, VOCABULARY, (NUM_EDGES,))
    return torch.randn(num_tokens, SIZE), forest(num_tokens), angles.cos(), angles.sin(), rows, targets


def gradients(block: Block, loss: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    """[loss, then its gradient by every parameter and x]."""
    x = given[0].clone().requires_grad_()
    value = loss(x, *given[1:])
    return [value.detach(), *torch.autograd.grad(value, [*block.parameters(), x])]


def assert_same(ours: list[Tensor], eager: list[Tensor]) -> None:
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["loss", "one_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_compiles_whole_and_gives_the_same_gradients(backend: str, method: str) -> None:
    block = Block()
    loss = getattr(block, method)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with K.backend(backend):
        for given in (batch(), batch()):
            assert_same(gradients(block, compiled, given), gradients(block, loss, given))


def test_other_numbers_of_tokens_do_not_need_another_graph() -> None:
    """Compiled once with dynamic shapes, for 13, 21 and 34 tokens."""
    block, graphs = Block(), []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(block.loss, fullgraph=True, backend=count, dynamic=True)
    for num_tokens in (13, 21, 34):
        given = batch(num_tokens)
        assert_same(gradients(block, compiled, given), gradients(block, block.loss, given))
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_inductor_gives_the_same_gradients() -> None:
    """Few ops, for it runs the C++ compiler on whatever lies between them."""
    *_, rows, targets = batch()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return K.linear_logprob(K.silu_mul(x, x), weight, rows, targets)[0].sum()

    leaves = [torch.randn(n, SIZE).requires_grad_() for n in (NUM_TOKENS, VOCABULARY)]
    compiled = torch.compile(loss, fullgraph=True)
    assert_same(*(list(torch.autograd.grad(f(*leaves), leaves)) for f in (compiled, loss)))


def test_a_frozen_head_stays_without_a_gradient_when_compiled() -> None:
    block, given = Block(), batch()
    block.head.requires_grad_(False)
    torch.compile(block.loss, fullgraph=True, backend="aot_eager")(*given).backward()
    assert block.head.grad is None
    expected = torch.autograd.grad(block.loss(*given), block.norm)[0]
    torch.testing.assert_close(block.norm.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_gradients_equal_autograd(backend: str) -> None:
    block, given = Block(), batch()
    parameters = {name: x.detach() for name, x in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.func.functional_call(block, parameters, (x, *given[1:4]))
        logprob, entropy = K.linear_logprob(hidden, parameters["head"], *given[4:], temperature=0.7, softcap=9.0)
        return logprob.exp().sum() + entropy.square().sum()

    with K.backend(backend):
        eager = gradients(block, block.loss, given)
        by_parameters, by_x = torch.func.grad(loss, argnums=(0, 1))(parameters, given[0])
        assert_same([*by_parameters.values(), by_x], eager[1:])
        value, pull = torch.func.vjp(loss, parameters, given[0])
        by_parameters, by_x = pull(torch.ones(()))
        assert_same([value, *by_parameters.values(), by_x], eager)


def test_vmap_says_that_it_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="vmap over .*rms_norm, but it does not have vmap support"):
        torch.vmap(lambda x: K.rms_norm(x, torch.ones(5), eps=1e-6))(torch.randn(2, 3, 5))


def test_a_second_derivative_says_that_it_is_not_there() -> None:
    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: K.silu_mul(x, x).sum())(x).sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(slope)(torch.randn(3))


DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "tree_attention": lambda x: K.tree_attention(x[:, None], x[:, None], x[:, None], torch.full((3,), 3).int()),
    "linear_logprob": lambda x: K.linear_logprob(x, torch.eye(8), torch.arange(3), torch.arange(3))[0],
    "rms_norm": lambda x: K.rms_norm(x, torch.ones(8), eps=1e-6),
    "add_rms_norm": lambda x: K.add_rms_norm(x, x, torch.ones(8), eps=1e-6)[0],
    "silu_mul": lambda x: K.silu_mul(x, x),
    "batch_invariant_linear": lambda x: K.batch_invariant_linear(x, x),
}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference has second derivatives")
@pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["linear", "square"])
def test_a_gradient_penalty_is_refused_and_not_dropped(
    op: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(op(x)), x, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(loss(op(x)), x)[0])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(slope.square().sum() + x.square().sum(), x)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_the_reference_has_second_derivatives_but_of_the_heads(op: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    in_float64: dict[str, Callable[[Tensor], Tensor]] = {
        "rms_norm": lambda x: K.rms_norm(x, x[0], eps=1e-6),
        "add_rms_norm": lambda x: K.add_rms_norm(x, x, x[0], eps=1e-6)[0],
        "linear_logprob": lambda x: K.linear_logprob(x, x, torch.arange(3), torch.arange(3))[0],
    }
    run = in_float64.get(op, DIFFERENTIABLE[op])
    with K.backend("reference"):
        if op == "linear_logprob":
            with pytest.raises(RuntimeError, match="plain torch in place of linear_logprob"):
                torch.autograd.gradgradcheck(run, x)
        else:
            assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference has second derivatives")
def test_policy_head_refuses_to_be_differentiated_with_a_graph() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    value, _, _ = K.policy_head(x, torch.eye(8), torch.arange(3), torch.arange(3), lambda logprob, *_: logprob.sum())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value, x, create_graph=True)


def test_a_tangent_is_refused_and_not_dropped() -> None:
    x, weight, end = torch.randn(3, 8), torch.randn(8, 8), torch.full((3,), 3, dtype=torch.int32)
    index, angles = torch.arange(3), torch.randn(3, 4)
    calls: dict[str, Callable[[Tensor], object]] = {
        "rms_norm": lambda x: K.rms_norm(x, weight[0], eps=1e-6),
        "add_rms_norm": lambda x: K.add_rms_norm(x, x, weight[0], eps=1e-6),
        "silu_mul": lambda x: K.silu_mul(x, x),
        "rope": lambda x: K.rope(x[:, None], angles, angles),
        "tree_attention": lambda x: K.tree_attention(x[:, None], x[:, None], x[:, None], end),
        "linear_logprob": lambda x: K.linear_logprob(x, weight, index, index),
        "policy_head": lambda x: K.policy_head(x, weight, index, index, lambda logprob, *_: logprob.sum()),
        "batch_invariant_linear": lambda x: K.batch_invariant_linear(x, weight),
    }
    for name, call in calls.items():
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), forward_ad.dual_level():
                call(x)
                with pytest.raises(NotImplementedError, match="jvp"):
                    call(forward_ad.make_dual(x, torch.ones_like(x)))
                    pytest.fail(f"{name} dropped the tangent")


def test_fake_tensors_have_shapes_without_memory() -> None:
    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(torch.randn(n, 4, dtype=torch.bfloat16)) for n in (3, 5))
        rows = mode.from_tensor(torch.zeros(7, dtype=torch.int64))
        logprob, entropy = K.linear_logprob(hidden, weight, rows, rows)
        assert (logprob.shape, entropy.shape, logprob.dtype) == ((7,), (3,), torch.float32)
        assert K.rms_norm(hidden, weight[0], eps=1e-6).dtype == torch.bfloat16


@pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
def test_what_an_op_makes_on_the_way_outlives_a_graph_break() -> None:
    """An op that is no operator runs between two graphs, and kernels read what it made dense by address."""
    k_pages, v_pages = torch.randn(2, 2, 16, KV_HEADS, 64)
    row = torch.zeros(3, dtype=torch.int32)
    plan = K.plan_decode(row[:1, None], row, torch.tensor([9, 5, 16], dtype=torch.int32))
    norm = torch.ones(64)

    def decode(q: Tensor) -> Tensor:
        return K.tree_decode((2 * q).transpose(0, 2), k_pages, v_pages, plan)

    def gradient(x: Tensor) -> Tensor:
        total = K.add_rms_norm(x, x, norm, eps=1e-6)[0].transpose(0, 2).sin().sum()
        return torch.autograd.grad(total, x)[0]

    for op, x in ((decode, torch.randn(64, HEADS, 3)), (gradient, torch.randn(300, HEADS, 64, requires_grad=True))):
        assert torch.equal(torch.compile(op, backend="eager")(x), op(x))


def test_a_layout_by_depth_may_be_made_where_torch_compile_looks_on() -> None:
    def positions(end: Tensor) -> tuple[Tensor, Tensor]:
        layout = K.plan_by_depth(end)
        return layout.tokens, layout.plan.rows

    end = forest(NUM_TOKENS)
    for x, y in zip(torch.compile(positions, backend="eager")(end), positions(end), strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")
def test_a_kernel_is_given_no_fake_tensor() -> None:
    with FakeTensorMode():
        x, weight = torch.randn(3, 8), torch.randn(5, 8)
        for op in (lambda: K.batch_invariant_linear(x, weight), lambda: K.add_rms_norm(x, x, weight[0], eps=1e-6)):
            with pytest.raises(RuntimeError, match=r"a FakeTensor \[3, 8\] has no memory"):
                op()


def attention_inputs() -> tuple[Any, ...]:
    q, k, v = (torch.randn(NUM_TOKENS, n, DIM).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, forest(NUM_TOKENS), 0.4


def head_inputs(softcap: float | None, *, frozen: bool = False) -> tuple[Any, ...]:
    hidden, weight = (torch.randn(n, SIZE).requires_grad_() for n in (NUM_TOKENS, VOCABULARY))
    return hidden, weight.requires_grad_(not frozen), *batch()[4:], 0.7, softcap


def plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in values)


def cases() -> Iterator[tuple[CustomOpDef, tuple[Any, ...]]]:
    """Every registered operator with arguments; the backward ones take theirs without a graph."""
    x, up = (torch.randn(5, 3, 8).requires_grad_() for _ in range(2))
    weight, angles = torch.randn(8).requires_grad_(), torch.rand(5, 4)
    q, *rest = attention_inputs()
    yield library.tree_attention, (q, *rest)
    yield library.tree_attention_backward, plain((q, *rest, torch.randn(q.shape)))
    yield library.rms_norm, (x, weight, 1e-6)
    yield library.rms_norm_backward, plain((x, weight, 1e-6, torch.randn(x.shape)))
    yield library.rope, (x, angles.cos(), angles.sin())
    yield library.silu_mul, (x, up)
    yield library.silu_mul_backward, plain((x, up, torch.randn(x.shape)))
    for softcap, frozen in ((None, False), (9.0, True)):
        given = head_inputs(softcap, frozen=frozen)
        yield library.linear_logprob, given
        stats = library.linear_logprob(*plain(given))[1]
        grads = torch.randn(NUM_EDGES), torch.randn(NUM_TOKENS)
        yield library.linear_logprob_backward, plain((*given, stats, *grads, True, not frozen))


def test_every_registered_operator_is_checked() -> None:
    assert {operator for operator, _ in cases()} == set(library.OPERATORS)


def test_opcheck() -> None:
    for operator, given in cases():
        opcheck(operator, given)


def test_eager_calls_do_not_go_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "call", lambda *given: pytest.fail("an eager call went through torch.library"))
    block, given = Block(), batch()
    block.loss(*given).backward()
    K.silu_mul(nn.Parameter(torch.ones(3)), F.relu(torch.ones(3)))
