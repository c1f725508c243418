"""Problems of linear_logprob and policy_head, with one target a row, as peers support no more."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ibtpo_kernels import ops
from ibtpo_kernels.roofline import formulas
from ibtpo_kernels.roofline.peers import heads as peers
from ibtpo_kernels.roofline.peers.heads import LogProb
from ibtpo_kernels.roofline.problem import (
    Contender,
    Function,
    Inputs,
    Outputs,
    Pass,
    Prepare,
    Problem,
    Run,
    in_pass,
    ours,
)

Sizes = tuple[int, int, int]  # rows, hidden, vocabulary

_PEERS: tuple[tuple[str, Callable[[], LogProb], str], ...] = (
    ("eager", peers.eager, ""),
    ("TRL chunked log-prob", peers.trl, ""),
    ("Liger scaled cross-entropy", peers.liger_scaled, "entropy in the inputs' dtype"),
    ("Liger scaled cross-entropy (torch loop)", peers.liger_scaled_fallback, "entropy in the inputs' dtype"),
    ("Liger cross-entropy", peers.liger_cross_entropy, "no entropy"),
    ("cut-cross-entropy", peers.cut_cross_entropy, "no entropy; small gradients left out"),
    ("verl kernel", peers.verl, ""),
    ("torch.compile", peers.torch_compile, ""),  # last, as it takes longest to start
)


def _named(sizes: Sizes) -> str:
    return "T{} H{} V{}".format(*sizes)


def _draw(sizes: Sizes, dtype: torch.dtype) -> Callable[[torch.device, torch.Generator], Inputs]:
    """Logits of standard deviation 1; gradients of one sign pattern, as advantages have."""
    rows, hidden, vocabulary = sizes

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=where, generator=generator)

        x, w = normal(rows, hidden).to(dtype), (normal(vocabulary, hidden) * hidden**-0.5).to(dtype)
        targets = torch.randint(vocabulary, (rows,), device=where, generator=generator)
        return Inputs((x, w), (torch.arange(rows, device=where), targets), (normal(rows), normal(rows)))

    return draw


def _linear_logprob(inputs: Inputs) -> Outputs:
    hidden, weight = inputs.leaves
    rows, targets, *_ = inputs.rest
    return ops.linear_logprob(hidden, weight, rows, targets)


def _by_peer(load: Callable[[], LogProb], which: Pass) -> Callable[[], Prepare]:
    def prepare() -> Prepare:
        logprob = load()

        def function(inputs: Inputs) -> Outputs:
            hidden, weight = inputs.leaves
            return logprob(hidden, weight, inputs.rest[1])

        return in_pass(function, which)

    return prepare


def _bare_product(which: Pass) -> Prepare:
    """The matrix products alone: one in the forward; in the backward that one again, and two more."""

    def prepare(inputs: Inputs) -> Run:
        hidden, weight = inputs.leaves

        def forward() -> Outputs:
            return (peers.products(hidden, weight),)

        def both() -> Outputs:
            logits = peers.products(hidden, weight)
            peers.products(hidden, weight)
            return logits, *peers.gradient_products(hidden, weight, logits)

        return forward if which == "forward" else both

    return prepare


def _from_logits(which: Pass) -> Callable[[Inputs, Outputs], Outputs]:
    """Log-probs and entropies from the bare product's logits; its gradients are not compared."""

    def comparable(inputs: Inputs, outputs: Outputs) -> Outputs:
        logits = outputs[0]
        assert logits is not None
        log_p = logits.detach().float().log_softmax(-1)
        found = log_p.gather(1, inputs.rest[1][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        return found if which == "forward" else (*found, None, None)

    return comparable


def linear_logprob(
    sizes: Sizes, dtype: torch.dtype, which: Pass, *, is_quick: bool = False, compiles: bool = True
) -> Problem:
    """Log-prob and entropy of every row; `compiles=False` leaves torch.compile out, which takes a while to start."""
    contenders = [
        ours(_linear_logprob, which),
        Contender(
            "bare product",
            lambda: _bare_product(which),
            kind="bound",
            note="the matrix products alone",
            comparable=_from_logits(which),
        ),
    ]
    contenders += [
        Contender(who, _by_peer(load, which), note=note)
        for who, load, note in _PEERS
        if compiles or who != "torch.compile"
    ]
    forward = formulas.linear_logprob_forward(*sizes, dtype.itemsize)
    work = forward if which == "forward" else forward + formulas.linear_logprob_backward(*sizes, dtype.itemsize)
    return Problem(
        op="linear_logprob",
        shape=_named(sizes),
        dtype=dtype,
        which=which,
        work=work,
        draw=_draw(sizes, dtype),
        contenders=tuple(contenders),
        working_set=forward.bytes,
        is_quick=is_quick,
    )


_BONUS = 0.01  # weight of the entropy in the policy loss


def _policy_loss(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor | slice, Tensor | slice], Tensor]:
    """Importance-weighted policy gradient with an entropy bonus."""
    old, advantage = inputs.rest[2:4]

    def loss(logprob: Tensor, entropy: Tensor, edges: Tensor | slice, _: Tensor | slice) -> Tensor:
        ratio = (logprob - old[edges]).exp()
        value: Tensor = -(ratio * advantage[edges]).sum() - _BONUS * entropy.sum()
        return value

    return loss


def _likelihood_loss(_: Inputs) -> Callable[[Tensor, Tensor, Tensor | slice, Tensor | slice], Tensor]:
    """Plain cross-entropy, which fused losses of peers support too."""
    return lambda logprob, entropy, edges, rows: -logprob.sum()


_LOSSES = {"policy gradient": _policy_loss, "cross-entropy": _likelihood_loss}


def _policy_head(loss: str) -> Function:
    def function(inputs: Inputs) -> Outputs:
        hidden, weight = inputs.leaves
        rows, targets, *_ = inputs.rest
        return ops.policy_head(hidden, weight, rows, targets, _LOSSES[loss](inputs))[:1]

    return function


def _dense(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


def _two_steps(loss: str, load: Callable[[], LogProb]) -> Callable[[], Prepare]:
    """A log-prob function, then the loss of its outputs."""

    def prepare() -> Prepare:
        logprob = load()

        def function(inputs: Inputs) -> Outputs:
            hidden, weight = inputs.leaves
            found, entropy = logprob(hidden, weight, inputs.rest[1])
            if entropy is None:
                entropy = found.new_zeros(())
            for output in (found, entropy):
                if output.requires_grad:  # a sum's gradient is an expanded number; kernels need a dense one
                    output.register_hook(_dense)  # type: ignore[no-untyped-call]
            return (_LOSSES[loss](inputs)(found, entropy, slice(None), slice(None)),)

        return in_pass(function, "both")

    return prepare


def _our_logprob() -> LogProb:
    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return ops.linear_logprob(hidden, weight, torch.arange(len(hidden), device=hidden.device), targets)

    return logprob


def _liger_sum() -> Prepare:
    total = peers.liger_sum()

    def function(inputs: Inputs) -> Outputs:
        hidden, weight = inputs.leaves
        return (total(hidden, weight, inputs.rest[1]),)

    return in_pass(function, "both")


def policy_head(
    sizes: Sizes, dtype: torch.dtype, loss: str, *, is_quick: bool = False, compiles: bool = True
) -> Problem:
    """Forward and backward of a loss, "policy gradient" or "cross-entropy", in one pass against two steps."""
    rows, _, vocabulary = sizes
    drawn = _draw(sizes, dtype)

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        inputs = drawn(where, generator)
        noise, advantage = torch.randn(2, rows, device=where, generator=generator)
        old = noise * 0.1 - math.log(vocabulary)
        return Inputs(inputs.leaves, (*inputs.rest, old, advantage), (torch.ones((), device=where),))

    contenders = [
        ours(_policy_head(loss), "both"),
        Contender("ibtpo linear_logprob + loss", _two_steps(loss, _our_logprob), kind="ours"),
    ]
    if loss == "cross-entropy":
        contenders.append(Contender("Liger cross-entropy (summed)", _liger_sum, note="no log-probs, no entropy"))
    contenders += [
        Contender(f"{who} + loss", _two_steps(loss, load), note=note)
        for who, load, note in _PEERS
        if ("no entropy" not in note or loss == "cross-entropy") and (compiles or who != "torch.compile")
    ]
    return Problem(
        op="policy_head",
        shape=f"{_named(sizes)} {loss}",
        dtype=dtype,
        which="both",
        work=formulas.policy_head(*sizes, dtype.itemsize),
        draw=draw,
        contenders=tuple(contenders),
        working_set=formulas.linear_logprob_forward(*sizes, dtype.itemsize).bytes,
        is_quick=is_quick,
    )
