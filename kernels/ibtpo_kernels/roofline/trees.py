"""The trees that are measured: subtree ends for training, page tables for decoding, all on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

PAGE = 16

Segment = tuple[int, int]  # (parent segment or -1, tokens)


def ends(segments: Sequence[Segment]) -> Tensor:
    """int32 [N], subtree ends of segments in depth-first pre-order."""
    stop = np.cumsum([tokens for _, tokens in segments])
    for i in range(len(segments) - 1, -1, -1):
        parent = segments[i][0]
        if parent >= 0:
            stop[parent] = max(stop[parent], stop[i])
    return torch.from_numpy(np.repeat(stop, [tokens for _, tokens in segments]).astype(np.int32))


def chain(tokens: int) -> Tensor:
    """One trajectory: plain causal attention."""
    return ends([(-1, tokens)])


def documents(tokens: int) -> Tensor:
    """Eight trajectories of equal length that share nothing."""
    return ends([(-1, tokens // 8)] * 8)


def fan(prefix: int, branches: int, suffix: int) -> Tensor:
    """A prompt and `branches` suffixes."""
    return ends([(-1, prefix), *[(0, suffix)] * branches])


@cache
def _complete(levels: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Subtree ends of the complete binary tree of one-token nodes."""
    size = 2**levels - 1
    if levels == 1:
        return np.ones(1, np.int64)
    below = _complete(levels - 1)
    return np.concatenate(([size], below + 1, below + 1 + len(below)))


def binary(tokens: int) -> Tensor:
    """The first `tokens` nodes, depth first, of complete binary trees of 16 one-token levels."""
    tree = _complete(16)
    copies = -(-tokens // len(tree))
    every = np.concatenate([tree + i * len(tree) for i in range(copies)])[:tokens]
    return torch.from_numpy(np.minimum(every, tokens).astype(np.int32))


def ib_tree(tokens: int) -> Tensor:
    """IBTree of (B0, L, K, B) = (4, 9, 1, 1): four trajectories, each branched off at a third and at two thirds.

    The prompt takes an eighth of the tokens. Twelve trajectories of equal length in all, two thirds of their tokens.
    """
    third = (tokens - tokens // 8) // 24
    segments: list[Segment] = [(-1, tokens - 24 * third)]
    for _ in range(4):
        first = len(segments)
        segments += [(0, third), (first, third), (first + 1, third), (first + 1, third), (first, 2 * third)]
    return ends(segments)


def trajectories(end: Tensor) -> list[Tensor]:
    """The tokens of each root-to-leaf path, as int64 indices into the packed order."""
    stops: list[int] = end.tolist()
    path: list[int] = []
    found = []
    for i, stop in enumerate(stops):
        while path and stops[path[-1]] <= i:
            path.pop()
        path.append(i)
        if stop == i + 1:
            found.append(torch.tensor(path))
    return found


@dataclass(frozen=True)
class DecodeTree:
    """Branches over shared pages: `nodes[l]` nodes of `tokens[l]` slots at level l, children in equal shares."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.tokens) or any(b % a for a, b in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ValueError(f"DecodeTree: nodes={self.nodes} must each divide the next, one for each of {self.tokens}")
        if any(count % PAGE for count in self.tokens):
            raise ValueError(f"DecodeTree: tokens={self.tokens} must be multiples of the page size {PAGE}")

    @property
    def branches(self) -> int:
        return self.nodes[-1]

    @property
    def length(self) -> int:
        """Slots of a path."""
        return sum(self.tokens)

    @property
    def unique_slots(self) -> int:
        return sum(n * t for n, t in zip(self.nodes, self.tokens, strict=True))

    @property
    def prefix(self) -> int:
        """Slots that every branch shares."""
        return next((sum(self.tokens[:i]) for i, n in enumerate(self.nodes) if n > 1), self.length)

    @property
    def is_two_level(self) -> bool:
        """Whether all that is shared is one prefix."""
        return self.nodes[0] == 1 and set(self.nodes) == {1, self.branches} and self.branches > 1

    def page_table(self) -> Tensor:
        """int32 [branches, length / PAGE]; pages are numbered level by level."""
        columns, first = [], 0
        for count, tokens in zip(self.nodes, self.tokens, strict=True):
            pages = tokens // PAGE
            of_node = first + torch.arange(count * pages, dtype=torch.int32).view(count, pages)
            columns.append(of_node.repeat_interleave(self.branches // count, 0))
            first += count * pages
        return torch.cat(columns, 1).contiguous()

    def __str__(self) -> str:
        """Such as `1,16 nodes of 1024,512`; long lists of equal numbers are shortened."""
        return f"{_listed(self.nodes)} nodes of {_listed(self.tokens)}"


def _listed(values: tuple[int, ...]) -> str:
    if len(values) > 2 and len(set(values)) == 1:
        return f"{values[0]} each"
    return ",".join(map(str, values))
