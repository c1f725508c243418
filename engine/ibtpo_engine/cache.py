"""Pages and index together: where a path's keys and values are, and which nodes own them."""

from __future__ import annotations

import numpy as np

from ibtpo_engine.arrays import Ints
from ibtpo_engine.pages import KV, PAGE, PagePool, pages_for
from ibtpo_engine.radix import Entry, RadixIndex
from ibtpo_engine.tree import Node, Tree


class PageCache:
    """The pool of an engine and the radix index over it.

    Attributes:
        pool: the pages.
        index: finds prefixes by content; evicts pages when the pool runs short.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.index = RadixIndex(pool)

    @property
    def num_loose(self) -> int:
        """Pages that are free or in the index; indexed pages that open trees own too cannot be evicted."""
        return self.pool.num_free + self.index.num_entries

    def take(self, n: int) -> list[int] | None:
        """`n` fresh pages, evicting unpinned prefixes if need be; None if there are not that many."""
        short = n - self.pool.num_free
        if short > 0 and self.index.evict(max(short, self.pool.num_pages // 64)) < short:
            return None
        return self.pool.allocate(n)

    def open(self, node: Node, upto: int) -> KV | None:
        """Pages for positions [node.start, upto) of `node`, whose parent must be computed to its end.

        The page that straddles a fork is copied, so that no branch writes into another's page. A node that continues
        its parent's branch (the lower half of a cut, or a resumed node) shares that page instead: no other node uses
        its rows past the parent's end. None if pages are short.
        """
        parent, start = node.parent, node.start
        assert parent is not None
        first = start // PAGE
        if start % PAGE and node.continues_parent:
            fresh = self.take(max(pages_for(upto) - first - 1, 0))
            if fresh is None:
                return None
            self.pool.share(parent.kv.pages[-1:])
            return KV(self.pool, first, parent.kv.pages[-1:] + fresh, start)
        pages = self.take(pages_for(upto) - first)
        if pages is None:
            return None
        if start % PAGE and pages:
            self.pool.copy(parent.kv.pages[-1], pages[0], start % PAGE)
        return KV(self.pool, first, pages, start)

    def open_root(self, root: Node) -> KV | None:
        """Pages for a whole prompt, those found in the index shared; None if pages are short."""
        found = self.index.match(root.tokens)
        fresh = self.take(pages_for(root.end) - len(found))
        if fresh is None:
            self.pool.release(found)
            self.index.hits -= len(found) * PAGE  # found again at the next try
            return None
        return KV(self.pool, 0, found + fresh, len(found) * PAGE)

    def cover(self, kv: KV, upto: int) -> bool:
        """Extend `kv` to hold positions up to `upto`; False (and nothing taken) if pages are short."""
        fresh = self.take(max(pages_for(upto) - kv.first - len(kv.pages), 0))
        if fresh is None:
            return False
        kv.pages += fresh
        return True

    def path_pages(self, node: Node) -> list[int]:
        """The page table of the path from the root to the end of `node`."""
        pages: list[int] = []
        for ancestor in node.path():
            pages[ancestor.kv.first :] = ancestor.kv.pages
        return pages

    def remember(self, tree: Tree) -> None:
        """Let the index find every path of a tree, as far as it is computed."""
        runs: list[tuple[Node, Ints, Entry | None]] = [(tree.root, tree.root.tokens[:0], None)]
        while runs:
            node, rest, above = runs.pop()  # rest: tokens between the last whole page above the node, `above`, and it
            if node.kv is None:
                continue
            first, pages, tokens = node.kv.first, [*node.kv.pages], [rest, node.tokens]
            while is_computed(node) and len(node.children) == 1 and node.children[0].kv is not None:  # to a fork
                [node] = node.children
                pages[node.kv.first - first :] = node.kv.pages
                tokens.append(node.tokens)
            found = np.concatenate(tokens)[: node.kv.computed - first * PAGE]
            below = self.index.insert(found, pages, above)
            if is_computed(node):
                rest = found[len(found) // PAGE * PAGE :]
                runs += [(child, rest, below) for child in node.children]

    def forget(self, tree: Tree) -> None:
        """Give back every page of a tree; its tokens stay."""
        for node in tree.root.walk():
            if node.kv is not None:
                node.kv.release()
                node.kv = None

    def owned_by(self, tree: Tree) -> int:
        """Distinct pages a tree holds references on."""
        return len({page for node in tree.root.walk() if node.kv is not None for page in node.kv.pages})


def is_computed(node: Node) -> bool:
    """Are the keys and values of all the node's tokens there?"""
    return node.kv is not None and node.kv.computed >= node.end
