"""The training ops as torch.library operators, for torch.compile, torch.func and fake tensors, which have no addresses.

`traced` tells when they are needed. Otherwise the ops run directly: an operator costs tens of microseconds a call, as
much as a small op. Each operator has a fake implementation, which knows only shapes, and a backward operator; both
check their arguments and choose their backend when they run, not when they are traced. A backward recomputes what its
eager counterpart keeps, except that of `linear_logprob`, which gets the row statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op  # type: ignore[attr-defined]

from ibtpo_kernels import checks
from ibtpo_kernels.dispatch import implementation
from ibtpo_kernels.gradients import NO_SECOND
from ibtpo_kernels.logits import work_dtype

HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def traced(x: Tensor) -> bool:
    """Whether an op on x is being traced or transformed, so that x may have no memory."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._are_functorch_transforms_active()


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd as outside of an operator; otherwise nothing is recorded below the dispatcher's autograd key."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _gradients(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The eager op's gradients by `inputs`, dense."""
    with _recording():
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = torch.autograd.grad(op(*leaves), leaves, grad)
    return tuple(x.contiguous() for x in found)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("ibtpo::tree_attention", mutates_args=())
def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
    checks.tree_attention(q, k, v, end, scale)
    out: Tensor = implementation(q).tree_attention(q, k, v, end, scale)
    return out.contiguous()


@custom_op("ibtpo::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    op = implementation(q).tree_attention
    dq, dk, dv = _gradients(lambda q, k, v: op(q, k, v, end, scale), (q, k, v), d_out)
    return dq, dk, dv


@custom_op("ibtpo::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    checks.rms_norm(x, weight, eps)
    out: Tensor = implementation(x).rms_norm(x, weight, eps)
    return out.contiguous()


@custom_op("ibtpo::rms_norm_backward", mutates_args=())
def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, d_out: Tensor) -> tuple[Tensor, Tensor]:
    op = implementation(x).rms_norm
    dx, d_weight = _gradients(lambda x, weight: op(x, weight, eps), (x, weight), d_out)
    return dx, d_weight


@custom_op("ibtpo::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    checks.rope(x, cos, sin)
    out: Tensor = implementation(x).rope(x, cos, sin)
    return out.contiguous()


@custom_op("ibtpo::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    checks.silu_mul(gate, up)
    out: Tensor = implementation(gate).silu_mul(gate, up)
    return out.contiguous()


@custom_op("ibtpo::silu_mul_backward", mutates_args=())
def silu_mul_backward(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _gradients(implementation(gate).silu_mul, (gate, up), d_out)
    return d_gate, d_up


@custom_op("ibtpo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(logprob [E], stats [3, T]): the entropy is the last row of the statistics."""
    checks.linear_logprob(hidden, weight, rows, targets, temperature, softcap)
    run = implementation(hidden, also=HALF).linear_logprob_stats
    logprob, stats = run(hidden, weight, rows, targets, temperature, softcap)
    return logprob, stats


@custom_op("ibtpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_weight); one that is not wanted is not computed, and empty."""
    d_hidden, d_weight = implementation(hidden, also=HALF).linear_logprob_grads(
        hidden,
        weight,
        rows,
        targets,
        temperature,
        softcap,
        stats,
        grad_logprob,
        grad_entropy,
        wants_hidden,
        wants_weight,
    )
    return _or_nothing(d_hidden, hidden), _or_nothing(d_weight, weight)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


@tree_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> Tensor:
    return _empty(q)


@tree_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, d_out: Tensor) -> tuple[Tensor, ...]:
    return _empty(q), _empty(k), _empty(v)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty(x)


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, d_out: Tensor) -> tuple[Tensor, ...]:
    return _empty(x), _empty(weight)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _empty(x)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _empty(gate)


@silu_mul_backward.register_fake
def _(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    return _empty(gate), _empty(up)


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = work_dtype(hidden.dtype)
    return hidden.new_empty(rows.shape, dtype=wide), hidden.new_empty((3, hidden.shape[0]), dtype=wide)


@linear_logprob_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, wants_hidden, wants_weight = rest
    return tuple(
        _empty(x) if wanted else x.new_empty(0) for x, wanted in ((hidden, wants_hidden), (weight, wants_weight))
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.rest = tuple(x for x in inputs if not isinstance(x, Tensor))


def _keep_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, temperature, softcap = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.rest = temperature, softcap


def _tree_attention_grad(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *call(tree_attention_backward, *ctx.saved_tensors, *ctx.rest, d_out), None, None


def _rms_norm_grad(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *call(rms_norm_backward, *ctx.saved_tensors, *ctx.rest, d_out), None


def _rope_grad(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation, so its backward is the inverse rotation of the gradient."""
    _, cos, sin = ctx.saved_tensors
    return call(rope, d_out, cos, -sin), None, None


def _silu_mul_grad(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor, Tensor] = call(silu_mul_backward, *ctx.saved_tensors, d_out)
    return found


def _linear_logprob_grad(ctx: Any, grad_logprob: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, stats = ctx.saved_tensors
    wanted = bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1])
    found = call(linear_logprob_backward, *tensors, *ctx.rest, stats, grad_logprob, grad_stats[2], *wanted)
    return *(x if wants else None for x, wants in zip(found, wanted, strict=True)), None, None, None, None


def _no_grad(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(NO_SECOND)


_Setup = Callable[[Any, tuple[Any, ...], Any], None]
_Grad = Callable[..., tuple[Tensor | None, ...]]

OPERATORS: dict[CustomOpDef, tuple[_Setup, _Grad]] = {
    tree_attention: (_keep, _tree_attention_grad),
    tree_attention_backward: (_keep, _no_grad),
    rms_norm: (_keep, _rms_norm_grad),
    rms_norm_backward: (_keep, _no_grad),
    rope: (_keep, _rope_grad),
    silu_mul: (_keep, _silu_mul_grad),
    silu_mul_backward: (_keep, _no_grad),
    linear_logprob: (_keep_stats, _linear_logprob_grad),
    linear_logprob_backward: (_keep, _no_grad),
}
"""Every operator, what its backward keeps, and its backward."""

for operator, (setup, grad) in OPERATORS.items():
    operator.register_autograd(grad, setup_context=setup)


@cache
def _function(operator: CustomOpDef) -> type[torch.autograd.Function]:
    """The operator for torch.func, whose transforms do not work with an operator's own autograd."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            OPERATORS[operator][0](ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return OPERATORS[operator][1](ctx, *grads)

    Function.__name__ = Function.__qualname__ = str(operator._qualname)
    return Function


def call(operator: CustomOpDef, *args: Any) -> Any:
    """Call the operator in a way that suits whatever traces or transforms its arguments."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _function(operator).apply(*args)  # type: ignore[no-untyped-call]
    return operator(*args)
