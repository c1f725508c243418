"""A check of all the engine's data structures against each other, for tests and debugging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from ibtpo_engine.budget import Used
from ibtpo_engine.errors import IntegrityError
from ibtpo_engine.pages import KV, PAGE
from ibtpo_engine.radix import RadixIndex
from ibtpo_engine.scheduler import Scheduler
from ibtpo_engine.tree import Node, Tree


def check_engine(trees: Iterable[Tree], scheduler: Scheduler) -> None:
    """Raise unless the data structures of an engine agree with each other.

    Pages: references equal owners (nodes of open trees, branches, index), the free list holds the others, each once.
    Trees: `used` is right. Nodes: spans follow each other, keys and values cover what `computed` says.
    Index: linked both ways, whole pages, no page twice. Scheduler: a slot is free or used, page-table rows name the
    pages of their paths, a branch is in one place.

    Raises:
        IntegrityError: they do not; the message says what is wrong, and where.
    """
    subtrees = [tree.root.subtree() for tree in trees]
    nodes = [node for subtree in subtrees for node in subtree]
    held = [node.kv for node in nodes if node.kv is not None] + scheduler.held()
    _check_used(subtrees)
    _check_nodes(nodes)
    _check_pages(held, scheduler)
    _check_index(scheduler.cache.index)
    _check_branches(nodes, scheduler)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise IntegrityError(what)


def _check_pages(held: list[KV], scheduler: Scheduler) -> None:
    pool, index = scheduler.cache.pool, scheduler.cache.index
    owned = np.zeros(pool.num_pages, np.int64)
    for pages in [*(kv.pages for kv in held), index.pages()]:
        np.add.at(owned, pages, 1)
    pool.check_integrity(owned)
    _require(bool(pool.layers) or not owned.any(), "pages are owned although the pool's memory is released")


def _check_used(subtrees: list[list[Node]]) -> None:
    for nodes in subtrees:
        counted, there = vars(nodes[0].tree.used), vars(Used(nodes))
        _require(counted == there, f"a tree counts {counted} and has {there}")


def _check_nodes(nodes: list[Node]) -> None:
    for node in nodes:
        _require(not node.dropped, f"{node!r} was dropped and is still on its tree")
        _require(node.parent is None or node.parent.end == node.start, f"{node!r} does not begin where its parent ends")
        streams = Counter(child.stream for child in node.children)
        _require(all(n == 1 for n in streams.values()), f"two children of {node!r} draw the same random numbers")
        kv = node.kv
        if kv is None:
            continue
        covered = (kv.first + len(kv.pages)) * PAGE
        _require(not node.is_pending, f"{node!r} is pending and has pages")
        _require(kv.first == node.start // PAGE, f"{node!r} owns pages from {kv.first} on")
        _require(node.start <= kv.computed or kv.first * PAGE <= kv.computed, f"{node!r} is computed to {kv.computed}")
        _require(kv.computed <= min(node.end, covered), f"{node!r} is computed to {kv.computed} on pages to {covered}")
        _require(kv.hidden is None or kv.computed == node.end, f"{node!r} has a hidden state before its last token")


def _check_index(index: RadixIndex) -> None:
    entries = index._entries()
    _require(len(entries) == index.num_entries, f"the index counts {index.num_entries} entries and has {len(entries)}")
    leaves = {entry for entry in entries if not entry.children}
    _require(index._leaves.keys() == leaves, f"the index lists {len(index._leaves)} leaves and has {len(leaves)}")
    pages = Counter(entry.page for entry in entries)
    for entry in entries:
        parent = entry.parent
        _require(parent is not None and parent.children.get(entry.key) is entry, f"entry of page {entry.page} is loose")
        _require(len(entry.key) == 4 * PAGE, f"entry of page {entry.page} holds {len(entry.key) // 4} tokens")
        _require(pages[entry.page] == 1, f"page {entry.page} is {pages[entry.page]} times in the index")
        used = parent.used if parent is not None and parent.parent is not None else entry.used
        _require(entry.used <= used, f"entry of page {entry.page} was used after the entry above it")


def _check_branches(nodes: list[Node], scheduler: Scheduler) -> None:
    slots, fills = scheduler.slots, scheduler.fills.values()
    filling = [branch for fill in fills for branch in [*fill.children, fill.branch] if branch is not None]
    places = Counter(branch.node for branch in [*scheduler.waiting, *filling, *scheduler.running.values()])
    _require(all(n == 1 for n in places.values()), "a branch is in two places of the scheduler")
    in_flight = {node for node in nodes if node.in_flight}
    _require(in_flight == set(places), f"{len(in_flight)} nodes are in flight, {len(places)} branches under way")
    _require(in_flight == set(scheduler.branches), f"{len(scheduler.branches)} branches are known by their nodes")
    tickets = [branch.ticket for branch in scheduler.waiting]
    _require(tickets == sorted(tickets), f"the waiting branches are out of order: tickets {tickets[:8]}")
    used = [*scheduler.running, *(fill.slot for fill in scheduler.fills.values())]
    _require(
        sorted([*used, *slots._free]) == list(range(len(slots.table))), f"slots {sorted(used)[:8]}... are miscounted"
    )
    running = sorted((branch.place, slot) for slot, branch in scheduler.running.items())
    _require(scheduler._order == running, "the order of the running branches is not that of the branches")
    for branch in scheduler.running.values():
        length, limit = int(slots.length[branch.slot]), int(slots.limit[branch.slot])
        _require(branch.node.start <= length < limit, f"{branch.node!r} runs at depth {length} of {limit}")
        _check_row(branch.node.parent, branch.kv, slots.table[branch.slot].tolist(), scheduler)
    for fill in scheduler.fills.values():
        _require(fill.computed <= fill.start + len(fill.tokens), f"{fill.node!r} is filled past its end")
        _check_row(fill.node.parent, fill.kv, slots.table[fill.slot].tolist(), scheduler)


def _check_row(parent: Node | None, kv: KV | None, row: list[int], scheduler: Scheduler) -> None:
    assert kv is not None
    pages = scheduler.cache.path_pages(parent) if parent is not None else []
    pages[kv.first :] = kv.pages
    _require(row[: len(pages)] == pages, f"a page-table row below {parent!r} names other pages than its path has")
    _require(set(row[len(pages) :]) <= {-1}, f"a page-table row below {parent!r} names pages past its path")
