"""The radix index: finds cached prefixes by content.

A trie over token ids with one page of tokens an edge. The index holds one reference on every page in it; a page that
an open tree owns too has more and cannot be evicted.
"""

from __future__ import annotations

import heapq

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.pages import PAGE, PagePool


class Entry:
    """One page of tokens below its parent entry."""

    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: Entry | None, key: bytes, page: int, used: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[bytes, Entry] = {}
        self.used = used


class RadixIndex:
    """Prefix to pages, least recently used leaves evicted first.

    Attributes:
        hits: tokens found so far.
        evicted: pages evicted so far.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = Entry(None, b"", -1, 0)
        self._leaves: dict[Entry, None] = {}  # entries without children, in the order in which they became so
        self._clock = 0
        self.num_entries = 0
        self.hits = 0
        self.evicted = 0

    def match(self, tokens: Ints) -> list[int]:
        """Pages of the longest cached prefix of `tokens` (whole pages only); the caller gets a reference on each."""
        self._clock += 1
        entry, pages = self._root, []
        for key in _keys(tokens):
            found = entry.children.get(key)
            if found is None:
                break
            found.used = self._clock
            pages.append(found.page)
            entry = found
        self._pool.share(pages)
        self.hits += len(pages) * PAGE
        return pages

    def insert(self, tokens: Ints, pages: list[int], below: Entry | None = None) -> Entry:
        """Remember the whole pages of `tokens`; existing entries stay.

        Args:
            tokens: int32 [n], a path from its root, or the continuation of the path to `below`.
            pages: its page table, at least n // PAGE long.
            below: an entry that an earlier call returned, since which only further calls of this walk have been made.

        Returns:
            The entry of the last whole page.
        """
        if below is None:
            self._clock += 1
        entry = below or self._root
        for key, page in zip(_keys(tokens), pages, strict=False):
            child = entry.children.get(key)
            if child is None:
                child = entry.children[key] = Entry(entry, key, page, self._clock)
                self._leaves.pop(entry, None)
                self._leaves[child] = None
                self._pool.share([page])
                self.num_entries += 1
            child.used = self._clock
            entry = child
        return entry

    def evictable(self) -> int:
        """Pages that eviction can free: those of entries with no pinned page at or below them."""
        pinned: set[Entry | None] = set()
        for entry in reversed(self._entries()):  # children before parents
            if entry in pinned or self._pool.refs[entry.page] > 1:
                pinned |= {entry, entry.parent}
        return self.num_entries - len(pinned - {self._root})

    def evict(self, n: int) -> int:
        """Free at least `n` pages if that many are evictable, oldest leaves first; returns how many were freed."""
        leaves = [(entry.used, i, entry) for i, entry in enumerate(self._leaves) if self._is_loose(entry)]
        heapq.heapify(leaves)  # the index breaks ties
        freed = 0
        while freed < n and leaves:
            _, i, entry = heapq.heappop(leaves)
            self._remove(entry)
            freed += 1
            parent = entry.parent
            if parent in self._leaves and self._is_loose(parent):
                heapq.heappush(leaves, (parent.used, i, parent))
        self.evicted += freed
        return freed

    def _is_loose(self, leaf: Entry) -> bool:
        return self._pool.refs[leaf.page] == 1

    def clear(self) -> None:
        """Forget everything, for example when keys and values became stale."""
        for entry in self._entries():
            self._pool.release([entry.page])
        self._root.children.clear()
        self._leaves.clear()
        self.num_entries = 0

    def pages(self) -> list[int]:
        """Every page the index holds a reference on."""
        return [entry.page for entry in self._entries()]

    def _remove(self, entry: Entry) -> None:
        parent = entry.parent
        assert parent is not None
        del parent.children[entry.key], self._leaves[entry]
        if not parent.children and parent is not self._root:
            self._leaves[parent] = None
        self._pool.release([entry.page])
        self.num_entries -= 1

    def _entries(self) -> list[Entry]:
        """Every entry, after the one above it."""
        found, stack = [], list(self._root.children.values())
        while stack:
            entry = stack.pop()
            found.append(entry)
            stack.extend(entry.children.values())
        return found


def _keys(tokens: Ints) -> list[bytes]:
    data, size = np.asarray(tokens, np.int32).tobytes(), 4 * PAGE
    return [data[i : i + size] for i in range(0, len(data) - size + 1, size)]
