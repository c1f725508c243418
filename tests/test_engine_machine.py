"""The engine under random operations in a tiny pool, against a dictionary of paths and plain forward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from engine_helpers import assert_idle, expected_tokens, path_logits, prompt_of, randomise, tiny_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from ibtpo_engine import Engine, Model, Node, OutOfPages, Sampling, Tree
from ibtpo_engine.model import PackedAttention, QKNorm
from ibtpo_engine.pages import PAGE
from ibtpo_engine.radix import Entry
from ibtpo_kernels import rope

VOCABULARY = 14
PROMPTS = [prompt_of(48, seed=0, vocabulary=VOCABULARY)[:n] for n in (1, 15, 16, 33, 48)]
PROMPTS += [prompt_of(40, seed=1, vocabulary=VOCABULARY)[:n] for n in (20, 32)]

anything = st.integers(0, 10**6)  # an index, taken modulo what there is


class Capture(PackedAttention):
    """Plain attention over one path that keeps its keys and values."""

    def __init__(self, model: Model, n: int) -> None:
        cos, sin = model.rotation(torch.arange(n))
        super().__init__(torch.full((n,), n, dtype=torch.int32), cos, sin)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: QKNorm | None) -> Tensor:
        self.keys.append(rope(norms.k_norm(k), self.cos, self.sin))
        self.values.append(v)
        return super().__call__(layer, q, k, v, norms)


class EngineMachine(RuleBasedStateMachine):
    """What is known of the engine: for every open tree, the tokens of the path to each of its nodes.

    The model is float64 so that "the same up to rounding" means the same token.
    """

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(vocabulary=VOCABULARY, positions=128, dtype=torch.float64)
        self.engine = Engine(self.model, kv_tokens=16 * 24, max_branches=3, prefill_tokens=24)
        self.trees: list[Tree] = []
        self.paths: dict[Node, list[int]] = {}
        self.keys = 0

    # ---- choosing and recording --------------------------------------------------------------------------

    def pick(self, which: int) -> Node:
        nodes = list(self.paths)
        return nodes[which % len(nodes)]

    def record(self, node: Node, sampling: Sampling) -> None:
        """A node just sampled: its tokens are what its random numbers draw from a plain forward pass."""
        expected = expected_tokens(self.model, node, sampling)
        assert node.tokens.tolist() == expected.tolist()
        assert node.version == self.engine.version
        ended = node.tokens[-1] in sampling.stop_tokens
        assert node.finish == ("stop" if ended else "length")
        assert ended or node.end == min(node.tree.prompt_len + sampling.max_tokens, 128)
        assert node.parent is not None
        self.paths[node] = [*self.paths[node.parent], *expected.tolist()]
        self.seen["branches"] += 1

    def cut(self, node: Node, at: int) -> Node:
        """Split, and record the new upper half."""
        head = node.split(at)
        if head not in self.paths:
            self.paths[head] = self.paths[node][: head.end]
            self.seen["splits"] += 1
        return head

    # ---- rules -------------------------------------------------------------------------------------------

    @initialize(prompts=st.lists(st.sampled_from(PROMPTS), min_size=2, max_size=3))
    def open_trees(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            self.open_tree(prompt)

    @precondition(lambda self: len(self.trees) < 4)
    @rule(prompt=st.sampled_from(PROMPTS))
    def open_tree(self, prompt: list[int]) -> None:
        tree = self.engine.tree(prompt, key=self.keys)
        self.keys += 1
        self.trees.append(tree)
        self.paths[tree.root] = list(prompt)

    @precondition(lambda self: self.paths)
    @rule(
        picks=st.lists(st.tuples(anything, anything, st.integers(1, 2)), min_size=1, max_size=4),
        more=st.integers(1, 20),
        temperature=st.sampled_from([1.0, 1.0, 0.6, 0.0]),
    )
    def extend(self, picks: list[tuple[int, int, int]], more: int, temperature: float) -> None:
        pending: list[Node] = []
        for which, where, n in picks:
            node = self.pick(which)
            base = self.cut(node, where % len(node) + 1)
            pending += base.fork(n)
        deepest = max(node.start - node.tree.prompt_len for node in pending)
        sampling = Sampling(max_tokens=max(deepest, 0) + more, temperature=temperature, stop_tokens=(2,))
        if any(node.start >= min(node.tree.prompt_len + sampling.max_tokens, 128) for node in pending):
            for node in pending:
                node.drop()
            return
        try:
            assert self.engine.extend(pending, sampling) == pending
        except OutOfPages as error:
            self.seen["out of pages"] += 1
            assert "pinned by" in str(error)
        for node in pending:
            if node.is_pending:
                assert node.dropped
                assert node.parent is not None
                assert node not in node.parent.children
            else:
                self.record(node, sampling)
                self.audit(node)

    @precondition(lambda self: len(self.paths) > 6)
    @rule(which=anything, where=anything, whole=st.booleans())
    def prune(self, which: int, where: int, whole: bool) -> None:
        """Drop what is below a cut, or close the tree."""
        node = self.pick(which)
        below = self.cut(node, where % len(node) + 1)
        if whole or below.stream == node.tree.root.stream:
            below = node.tree.root
        gone = list(below.walk())
        if below is node.tree.root:
            self.trees.remove(node.tree)
            node.tree.close()
        else:
            below.drop()
        for node in gone:
            del self.paths[node]

    @precondition(lambda self: len(self.paths) > 6)
    @rule(seed=st.integers(0, 5))
    def give_up_what_is_cached(self, seed: int) -> None:
        if seed < 3:
            randomise(self.model, seed)
            self.engine.weights_changed()
            self.seen["weights changed"] += 1
        else:
            self.engine.release()
        assert not any(node.kv for node in self.paths)
        assert self.engine.cache.pool.num_free == self.engine.cache.pool.num_pages

    @precondition(lambda self: len(self.paths) > 8)
    @rule(prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4), stop_after=st.integers(1, 9))
    def run(self, prompts: list[list[int]], stop_after: int) -> None:
        """Whole trees beside the open ones, perhaps left before they are all done."""
        sampling = Sampling(max_tokens=24, stop_tokens=(2,))

        def search(tree: Tree) -> Iterator[list[Node]]:
            first, *_ = yield tree.root.fork(3)
            yield first.fork(2, at=max(len(first) - 1, 1))

        keys = range(self.keys, self.keys + len(prompts))
        self.keys += len(prompts)
        trees: list[Tree] = []
        try:
            for _, tree in self.engine.run(search, prompts, sampling, keys=keys):
                trees.append(tree)
                if len(trees) == stop_after:
                    break
        except OutOfPages:
            self.seen["out of pages"] += 1
        for tree in trees:
            assert len(tree.leaves()) >= 4
            for node in tree.nodes()[1:]:
                assert node.tokens.tolist() == expected_tokens(self.model, node, sampling).tolist()
        self.seen["trees run"] += len(trees)

    @precondition(lambda self: self.paths)
    @rule(which=anything, every=st.integers(2, 7), abort_after=st.integers(1, 12), keep=st.booleans())
    def stream(self, which: int, every: int, abort_after: int, keep: bool) -> None:
        """Two forks that pause now and then, told of as they come; perhaps one is aborted, and what paused goes on."""
        base = self.pick(which)
        more = Sampling(
            max_tokens=max(base.end - base.tree.prompt_len, 0) + 12,
            stop_tokens=(2,),
            pause=lambda tokens, new: len(tokens) % every == 0,
        )
        if base.end >= min(base.tree.prompt_len + more.max_tokens, 128):
            return
        pending, told = base.fork(2), Counter[Node]()
        while pending:
            try:
                for count, event in enumerate(self.engine.stream(pending, more)):
                    told[event.node] += len(event.tokens)
                    if count == abort_after:
                        self.engine.abort([event.node], keep=keep)
            except OutOfPages:
                self.seen["out of pages"] += 1
            done = [node for node in pending if not node.is_pending]
            for node in done:
                assert node.parent is not None
                assert node.tokens.tolist() == expected_tokens(self.model, node, more).tolist()
                assert node.finish in (None, "stop", "length", "abort")
                assert told[node] <= len(node)
                self.paths[node] = [*self.paths[node.parent], *node.tokens.tolist()]
                self.seen[f"streamed to {node.finish}"] += 1
                self.audit(node)
            pending = [node.resume() for node in done if node.finish is None]

    @precondition(lambda self: self.paths)
    @rule(which=anything, where=anything, length=st.integers(1, 20), keep=st.booleans())
    def score(self, which: int, where: int, length: int, keep: bool) -> None:
        """Given tokens below any node equal a plain forward pass, kept or not."""
        node = self.pick(which)
        base = self.cut(node, where % len(node) + 1)
        if base.end + length > 128:
            return
        suffix = prompt_of(length, seed=where, vocabulary=VOCABULARY)
        try:
            [score] = self.engine.score(base, [suffix], keep=keep)
        except OutOfPages:
            self.seen["out of pages"] += 1
            return
        path = [*self.paths[base], *suffix]
        log_p = torch.log_softmax(path_logits(self.model, path)[base.end - 1 : -1], -1)
        wanted = log_p[torch.arange(length), torch.tensor(suffix)].numpy()
        assert np.abs(score.logprob - wanted).max() < 1e-4
        self.seen["scored"] += 1
        if score.node is not None:
            self.paths[score.node] = path
            self.audit(score.node)

    def audit(self, node: Node) -> None:
        """Every key and value that may be read, and the hidden state kept, is what a plain forward pass computes."""
        keys, values = self.computed(self.paths[node])
        for ancestor in node.path():
            if ancestor.kv is None:
                continue
            begin, end = ancestor.kv.first * PAGE, min(ancestor.kv.computed, ancestor.end)
            self.compare(ancestor.kv.pages, keys, values, begin, end)
            self.seen["rows audited"] += max(end - begin, 0)
            if ancestor.kv.hidden is not None:
                logits = path_logits(self.model, self.paths[ancestor])[-1]
                assert (ancestor.kv.hidden @ self.model.head.T - logits).abs().max() < 1e-9
                self.seen["hidden states audited"] += 1

    @precondition(lambda self: self.engine.cache.index.num_entries > 4)
    @rule()
    def audit_the_index(self) -> None:
        """Every page the index could hand out holds the keys and values of its prefix, under the weights of now."""
        stack: list[tuple[Entry, bytes]] = [(self.engine.cache.index._root, b"")]
        while stack:
            entry, prefix = stack.pop()
            stack += [(child, prefix + child.key) for child in entry.children.values()]
            if entry.page >= 0:
                tokens = np.frombuffer(prefix, np.int32)
                keys, values = self.computed(tokens.tolist())
                self.compare([entry.page], keys, values, len(tokens) - PAGE, len(tokens))
                self.seen["index pages audited"] += 1

    def computed(self, tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        capture = Capture(self.model, len(tokens))
        with torch.no_grad():
            self.model(torch.tensor(tokens), capture)
        return capture.keys, capture.values

    def compare(self, pages: list[int], keys: list[Tensor], values: list[Tensor], begin: int, end: int) -> None:
        if begin >= end:
            return
        pool = self.engine.cache.pool
        for layer, (k_pages, v_pages) in enumerate(pool.layers):
            for stored, wanted in ((k_pages, keys[layer]), (v_pages, values[layer])):
                rows = stored[pages].flatten(0, 1)[: end - begin]
                assert (rows - wanted[begin:end]).abs().max() < 1e-9

    # ---- after every rule --------------------------------------------------------------------------------

    @invariant()
    def pages_are_accounted_for(self) -> None:
        self.engine.check_integrity()
        scheduler = self.engine.scheduler
        assert not (scheduler.waiting or scheduler.running or scheduler.fills)
        assert scheduler.slots.num_free == len(scheduler.slots.table)

    @invariant()
    def every_path_is_what_it_was(self) -> None:
        for node, tokens in self.paths.items():
            assert node.prefix().tolist() == tokens
        assert {node for tree in self.trees for node in tree.nodes()} == set(self.paths)

    def teardown(self) -> None:
        for tree in self.trees:
            tree.close()
        self.audit_the_index()
        assert_idle(self.engine)
        self.seen.update(self.engine.stats())


def test_random_operations_never_lose_a_page_or_change_a_token() -> None:
    EngineMachine.seen.clear()
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=24, stateful_step_count=30, deadline=None))
    seen = EngineMachine.seen
    for name in ("branches", "reused", "copied", "evicted_pages", "splits", "trees run", "out of pages"):
        assert seen[name] > 20, (name, seen)
    for name in ("streamed to None", "streamed to stop", "scored"):
        assert seen[name] > 20, (name, seen)
    for name in ("preemptions", "weights changed", "streamed to abort"):
        assert seen[name] > 5, (name, seen)
    for name in ("rows audited", "hidden states audited", "index pages audited"):
        assert seen[name] > 100, (name, seen)
