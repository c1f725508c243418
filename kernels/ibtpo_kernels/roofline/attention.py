"""Problems of tree_attention."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ibtpo_kernels import ops
from ibtpo_kernels.roofline import formulas
from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.peers import attention as peers
from ibtpo_kernels.roofline.problem import Contender, Inputs, Outputs, Pass, Prepare, Problem, Run, ours


def _tree_attention(inputs: Inputs) -> Outputs:
    q, k, v = inputs.leaves
    return (ops.tree_attention(q, k, v, inputs.rest[0]),)


def work(end: Tensor, heads: int, kv_heads: int, dim: int, size: int, which: Pass) -> Work:
    """The work of one pass over a tree."""
    sizes = (formulas.visible_pairs(end), len(end), heads, kv_heads, dim, size)
    forward, backward = formulas.tree_attention_forward(*sizes), formulas.tree_attention_backward(*sizes)
    return {"forward": forward, "backward": backward, "both": forward + backward, "plan": formulas.NOTHING}[which]


def tree_attention(
    tree: str,
    end: Tensor,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    which: Pass,
    device: torch.device,
    *,
    is_quick: bool = False,
) -> Problem:
    """Attention over one tree.

    Args:
        tree: its name.
        end: int32 [N] on the CPU.
        heads: (Hq, Hkv, D).
        device: decides which contenders there are.
    """
    num_heads, kv_heads, dim = heads
    num_tokens = len(end)

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        q, k, v, d_out = (
            torch.randn(num_tokens, h, dim, device=where, dtype=dtype, generator=generator)
            for h in (num_heads, kv_heads, kv_heads, num_heads)
        )
        return Inputs((q, k, v), (end.to(where),), (d_out,))

    @cache
    def unpacked() -> peers.Unpacked:
        return peers.Unpacked(end)

    packed = peers.packed_again(which, unpacked)
    contenders = [
        ours(_tree_attention, which),
        Contender("SDPA unpacked", lambda: peers.sdpa_unpacked(which, unpacked), comparable=packed),
        Contender(
            "FlexAttention (mask kept)",
            lambda: peers.flex(which, device, rebuilds=False),
            comparable=peers.flex_packed,
        ),
    ]
    if which != "backward":
        contenders.append(
            Contender(
                "FlexAttention (mask rebuilt)",
                lambda: peers.flex(which, device, rebuilds=True),
                comparable=peers.flex_packed,
                note="block mask built in every call",
            )
        )
    size = dtype.itemsize
    return Problem(
        op="tree_attention",
        shape=f"{tree} N{num_tokens} H{num_heads}:{kv_heads} D{dim}",
        dtype=dtype,
        which=which,
        work=work(end, num_heads, kv_heads, dim, size, which),
        draw=draw,
        contenders=tuple(contenders),
        working_set=size * num_tokens * dim * (2 * num_heads + 2 * kv_heads) * (1 if which == "forward" else 2),
        is_quick=is_quick,
    )


def mask_plan(tree: str, end: Tensor, device: torch.device) -> Problem:
    """Building the mask of a new tree before attention can run: nothing for ours, whose mask is `end`."""

    def draw(where: torch.device, _: torch.Generator) -> Inputs:
        return Inputs((), (end.to(where),))

    def load() -> Prepare:
        build = peers.mask_builder(device)

        def prepare(inputs: Inputs) -> Run:
            def run() -> Outputs:
                build(inputs.rest[0])
                return ()

            return run

        return prepare

    return Problem(
        op="tree_attention",
        shape=f"{tree} N{len(end)}",
        dtype=torch.int32,
        which="plan",
        work=formulas.NOTHING,
        draw=draw,
        contenders=(Contender("FlexAttention block mask", load, is_checked=False, note="ours has none to build"),),
        working_set=4 * len(end),
    )
