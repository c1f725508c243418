"""Random forests, page tables and the error budget that the kernel tests share."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels import cpu

BACKENDS = ["reference", "cpu"] if K.has_compiled() else ["reference"]


def _runnable() -> list[str]:
    if not K.has_compiled():
        return []
    best = cpu.native.isa()
    found = [isa for isa in ("baseline", "v3", "v4", "v4bf16", "v4amx") if cpu.native.use_isa(isa)]
    cpu.native.use_isa(best)
    return found


ISAS = _runnable()
"""Instruction sets of the compiled kernels that run on this processor."""


@contextmanager
def on_isa(isa: str) -> Iterator[None]:
    """Run the ops inside on the compiled kernels of one instruction set."""
    best = cpu.native.isa()
    assert cpu.native.use_isa(isa)
    try:
        with K.backend("cpu"):
            yield
    finally:
        cpu.native.use_isa(best)


def forest(num_tokens: int, *, branch: float = 0.15, root: float = 0.02, seed: int = 0) -> Tensor:
    """int32 [N], subtree ends of a random forest in depth-first order."""
    rng = random.Random(seed * 1000003 + num_tokens)
    end = [num_tokens] * num_tokens
    path: list[int] = []
    for i in range(num_tokens):
        draw = rng.random()
        keep = 0 if draw < root else rng.randint(1, max(1, len(path))) if draw < root + branch else len(path)
        while len(path) > keep:
            end[path.pop()] = i
        path.append(i)
    return torch.tensor(end, dtype=torch.int32)


def path_of(end: Tensor, i: int) -> list[int]:
    """The tokens that query i sees, root first."""
    return [j for j in range(i + 1) if int(end[j]) > i]


def qkv(num_tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(num_tokens, heads, dim), *torch.randn(2, num_tokens, kv_heads, dim).unbind()


def paged(
    lengths: Iterable[int], shares: Iterable[int], page_size: int, *, spare: int = 2
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(page_table, rows, lengths, num_pages): row b shares its first shares[b] pages with row b - 1."""
    sizes, taken = list(lengths), list(shares)
    width = max((-(-n // page_size) for n in sizes), default=0) + spare
    table = torch.full((len(sizes), width), -1, dtype=torch.int32)
    next_page = 0
    for b, n in enumerate(sizes):
        count = -(-n // page_size)
        shared = min(taken[b], count, int((table[b - 1] >= 0).sum())) if b else 0
        table[b, :shared] = table[b - 1, :shared]
        table[b, shared:count] = torch.arange(next_page, next_page + count - shared)
        next_page += count - shared
    return table, torch.arange(len(sizes), dtype=torch.int32), torch.tensor(sizes, dtype=torch.int32), next_page


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, *, floor: float = 3e-6) -> None:
    """The kernel's error is at most twice that of plain torch in the same dtype, both against float64.

    `floor` is a few roundings of a sum of terms of size 1, for where plain torch happens to be exact.
    """
    ours = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    theirs = (plain.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    assert ours <= 2 * theirs + floor * scale, f"error {ours:.2e}, plain torch {theirs:.2e}"
