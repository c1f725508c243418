"""The KV pool: fixed pages of keys and values, counted by reference.

A page holds the keys and values of `PAGE` consecutive positions of one path, for every layer. Positions are absolute:
page number i of a path covers positions [16 i, 16 i + 16). A node's `KV` owns a reference on each page its tokens
touch, from the page of its first token to the page of its last::

    positions   0 ........ 16 ....... 32 ....... 48
    root        [p0        |p1   )                      root ends at 27
    child                  [p2       |p3     )          p2 copies rows 16..26 of p1, then is written on from 27
    after child.split(at depth 38):
    head                   [p2       |p3 )              p3 is shared by both halves (two references)
    tail                             [p3     )

A node that resumes a paused one, or the tail of a cut computed anew, shares the page that straddles its start too: it
alone uses the rows past its parent's end. So every page that a node owns is complete from its first row up to what the
node has computed, and walking a path from the root gives its page table: each node overrides the page indices from its
own first page on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_engine.errors import IntegrityError, OutOfPages
from ibtpo_engine.huge_pages import prefer_huge_pages

PAGE = 16


def pages_for(tokens: int) -> int:
    """Pages that `tokens` positions from 0 touch."""
    return -(-tokens // PAGE)


class PagePool:
    """Pages of one engine.

    Args:
        layers, kv_heads, head_dim: shape of the model.
        num_pages: size of the pool.
        dtype, device: of the keys and values.

    Attributes:
        keys, values: [layers, num_pages, PAGE, kv_heads, head_dim].
        layers: the same as a list of (keys, values) a layer.
        refs: [num_pages], owners of each page.
        copied: rows copied by `copy` so far.
    """

    def __init__(
        self, *, layers: int, num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._like: dict[str, Any] = {
            "size": (2, layers, num_pages, PAGE, kv_heads, head_dim),
            "dtype": dtype,
            "device": device,
        }
        self.dtype = dtype
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.restore_memory()
        self.num_pages = num_pages
        self.free_all()
        self.copied = 0

    def restore_memory(self) -> None:
        """Allocate the tensors unless they are there."""
        if not self.layers:
            self._memory = torch.empty(**self._like)
            prefer_huge_pages(self._memory)
            self._memory.zero_()
            self.keys, self.values = self._memory.unbind(0)
            self.layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))
            pages = self._memory.view(torch.uint8).flatten(3)  # [2, layers, num_pages, bytes]
            self._bytes: Any = pages.numpy() if pages.is_cpu else pages  # numpy copies a page in a fifth of the time

    def release_memory(self) -> None:
        """Free the tensors if they are there; every page must be free."""
        assert not any(self.refs), "pages are still owned"
        if self.layers:
            self.layers = []
            del self._memory, self.keys, self.values, self._bytes

    def free_all(self) -> None:
        """Make every page free, whatever its references."""
        self.refs = [0] * self.num_pages  # a list: entries are read and written one by one
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take `n` pages, one reference each.

        Raises:
            OutOfPages: fewer are free; nothing is taken.
        """
        if n > len(self._free):
            raise OutOfPages(f"{n} pages needed, {len(self._free)} free of {self.num_pages}")
        if n == 0:
            return []
        taken = self._free[-n:][::-1]
        del self._free[-n:]
        for page in taken:
            self.refs[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            assert self.refs[page] > 0, f"page {page} is free"
            self.refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference of each page; pages without an owner become free."""
        for page in pages:
            assert self.refs[page] > 0, f"page {page} is already free"
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self._free.append(page)

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy a whole page, of which `rows` rows are valid and count as copied."""
        self._bytes[:, :, target] = self._bytes[:, :, source]
        self.copied += rows

    def check_integrity(self, owned: npt.NDArray[np.int64]) -> None:
        """Check reference counts and free list against `owned` [num_pages], the owners that the caller found.

        Raises:
            IntegrityError: they differ; the first such page is named.
        """
        for page in np.flatnonzero(np.asarray(self.refs) != owned)[:1]:
            raise IntegrityError(f"page {page}: {self.refs[page]} references counted, {owned[page]} owners found")
        free = np.bincount(np.array(self._free, np.int64), minlength=self.num_pages)
        for page in np.flatnonzero(free != (owned == 0))[:1]:
            raise IntegrityError(f"page {page}: {free[page]} times in the free list, {owned[page]} owners")


class KV:
    """The pages under one node.

    Attributes:
        first: index, on the path, of the first page owned (start depth // PAGE).
        pages: ids of the owned pages, consecutive on the path.
        computed: depth up to which keys and values are valid: [0, computed) may be read.
        hidden: [H] final hidden state of the node's last token, if known; its children's first tokens are sampled
            from it.
    """

    __slots__ = ("computed", "first", "hidden", "pages", "pool")

    def __init__(self, pool: PagePool, first: int, pages: list[int], computed: int) -> None:
        self.pool = pool
        self.first = first
        self.pages = pages
        self.computed = computed
        self.hidden: Tensor | None = None

    def split_off(self, at: int) -> KV:
        """Divide at depth `at` and return the upper part; the page that straddles the cut is owned by both."""
        upper_end, lower_first = pages_for(at), at // PAGE
        upper = KV(self.pool, self.first, self.pages[: max(upper_end - self.first, 0)], min(self.computed, at))
        self.pages = self.pages[lower_first - self.first :]
        self.first, self.computed = lower_first, max(self.computed, at)
        if upper_end > lower_first:
            self.pool.share(self.pages[:1])
        return upper

    def release(self) -> None:
        """Give every page back."""
        self.pool.release(self.pages)
        self.pages = []
        self.computed = 0
        self.hidden = None
