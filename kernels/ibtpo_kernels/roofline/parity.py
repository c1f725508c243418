"""Problems of the ops that give a trainer the sampler's bits: the cost of a fixed order of sums."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ibtpo_kernels import ops
from ibtpo_kernels.by_depth import plan_by_depth, tree_attention_by_depth
from ibtpo_kernels.roofline import attention as packed
from ibtpo_kernels.roofline import formulas, heads
from ibtpo_kernels.roofline.heads import Sizes
from ibtpo_kernels.roofline.peers import attention as peers
from ibtpo_kernels.roofline.problem import Contender, Function, Inputs, Outputs, Problem, in_pass, ours
from ibtpo_kernels.roofline.trees import PAGE
from ibtpo_kernels.sampled import linear_sampled_logprob, sampled_logprob


def in_order_of_decode(
    tree: str, end: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, is_quick: bool
) -> Problem:
    """Attention over a tree in the order of decode against the order of packing; the plan is made before."""
    problem = packed.tree_attention(tree, end, shape, dtype, "forward", device, is_quick=is_quick)

    @cache
    def unpacked() -> peers.Unpacked:
        return peers.Unpacked(end)

    def by_depth(inputs: Inputs) -> Outputs:
        q, k, v = inputs.leaves
        return (tree_attention_by_depth(q, k, v, inputs.rest[1]),)

    def as_packed(inputs: Inputs) -> Outputs:
        q, k, v = inputs.leaves
        return (ops.tree_attention(q, k, v, inputs.rest[0]),)

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        inputs = problem.draw(where, generator)
        return replace(inputs, rest=(*inputs.rest, plan_by_depth(inputs.rest[0], page_size=PAGE)))

    contenders = (
        ours(by_depth, "forward"),
        _ours_too("tree_attention", as_packed),
        Contender(
            "SDPA unpacked",
            lambda: peers.sdpa_unpacked("forward", unpacked),
            comparable=peers.packed_again("forward", unpacked),
        ),
    )
    return replace(problem, op="tree_attention_by_depth", draw=draw, contenders=contenders)


def of_hidden(sizes: Sizes, dtype: torch.dtype, *, is_quick: bool) -> Problem:
    """Log-probs at temperature 1 by the arithmetic of `sample` against those of `linear_logprob`."""
    problem = heads.linear_logprob(sizes, dtype, "forward", is_quick=is_quick, compiles=False)

    def sampled(inputs: Inputs) -> Outputs:
        return (linear_sampled_logprob(*inputs.leaves, *inputs.rest)[1],)

    def fused(inputs: Inputs) -> Outputs:
        return ops.linear_logprob(*inputs.leaves, *inputs.rest)[:1]

    def eager(inputs: Inputs) -> Outputs:
        hidden, weight = inputs.leaves
        rows, targets = inputs.rest
        return (_eager_logprob(hidden @ weight.t(), rows, targets),)

    contenders = (
        ours(sampled, "forward"),
        _ours_too("linear_logprob", fused),
        Contender("eager", lambda: in_pass(eager, "forward")),
    )
    return replace(problem, op="linear_sampled_logprob", contenders=contenders)


def of_logits(rows: int, vocabulary: int, dtype: torch.dtype, *, is_quick: bool) -> Problem:
    """Log-probs of one given token a row of logits."""

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        logits = torch.randn(rows, vocabulary, device=where, generator=generator).to(dtype)
        targets = torch.randint(vocabulary, (rows,), device=where, generator=generator)
        return Inputs((logits,), (torch.arange(rows, device=where), targets))

    contenders = (
        ours(lambda x: (sampled_logprob(*x.leaves, *x.rest)[1],), "forward"),
        Contender("eager", lambda: in_pass(lambda x: (_eager_logprob(*x.leaves, *x.rest),), "forward")),
    )
    work = formulas.sample(rows, vocabulary, dtype.itemsize)
    return Problem(
        op="sampled_logprob",
        shape=f"B{rows} V{vocabulary}",
        dtype=dtype,
        which="forward",
        work=work,
        draw=draw,
        contenders=contenders,
        working_set=work.bytes,
        is_quick=is_quick,
    )


def _ours_too(op: str, function: Function) -> Contender:
    """This project's op without a promise about bits."""
    return Contender(f"ibtpo {op}", lambda: in_pass(function, "forward"), kind="ours")


def _eager_logprob(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)[rows, targets]
