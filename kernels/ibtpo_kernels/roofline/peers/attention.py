"""Attention over a tree by peers: causal SDPA on each trajectory, and FlexAttention with the tree as a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ibtpo_kernels.roofline.peers.find import compiled, module
from ibtpo_kernels.roofline.problem import Inputs, Outputs, Pass, Prepare, Run, Unavailable, in_pass
from ibtpo_kernels.roofline.trees import trajectories


class Unpacked:
    """Trajectories of a tree as a batch, padded on the right to the longest, as in a trainer without trees.

    Attributes:
        index: int64 [G, longest], the packed token at each place; padding repeats the trajectory's first token.
        place: int64 [N], for each packed token the first of its places, flattened.
    """

    def __init__(self, end: Tensor) -> None:
        paths = trajectories(end.cpu())
        self.num_tokens = len(end)
        lengths = torch.tensor([len(p) for p in paths])
        first = torch.stack([p[0] for p in paths])
        self.index = first[:, None].repeat(1, int(lengths.max()))
        for row, path in zip(self.index, paths, strict=True):
            row[: len(path)] = path
        self.is_real = torch.arange(self.index.shape[1]) < lengths[:, None]
        flat = torch.arange(self.index.numel())[self.is_real.flatten()]
        tokens = self.index.flatten()[flat]
        self.place = torch.full((len(end),), self.index.numel()).scatter_reduce_(0, tokens, flat, "amin")

    def unpack(self, x: Tensor) -> Tensor:
        """[N, heads, D] -> [G, heads, longest, D]."""
        return x[self.index.to(x.device)].transpose(1, 2).contiguous()

    def unpack_once(self, d_out: Tensor) -> Tensor:
        """As `unpack`, but each packed row only at its first place and zeros at the others, so that sums stay equal."""
        rows = d_out.new_zeros(self.index.numel(), *d_out.shape[1:])
        rows[self.place.to(d_out.device)] = d_out
        return rows.view(*self.index.shape, *d_out.shape[1:]).transpose(1, 2).contiguous()

    def pack(self, x: Tensor) -> Tensor:
        """Values at the first places: [G, heads, longest, D] -> [N, heads, D]."""
        return x.transpose(1, 2).flatten(0, 1)[self.place.to(x.device)]

    def pack_sum(self, x: Tensor) -> Tensor:
        """Sums over all places except padding: the packed gradient of an unpacked tensor."""
        rows, real = x.transpose(1, 2).flatten(0, 1).float(), self.is_real.flatten().to(x.device)
        tokens = self.index.flatten().to(x.device)
        return rows.new_zeros(self.num_tokens, *rows.shape[1:]).index_add_(0, tokens[real], rows[real])


def sdpa_unpacked(which: Pass, unpacked: Callable[[], Unpacked]) -> Prepare:
    """Causal SDPA over the trajectories, each with its own copy of shared tokens."""

    def attend(inputs: Inputs) -> Outputs:
        q, k, v = inputs.leaves
        return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]),)

    def prepare(inputs: Inputs) -> Run:
        apart = unpacked()
        leaves = tuple(apart.unpack(x) for x in inputs.leaves)
        d_out = tuple(apart.unpack_once(d) for d in inputs.d_out)
        return in_pass(attend, which)(Inputs(leaves, (), d_out))

    return prepare


def packed_again(which: Pass, unpacked: Callable[[], Unpacked]) -> Callable[[Inputs, Outputs], Outputs]:
    """Outputs of `sdpa_unpacked` in the packed layout."""

    def comparable(_: Inputs, outputs: Outputs) -> Outputs:
        apart, found = unpacked(), [x for x in outputs if x is not None]
        if which == "forward":
            return (apart.pack(found[0]),)
        gradients = tuple(apart.pack_sum(x) for x in found[-3:])
        return gradients if which == "backward" else (apart.pack(found[0]), *gradients)

    return comparable


@cache
def _flex() -> Any:
    return module("torch.nn.attention.flex_attention", "torch")


def _tree_mask(end: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    return sees


def block_mask(end: Tensor, build: Callable[..., Any] | None = None) -> Any:
    """FlexAttention's block mask of a tree."""
    make = build or _flex().create_block_mask
    return make(_tree_mask(end), None, None, len(end), len(end), device=end.device)


def mask_builder(device: torch.device) -> Callable[[Tensor], Any]:
    """The block mask's builder, compiled on a GPU as its documentation advises: uncompiled it makes a dense [N, N]."""
    build = compiled(_flex().create_block_mask) if device.type == "cuda" else None
    return lambda end: block_mask(end, build)


def flex(which: Pass, device: torch.device, *, rebuilds: bool) -> Prepare:
    """FlexAttention compiled, with its block mask kept from call to call, or built in every call.

    Inputs are laid out [1, heads, N, D] beforehand; outputs have that layout, see `flex_packed`.
    """
    if device.type == "cpu" and which != "forward":
        raise Unavailable("FlexAttention has no backward on the CPU")
    if which == "backward":  # runs repeatedly on one forward's results, so must not reuse them as scratch
        module("torch._functorch.config", "torch").donated_buffer = False
    build = mask_builder(device)
    attend = compiled_flex()

    def prepare(inputs: Inputs) -> Run:
        end = inputs.rest[0]
        kept = None if rebuilds else build(end)

        def function(x: Inputs) -> Outputs:
            q, k, v = x.leaves
            mask = build(end) if kept is None else kept
            return (attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]),)

        leaves = tuple(x.transpose(0, 1)[None].contiguous() for x in inputs.leaves)
        d_out = tuple(d.transpose(0, 1)[None].contiguous() for d in inputs.d_out)
        return in_pass(function, which)(Inputs(leaves, (), d_out))

    return prepare


def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention for fixed shapes; earlier compilations are kept, since the mask builder may be among them."""
    fast: Callable[..., Tensor] = torch.compile(_flex().flex_attention, dynamic=False)
    return fast


def flex_packed(_: Inputs, outputs: Outputs) -> Outputs:
    """[1, heads, N, D] -> [N, heads, D]."""
    return tuple(None if x is None else x[0].transpose(0, 1) for x in outputs)
