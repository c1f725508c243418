"""Trees without an engine: forks, cuts, drops, and the packed layout against its definition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibtpo_engine.randomness import mix
from ibtpo_engine.tree import Node, Tree


def filled(node: Node, tokens: Sequence[int], *, finish: str | None = "stop", version: int = 0) -> Node:
    """Give a pending node tokens, with numbers that tell the positions apart."""
    depths = np.arange(node.start, node.start + len(tokens), dtype=np.float32)
    return node.fill(np.array(tokens), -depths, -2 * depths, 3 * depths, finish=finish, version=version)


def sampled(parent: Node, tokens: Sequence[int], *, at: int | None = None, version: int = 0) -> Node:
    return filled(parent.fork(at=at)[0], tokens, version=version)


# ---- fork and split ------------------------------------------------------------------------------------------


def test_a_fork_in_the_middle_cuts_the_node_and_the_handle_stays_the_leaf() -> None:
    tree = Tree([1, 2, 3])
    leaf = sampled(tree.root, [10, 11, 12, 13, 14])
    leaf.reward, leaf.notes["mine"] = 0.5, True
    branch = filled(leaf.fork(at=2)[0], [20])
    head = leaf.parent
    assert head is not None
    assert (head.tokens.tolist(), leaf.tokens.tolist()) == ([10, 11], [12, 13, 14])
    assert ((head.start, head.end), (leaf.start, leaf.end)) == ((3, 5), (5, 8))
    assert (head.finish, head.reward, head.notes) == (None, None, {})
    assert (leaf.finish, leaf.reward, leaf.notes) == ("stop", 0.5, {"mine": True})
    assert tree.root.children == [head]
    assert head.children == [leaf, branch]
    assert leaf.prefix().tolist() == [1, 2, 3, 10, 11, 12, 13, 14]
    assert branch.prefix().tolist() == [1, 2, 3, 10, 11, 20]
    assert tree.leaves() == [leaf, branch]


def test_a_cut_divides_every_number_of_a_node() -> None:
    tree = Tree([1, 2, 3])
    leaf = sampled(tree.root, range(6), version=7)
    head = leaf.split(4)
    for node in (head, leaf):
        depths = np.arange(node.start, node.end, dtype=np.float32)
        assert np.array_equal(node.logprob, -depths)
        assert np.array_equal(node.logprob_raw, -2 * depths)
        assert np.array_equal(node.entropy, 3 * depths)
        assert node.version == 7
        assert node.stream == leaf.stream


@given(st.sets(st.integers(1, 19)).map(sorted), st.booleans())
def test_a_cut_into_many_is_one_cut_after_another(offsets: list[int], of_root: bool) -> None:
    def twin() -> Node:
        if of_root:
            return Tree(range(20)).root
        tree = Tree([1, 2, 3])
        first, leaf, last = tree.root.fork(3)
        for node in (first, leaf, last):
            filled(node, range(20), version=7)
        leaf.fork(1)
        return leaf

    one, other = twin(), twin()
    bounds = [0, *offsets]
    parts = [other.split(b - a) for a, b in pairwise(bounds)] + [other]
    got = one.cut(offsets)
    assert got[-1] is one and len(got) == len(offsets) + 1
    for mine, theirs in zip(one.tree.root.subtree(), other.tree.root.subtree(), strict=True):
        for name in ("start", "end", "stream", "birth", "forks", "serial", "version", "finish", "is_leaf"):
            assert getattr(mine, name) == getattr(theirs, name), name
        for name in ("tokens", "logprob", "logprob_raw", "entropy"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        assert (mine in got) == (theirs in parts)
        assert [child.serial for child in mine.children] == [child.serial for child in theirs.children]
        assert mine.parent is None or mine in mine.parent.children
    assert vars(one.tree.used) == vars(other.tree.used)


def test_a_cut_at_numbers_of_numpy_leaves_none_in_the_tree() -> None:
    """A splitter may return an array; depths go into records and JSON."""
    leaf = sampled(Tree([1, 2, 3]).root, range(6))
    parts = leaf.cut(np.array([2, 4]))
    assert [type(number) for part in parts for number in (part.start, part.end)] == [int] * 6
    with pytest.raises(TypeError):
        leaf.cut([1.0])


@pytest.mark.parametrize("offsets", [[0], [6], [3, 3], [4, 2], [-1]])
def test_a_cut_at_the_wrong_places_is_refused(offsets: list[int]) -> None:
    leaf = sampled(Tree([1, 2, 3]).root, range(6))
    with pytest.raises(ValueError, match="must increase inside"):
        leaf.cut(offsets)
    assert len(leaf) == 6 and leaf.parent is leaf.tree.root


def test_forks_at_the_ends_cut_nothing() -> None:
    tree = Tree([1, 2, 3])
    leaf = sampled(tree.root, [10, 11])
    at_start, at_end = leaf.fork(at=0)[0], leaf.fork(at=2)[0]
    assert at_start.parent is tree.root
    assert at_end.parent is leaf
    assert leaf.split(0) is tree.root
    assert leaf.split(2) is leaf
    assert len(tree.nodes()) == 2


def test_a_cut_keeps_the_children_below_the_end_and_the_place_among_the_siblings() -> None:
    tree = Tree([1])
    first, second, third = (filled(node, [5, 6, 7]) for node in tree.root.fork(3))
    below = sampled(second, [8])
    head = second.split(1)
    assert tree.root.children == [first, head, third]
    assert head.children == [second]
    assert second.children == [below]
    assert below.prefix().tolist() == [1, 5, 6, 7, 8]
    assert [node.serial for node in tree.root.children] == sorted(node.serial for node in tree.root.children)


def test_cutting_the_prompt_moves_the_root_and_not_the_prompt() -> None:
    tree = Tree([1, 2, 3, 4])
    tail = tree.root
    leaf = sampled(tail, [9])
    branch = sampled(tail, [8], at=1)
    assert tree.root is tail.parent
    assert tree.root.tokens.tolist() == [1]
    assert branch.prefix().tolist() == [1, 8]
    assert leaf.prefix().tolist() == [1, 2, 3, 4, 9]
    assert tree.prompt_len == 4
    assert tree.num_sampled == 2
    with pytest.raises(ValueError, match="prompt cannot be dropped"):
        tail.drop()


def test_a_forked_leaf_is_a_leaf_until_something_is_sampled_below() -> None:
    tree = Tree([1])
    leaf = sampled(tree.root, [2, 3])
    pending = leaf.fork()[0]
    assert tree.leaves() == [leaf]
    filled(pending, [4])
    assert tree.leaves() == [pending]
    assert not leaf.is_leaf


def test_pending_nodes_are_not_part_of_the_tree_yet() -> None:
    tree = Tree([1, 2])
    tree.root.fork(3)
    assert tree.nodes() == [tree.root]
    assert tree.leaves() == []
    assert tree.num_sampled == 0
    assert len(tree.export()) == 2


def test_every_branch_has_random_numbers_of_its_own_whatever_was_cut_before() -> None:
    def streams(*cuts: int) -> list[int]:
        tree = Tree([1, 2], key=3, seed=4)
        leaf = sampled(tree.root, range(8))
        for depth in cuts:
            leaf.split(depth - leaf.start)
        forks = []
        for depth in (5, 5, 7, 3, 5, 10, 2):  # the first of those that end there, or a new cut
            node = next(node for node in leaf.path() if node.start < depth <= node.end)
            forks += node.fork(at=depth - node.start)
        return [fork.stream for fork in forks]

    assert len(set(streams())) == 7
    assert streams() == streams(4, 6) == streams(3, 5, 7)


def test_seed_and_key_both_name_the_random_numbers() -> None:
    names = [(0, 0), (0, 1), (1, 0), (np.int64(-1), 0), (2**63 - 1, np.int32(5))]
    streams = {Tree([1], seed=seed, key=key).root.stream for seed, key in names}
    assert len(streams) == len(names)
    assert mix(np.int64(3), -1) == mix(3, -1)


# ---- drop and close ------------------------------------------------------------------------------------------


def test_drop_takes_everything_below_and_nothing_else() -> None:
    tree = Tree([1])
    kept, lost = (filled(node, [5, 6, 7]) for node in tree.root.fork(2))
    below = sampled(lost, [8], at=2)
    head = lost.parent
    head.drop()
    assert tree.leaves() == [kept]
    assert all(node.dropped for node in (head, lost, below))
    assert below.prefix().tolist() == [1, 5, 6, 8], "tokens stay readable"
    for node in (head, lost, below):
        with pytest.raises(ValueError, match="was dropped from its tree"):
            node.fork()


def test_a_node_under_way_cannot_be_dropped() -> None:
    tree = Tree([1])
    leaf = sampled(tree.root, [2, 3])
    pending = leaf.fork(at=1)[0]
    pending.in_flight = True
    with pytest.raises(ValueError, match="being extended"):
        leaf.parent.drop()
    assert tree.leaves() == [leaf]
    leaf.drop()
    assert tree.leaves() == []


def test_closing_tells_the_engine_once() -> None:
    closed: list[Tree] = []
    with Tree([1], on_close=closed.append) as tree:
        pass
    tree.close()
    assert closed == [tree]


# ---- bad calls -----------------------------------------------------------------------------------------------


def test_bad_calls_name_what_is_wrong() -> None:
    tree = Tree([1, 2, 3])
    pending = tree.root.fork()[0]
    for message, call in {
        "at=4 lies outside": lambda: tree.root.fork(at=4),
        "at=-1 lies outside": lambda: tree.root.split(-1),
        "empty prompt": lambda: tree.root.split(0),
        "n=0 must be at least 1": lambda: tree.root.fork(0),
        "no tokens yet": lambda: pending.fork(),
        "already holds tokens": lambda: filled(tree.root, [1]),
        "prompt cannot be dropped": lambda: tree.root.drop(),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "prompt", [[], [[1, 2]], 3, [1.5], [True], ["a"], np.array([2**32 + 5])], ids=lambda prompt: repr(prompt)
)
def test_a_prompt_that_is_not_token_ids_is_refused(prompt: object) -> None:
    with pytest.raises(ValueError, match="prompt"):
        Tree(prompt)


# ---- export --------------------------------------------------------------------------------------------------


@st.composite
def random_trees(draw: st.DrawFn) -> Tree:
    """Trees grown as a search grows them: forks anywhere, with and without cuts, some left pending, some dropped."""
    tokens = st.lists(st.integers(0, 9), min_size=1, max_size=6)
    tree = Tree(draw(tokens))
    for _ in range(draw(st.integers(0, 9))):
        nodes = tree.nodes()
        node = nodes[draw(st.integers(0, len(nodes) - 1))]
        at = draw(st.integers(1 if node.parent is None else 0, len(node)))
        action = draw(st.sampled_from(["sample", "sample", "sample", "pending", "split", "drop"]))
        if action == "sample":
            for pending in node.fork(draw(st.integers(1, 3)), at=at):
                filled(pending, draw(tokens), version=draw(st.integers(0, 3)))
        elif action == "pending":
            node.fork(at=at)
        elif action == "split":
            node.split(at)
        elif node.stream != tree.root.stream:
            node.drop()
    return tree


def ancestry(tree: Tree) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """For each token, named by (node's serial, offset): the tokens on its path, itself included, by walking up."""
    seen = {}
    for node in tree.nodes():
        above = {(up.serial, i) for up in node.path()[:-1] for i in range(len(up))}
        for i in range(len(node)):
            seen[node.serial, i] = above | {(node.serial, j) for j in range(i + 1)}
    return seen


@given(random_trees())
def test_packed_visibility_is_ancestry(tree: Tree) -> None:
    """i sees j <=> j is i or above i, computed without `end`."""
    packed, seen = tree.export(), ancestry(tree)
    names = [(packed.nodes[n].serial, i - packed.first[n]) for i, n in enumerate(packed.node)]
    assert len(names) == len(packed) == len(set(names)) == len(seen)
    for i, name in enumerate(names):
        assert {names[j] for j in range(len(packed)) if j <= i < packed.end[j]} == seen[name]


@given(random_trees())
def test_packed_tokens_are_the_trees_in_depth_first_order(tree: Tree) -> None:
    packed = tree.export()
    assert packed.nodes == tree.nodes()
    for n, node in enumerate(packed.nodes):
        rows = slice(packed.first[n], packed.first[n] + len(node))
        assert np.array_equal(packed.pos[rows], np.arange(node.start, node.end))
        assert (packed.node[rows] == n).all()
        assert (packed.version[rows] == node.version).all()
        for name in ("tokens", "logprob", "logprob_raw", "entropy"):
            assert np.array_equal(getattr(packed, name)[rows], getattr(node, name))
        assert packed.end[rows].tolist() == [packed.first[n] + sum(len(below) for below in node.walk())] * len(node)


@given(random_trees())
def test_edges_predict_every_sampled_token_once_from_the_token_before_it(tree: Tree) -> None:
    """The row of an edge is the token just before on the same path, found by following prefixes."""
    packed = tree.export()
    depth = packed.pos
    assert packed.edge_token.tolist() == list(range(tree.prompt_len, len(packed)))
    by_path = {}
    for n, node in enumerate(packed.nodes):
        above = [(up.serial, i) for up in node.path() for i in range(len(up))]
        for i in range(len(node)):
            by_path[packed.first[n] + i] = above[: node.start + i + 1]
    rows = {tuple(path): row for row, path in by_path.items()}
    for row, token in zip(packed.edge_row, packed.edge_token, strict=True):
        assert rows[tuple(by_path[token][:-1])] == row
        assert depth[token] == depth[row] + 1
    assert len(set(packed.edge_token.tolist())) == len(packed.edge_token)
    assert len(packed.edge_token) == tree.num_sampled
