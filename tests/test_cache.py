"""The page pool and the radix index against dictionaries, and who owns what when a node is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_helpers import prompt_of, tiny_model, work
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ibtpo_engine import Engine, IntegrityError, OutOfPages, Sampling
from ibtpo_engine.cache import PageCache
from ibtpo_engine.pages import KV, PAGE, PagePool, pages_for
from ibtpo_engine.radix import RadixIndex
from ibtpo_engine.tree import Tree

Path = tuple[int, ...]  # one symbol a page


def make_pool(num_pages: int) -> PagePool:
    return PagePool(
        layers=1, num_pages=num_pages, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )


def tokens_of(path: Sequence[int]) -> npt.NDArray[np.int32]:
    """A page of equal tokens a symbol."""
    return np.repeat(np.array(path, np.int32), PAGE)


# ---- pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_allocating_too_much_takes_nothing() -> None:
    pool = make_pool(4)
    pool.allocate(2)
    with pytest.raises(OutOfPages, match="3 pages needed, 2 free of 4"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_page_is_free_when_its_last_owner_lets_go() -> None:
    pool = make_pool(3)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 3
    with pytest.raises(AssertionError, match="already free"):
        pool.release(pages[:1])


def test_integrity_check_notices_a_lost_and_a_doubly_owned_page() -> None:
    pool = make_pool(3)
    [page] = pool.allocate(1)
    owned = np.zeros(3, np.int64)
    with pytest.raises(IntegrityError, match="references counted"):
        pool.check_integrity(owned)
    owned[page] = 1
    pool.check_integrity(owned)
    owned[page] = 2
    with pytest.raises(IntegrityError, match="references counted"):
        pool.check_integrity(owned)


def test_memory_can_be_given_back_twice_and_taken_again() -> None:
    pool = make_pool(3)
    pool.release_memory()
    pool.release_memory()
    assert not pool.layers
    pool.restore_memory()
    assert pool.layers[0][0].shape == (3, PAGE, 1, 2)


@given(length=st.integers(1, 60), start=st.integers(0, 40), data=st.data())
def test_cutting_a_kv_gives_each_half_the_pages_its_tokens_touch(length: int, start: int, data: st.DataObject) -> None:
    """Both own the page the cut goes through; together they own what the whole did; releasing both frees all."""
    end = start + length
    pool = make_pool(10)
    first = start // PAGE
    kv = KV(pool, first, pool.allocate(pages_for(end) - first), data.draw(st.integers(start, end)))
    pages, computed = list(kv.pages), kv.computed
    at = data.draw(st.integers(start + 1, max(end - 1, start + 1)))
    lower, upper = kv, kv.split_off(at)
    assert upper.pages == pages[: pages_for(at) - first]
    assert lower.pages == pages[at // PAGE - first :]
    assert (upper.first, lower.first) == (first, at // PAGE)
    assert upper.computed == min(computed, at)
    assert lower.computed == max(computed, at)
    shared = set(upper.pages) & set(lower.pages)
    assert len(shared) == (at % PAGE != 0)
    assert all(pool.refs[page] == 1 + (page in shared) for page in pages)
    upper.release()
    lower.release()
    assert pool.num_free == 10


def test_a_prompt_that_finds_no_room_takes_nothing_and_counts_no_hit() -> None:
    cache = PageCache(make_pool(2))
    found, _ = cache.pool.allocate(2)
    cache.index.insert(tokens_of((1,)), [found])
    assert cache.open_root(Tree(tokens_of((1, 2))).root) is None
    assert cache.pool.refs == [2, 1] and cache.index.hits == 0


# ---- radix index ---------------------------------------------------------------------------------------------


def test_only_whole_pages_are_found() -> None:
    pool = make_pool(4)
    index = RadixIndex(pool)
    pages = pool.allocate(3)
    index.insert(np.arange(40, dtype=np.int32), pages)
    assert index.num_entries == 2
    for length, found in ((15, 0), (16, 1), (31, 1), (32, 2), (40, 2), (60, 2)):
        matched = index.match(np.arange(length, dtype=np.int32))
        assert matched == pages[:found]
        pool.release(matched)
    assert index.match(np.arange(1, 40, dtype=np.int32)) == []


def test_eviction_takes_whole_old_prefixes_before_newer_ones() -> None:
    """Also where a prefix's inner pages become leaves only as it goes."""
    pool = make_pool(8)
    index = RadixIndex(pool)
    for path in ((1, 2, 3), (4,)):
        pages = pool.allocate(len(path))
        index.insert(tokens_of(path), pages)
        pool.release(pages)
    assert index.evict(3) == 3
    assert index.match(tokens_of((1,))) == []
    assert len(index.match(tokens_of((4,)))) == 1


