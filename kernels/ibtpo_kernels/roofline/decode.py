"""Problems of tree_decode and plan_decode."""

from __future__ import annotations

from functools import cache

import torch

from ibtpo_kernels import ops
from ibtpo_kernels.plan import DecodePlan
from ibtpo_kernels.planner import DecodePlanner
from ibtpo_kernels.roofline import formulas
from ibtpo_kernels.roofline.peers import decode as peers
from ibtpo_kernels.roofline.peers import flashinfer
from ibtpo_kernels.roofline.problem import Contender, Inputs, Outputs, Prepare, Problem, Run, ours
from ibtpo_kernels.roofline.trees import PAGE, DecodeTree


def _tree_decode(inputs: Inputs) -> Outputs:
    q, k_pages, v_pages = inputs.leaves
    return (ops.tree_decode(q, k_pages, v_pages, inputs.rest[0]),)


def _plan(tree: DecodeTree, device: torch.device) -> DecodePlan:
    table = tree.page_table().to(device)
    rows = torch.arange(tree.branches, dtype=torch.int32, device=device)
    return ops.plan_decode(table, rows, torch.full_like(rows, tree.length), page_size=PAGE)


def tree_decode(
    name: str,
    tree: DecodeTree,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_quick: bool = False,
) -> Problem:
    """One token for every branch of a tree; `heads` is (Hq, Hkv, D)."""
    num_heads, kv_heads, dim = heads
    planned = cache(lambda where: _plan(tree, where))

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        shape = (tree.unique_slots // PAGE, PAGE, kv_heads, dim)
        q, k_pages, v_pages = (
            torch.randn(x, device=where, dtype=dtype, generator=generator)
            for x in ((tree.branches, num_heads, dim), shape, shape)
        )
        return Inputs((q, k_pages, v_pages), (planned(where),))

    contenders = [ours(_tree_decode, "forward"), Contender("SDPA duplicated", peers.sdpa_duplicated)]
    if tree.is_two_level:
        contenders.append(Contender("SDPA two calls", lambda: peers.sdpa_shared_prefix(tree.prefix)))
    if device.type == "cuda":
        contenders.append(Contender("FlashInfer paged decode", lambda: flashinfer.decode(most_levels=1)))
        if tree.prefix or len(tree.nodes) > 1:
            contenders.append(Contender("FlashInfer cascade", flashinfer.decode, note="planned beforehand"))
    work = formulas.tree_decode(
        tree.branches * tree.length, tree.unique_slots, tree.branches, num_heads, kv_heads, dim, dtype.itemsize
    )
    return Problem(
        op="tree_decode",
        shape=f"{name} H{num_heads}:{kv_heads} D{dim}",
        dtype=dtype,
        which="forward",
        work=work,
        draw=draw,
        contenders=tuple(contenders),
        working_set=work.bytes,
        is_quick=is_quick,
    )


def _plan_decode() -> Prepare:
    def prepare(inputs: Inputs) -> Run:
        table, rows, lengths = inputs.rest[0].page_table, inputs.rest[0].rows, inputs.rest[0].lengths

        def run() -> Outputs:
            ops.plan_decode(table, rows, lengths, page_size=PAGE)
            return ()

        return run

    return prepare


def _planner(device: torch.device) -> Prepare:
    """Planning after one branch began or ended: one row is new, the others are known."""

    def prepare(inputs: Inputs) -> Run:
        table, rows, lengths = (
            x.cpu() for x in (inputs.rest[0].page_table, inputs.rest[0].rows, inputs.rest[0].lengths)
        )
        planner = DecodePlanner(table, page_size=PAGE, device=None if device.type == "cpu" else device)
        planner.plan(rows, lengths)

        def run() -> Outputs:
            planner.rewrote(0)
            planner.plan(rows, lengths)
            return ()

        return run

    return prepare


def plan_decode(
    name: str, tree: DecodeTree, heads: tuple[int, int, int], device: torch.device, *, is_quick: bool = False
) -> Problem:
    """Planning before tree_decode: ours from scratch and after one change, and FlashInfer's two."""
    num_heads, kv_heads, dim = heads

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        q = torch.randn(tree.branches, num_heads, dim, device=where, dtype=torch.bfloat16, generator=generator)
        pages = q.new_empty(1, PAGE, kv_heads, dim)  # only its shape matters
        return Inputs((q, pages, pages), (_plan(tree, where),))

    contenders = [
        Contender("ibtpo", _plan_decode, kind="ours", note="from nothing"),
        Contender("ibtpo DecodePlanner", lambda: _planner(device), kind="ours", note="after one row changed"),
    ]
    if device.type == "cuda":
        contenders += [
            Contender("FlashInfer paged decode", lambda: flashinfer.decode_plan(most_levels=1), is_checked=False),
            Contender("FlashInfer cascade", flashinfer.decode_plan, is_checked=False),
        ]
    return Problem(
        op="plan_decode",
        shape=f"{name} H{num_heads}:{kv_heads} D{dim}",
        dtype=torch.int32,
        which="plan",
        work=formulas.NOTHING,
        draw=draw,
        contenders=tuple(contenders),
        working_set=4 * tree.branches * tree.length // PAGE,
        is_quick=is_quick,
    )