def test_an_emptied_index_gives_no_more_whoever_owns_the_last_page() -> None:
    pool = make_pool(2)
    index = RadixIndex(pool)
    first, last = pool.allocate(2)
    index.insert(tokens_of((1,)), [first])
    pool.release([first])
    assert index.evict(2) == 1 and index.evict(2) == 0
    assert pool.refs == [0, 1] and last == pool.num_pages - 1


@pytest.mark.parametrize("use", ["match", "insert"])
def test_using_a_prefix_makes_it_recent(use: str) -> None:
    """Found by a new tree, or remembered again by one that is closed; neither takes another page."""
    pool = make_pool(4)
    index = RadixIndex(pool)
    for symbol in (1, 2):
        pages = pool.allocate(1)
        index.insert(tokens_of((symbol,)), pages)
        assert index.num_entries == symbol
        pool.release(pages)
    if use == "match":
        pool.release(index.match(tokens_of((1,))))
    else:
        pages = pool.allocate(1)
        index.insert(tokens_of((1,)), pages)
        assert index.num_entries == 2
        pool.release(pages)
    assert pool.num_free == 2
    assert index.evict(1) == 1
    assert index.match(tokens_of((2,))) == []
    assert len(index.match(tokens_of((1,)))) == 1


def test_eviction_does_not_look_at_what_is_pinned() -> None:
    """Above a prompt's last page, that is: a call for pages costs the same however long the prompts of open trees."""

    def eviction(length: int) -> int:
        pool = make_pool(8 * length + 1)
        index = RadixIndex(pool)
        for start in range(8):
            index.insert(np.arange(start, start + length * PAGE, dtype=np.int32), pool.allocate(length))
        assert index.num_entries == 8 * length
        return work(lambda: index.evict(1))

    assert eviction(160) < 1.1 * eviction(20)


class CacheMachine(RuleBasedStateMachine):
    """Index and pool against a dictionary from prefixes to (page, last use).

    Clients own paths as open trees do: they match, allocate the rest, insert, and later let go. Eviction must take
    the least recently used prefixes that nobody owns, longest first, and never one that is owned or has owned below.
    """

    NUM_PAGES = 12
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(self.NUM_PAGES)
        self.index = RadixIndex(self.pool)
        self.clock = 0
        self.cached: dict[Path, tuple[int, int]] = {}
        self.owned: list[list[int]] = []

    def references(self) -> Counter[int]:
        owners = Counter(page for pages in self.owned for page in pages)
        return owners + Counter(page for page, _ in self.cached.values())

    def expected_match(self, path: Path) -> list[int]:
        self.clock += 1
        found = []
        for depth in range(1, len(path) + 1):
            if path[:depth] not in self.cached:
                break
            page, _ = self.cached[path[:depth]]
            self.cached[path[:depth]] = (page, self.clock)
            found.append(page)
        return found

    def loose(self) -> list[Path]:
        """Cached prefixes that end and that only the index owns."""
        owned = self.references()
        inner = {path[:-1] for path in self.cached}
        return [path for path, (page, _) in self.cached.items() if path not in inner and owned[page] == 1]

    def expected_evictable(self) -> int:
        pinned = {page for pages in self.owned for page in pages}
        return sum(
            not any(other[: len(path)] == path and page in pinned for other, (page, _) in self.cached.items())
            for path in self.cached
        )

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple))
    def open_path(self, path: Path) -> None:
        wanted = self.expected_match(path)
        found = self.index.match(tokens_of(path))
        assert found == wanted
        self.owned.append(found)
        self.seen["hits"] += len(found)
        missing = len(path) - len(found)
        if missing > self.pool.num_free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(missing)
            return
        found += self.pool.allocate(missing)
        entries = self.index.num_entries
        self.index.insert(tokens_of(path), found)
        assert self.index.num_entries == entries + missing
        self.clock += 1
        for depth, page in enumerate(found, 1):
            self.cached[path[:depth]] = (page, self.clock)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @rule(n=st.integers(1, 5))
    def evict(self, n: int) -> None:
        available = self.expected_evictable()
        before = set(self.cached)
        gone = []
        while len(gone) < n and self.loose():
            oldest = min(self.cached[path][1] for path in self.loose())
            candidates = [path for path in self.loose() if self.cached[path][1] == oldest]
            gone.append(candidates[0])  # of equally old ones, any: only chains of one path are equally old
            del self.cached[candidates[0]]
        assert self.index.evict(n) == len(gone) == min(n, available)
        assert before - set(self.cached) == set(gone)
        self.seen["evicted"] += len(gone)
        self.seen["pinned"] += available < n

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.cached.clear()

    @invariant()
    def agrees(self) -> None:
        references = self.references()
        self.pool.check_integrity(np.array([references[page] for page in range(self.NUM_PAGES)]))
        assert sorted(self.index.pages()) == sorted(page for page, _ in self.cached.values())
        assert self.index.num_entries == len(self.cached)
        assert self.index.evictable() == self.expected_evictable()


def test_pool_and_index_equal_a_dictionary_under_random_operations() -> None:
    CacheMachine.seen.clear()
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
    assert CacheMachine.seen["hits"] > 100, CacheMachine.seen
    assert CacheMachine.seen["evicted"] > 50, CacheMachine.seen
    assert CacheMachine.seen["pinned"] > 10, CacheMachine.seen


# ---- the two together, under an engine -----------------------------------------------------------------------


def test_a_fork_copies_at_most_one_page_and_shares_the_rest() -> None:
    """design.md: whole pages are shared; rows copied = what the prompt leaves on its last page, a branch."""
    engine = Engine(tiny_model(), kv_tokens=1024)
    for length, copied in ((32, 0), (33, 1), (47, 15)):
        before, used = engine.stats()["copied"], engine.cache.pool.num_pages - engine.cache.pool.num_free
        with engine.tree(prompt_of(length, seed=length)) as tree:
            engine.extend(tree.root.fork(4), Sampling(max_tokens=1))
            now = engine.cache.pool.num_pages - engine.cache.pool.num_free
            assert engine.stats()["copied"] - before == 4 * copied
            assert now - used == pages_for(length) + 4
            engine.check_integrity()


def test_a_closed_tree_is_remembered_node_by_node() -> None:
    """Not path by path: below a long prompt, and below each other, branches cost their own tokens."""

    def closing(forks: int) -> float:
        engine = Engine(tiny_model(), kv_tokens=8192)
        tree = engine.tree(prompt_of(8 * forks))
        [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=forks))
        below = [leaf.path()[1].fork(at=at)[0] for at in range(forks - 1, 0, -1)]
        for node in below:
            engine.extend([node], Sampling(max_tokens=node.start + 1 - tree.prompt_len))
        paths = [node.prefix() for node in tree.leaves()]
        spent = work(tree.close)
        for path in paths:
            pages = engine.cache.index.match(path)
            assert len(pages) == (len(path) - 1) // PAGE
            engine.cache.pool.release(pages)
        engine.check_integrity()
        return spent / forks

    assert closing(48) < 1.2 * closing(12)


@pytest.mark.parametrize("offsets", [[], [1, 2, 3], [12, 28, 44], [16], [5, 31, 32, 33, 49], [*range(1, 50)]])
def test_a_closed_tree_is_remembered_wherever_it_is_cut(offsets: list[int]) -> None:
    """Steps of a few tokens are remembered as the runs between forks, in the same entries and pages."""
    engine = Engine(tiny_model(), kv_tokens=1024)
    with engine.tree(prompt_of(20)) as tree:
        first, second = engine.extend(tree.root.fork(2), Sampling(max_tokens=50))
        [below] = engine.extend(first.fork(at=23), Sampling(max_tokens=43))
        paths = [leaf.prefix() for leaf in (first, second, below)]
        second.cut(offsets)
        below.cut([at for at in offsets if at < len(below)])
        tables = [engine.cache.path_pages(leaf) for leaf in (first, second, below)]
    for path, table in zip(paths, tables, strict=True):
        pages = engine.cache.index.match(path)
        assert pages == table[: (len(path) - 1) // PAGE]
        engine.cache.pool.release(pages)
    assert engine.cache.index.num_entries == 1 + 3 + 3 + 1  # the prompt's, `first`'s, `second`'s, `below`'s own
    engine.check_integrity()


def test_what_a_closed_tree_computed_is_found_by_content_and_can_be_evicted() -> None:
    """Not only the prompt: a sampled transcript sent again as a prompt is found too, up to its last whole page."""
    engine = Engine(tiny_model(), kv_tokens=1024)
    with engine.tree(prompt_of(20)) as tree:
        [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=50))
        transcript = leaf.prefix()
    before = engine.stats()
    with engine.tree(transcript) as again:
        engine.extend(again.root.fork(), Sampling(max_tokens=1))
    after = engine.stats()
    assert after["reused"] - before["reused"] == 64, "69 of 70 tokens are computed: four whole pages"
    assert after["computed"] - before["computed"] == 6
    assert engine.cache.index.evictable() == engine.cache.pool.num_pages - engine.cache.pool.num_free > 0
    assert engine.cache.take(engine.cache.pool.num_pages) is not None, "all of it can be evicted"
