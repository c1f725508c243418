"""The core of an engine: the pool, the open trees, the weights it watches, and one step over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import numpy.typing as npt
import torch
from torch import nn

from ibtpo_engine.branches import Branch
from ibtpo_engine.budget import Budget, Used, within_budgets
from ibtpo_engine.cache import PageCache
from ibtpo_engine.capture import Capture, capture_for
from ibtpo_engine.errors import BranchFailed, OutOfPages, StaleWeights
from ibtpo_engine.features import features_of
from ibtpo_engine.growing import Growing, Searches
from ibtpo_engine.integrity import check_engine
from ibtpo_engine.limits import depth_limit
from ibtpo_engine.memory import tokens_in_share
from ibtpo_engine.model import Model
from ibtpo_engine.pages import PAGE, PagePool, pages_for
from ibtpo_engine.parity import Parity, check_parity
from ibtpo_engine.randomness import seeded_stream
from ibtpo_engine.runner import Runner
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.scheduler import Scheduler
from ibtpo_engine.shadow import Shadow
from ibtpo_engine.stops import Decode
from ibtpo_engine.threads import in_one_thread
from ibtpo_engine.tree import Node, Tree
from ibtpo_engine.watch import Pauses
from ibtpo_engine.weights import WeightWatch


class EngineCore:
    """Opens trees, steps through the branches submitted, keeps pages and weights in order.

    `Engine`, whose arguments these are, adds the ways to grow trees.
    """

    def __init__(
        self,
        model: Model | Shadow,
        *,
        kv_tokens: int | None = None,
        kv_share: float | None = None,
        seed: int = 0,
        max_branches: int = 256,
        prefill_tokens: int = 2048,
        decode: Decode | None = None,
        parity: Parity = "fast",
        cuda_graphs: bool = False,
    ) -> None:
        if not isinstance(model, Model | Shadow):
            raise TypeError(
                f"Engine: {type(model).__name__} is not an ibtpo_engine.Model; call load_model(folder), or "
                "borrow(model) on a transformers model"
            )
        self.shadow = model if isinstance(model, Shadow) else None
        self._model = model.model if isinstance(model, Shadow) else model
        if kv_tokens is not None and kv_share is not None:
            raise ValueError(f"Engine: kv_tokens={kv_tokens} and kv_share={kv_share} both size the pool; give one")
        if kv_tokens is None:
            kv_tokens = 200_000 if kv_share is None else tokens_in_share(self.model, kv_share)
        for name, value in (
            ("kv_tokens", kv_tokens),
            ("max_branches", max_branches),
            ("prefill_tokens", prefill_tokens),
        ):
            if not hasattr(value, "__index__"):
                raise ValueError(f"Engine: {name}={value!r} must be an integer")
            if value < 1:
                raise ValueError(f"Engine: {name}={value} must be at least 1")
        linear = (module for module in self.model.model.layers.modules() if isinstance(module, nn.Linear))
        check_parity(parity, dtype=self.model.dtype, device=self.model.device, projections=linear)
        self.parity: Parity = parity
        self.seed = seed
        self.decode = decode
        self.version = 0
        self.seconds_waiting = 0.0  # for rewards and other futures, with nothing to sample
        self.kv_tokens = pages_for(kv_tokens) * PAGE
        self.max_branches = max_branches
        self.prefill_tokens = prefill_tokens
        self._trees: dict[int, Tree] = {}  # open trees by ordinal
        self._searches: list[Searches] = []  # of each `run` under way
        self.used_by: int | None = None  # the thread in the middle of a method that is `in_one_thread`
        self._failed: dict[Node, Exception] = {}  # errors of nodes whose caller is not told yet
        self._ended: deque[Node] = deque()  # finished nodes whose searches are not told yet
        self._opened = 0
        self._prompt_pages = 0  # of all open trees
        self._weights = WeightWatch(self.model, *([self.shadow.masters] if self.shadow else []))
        self._build(capture_for(self.model) if cuda_graphs else None)

    @property
    def model(self) -> Model:
        """The model that is sampled from, for good: another one needs another engine."""
        return self._model

    def _build(self, capture: Capture | None) -> None:
        config = self.model.config
        pool = PagePool(
            layers=config.num_layers,
            num_pages=self.kv_tokens // PAGE,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        self._begin(Runner(self.model, pool, self.parity, capture))

    def _begin(self, runner: Runner) -> None:
        """Start with a pool whose pages are all free, and nothing in progress."""
        self.cache = PageCache(runner.pool)
        self.scheduler = Scheduler(
            runner,
            self.cache,
            max_branches=self.max_branches,
            fill_tokens=self.prefill_tokens,
            max_pages=pages_for(min(self.model.config.max_positions, self.kv_tokens)) + 1,
        )
        self._pauses = Pauses(self.scheduler)

    # ---- trees -----------------------------------------------------------------------------------------------

    @in_one_thread
    def tree(self, prompt: npt.ArrayLike, *, key: int | None = None, budget: Budget | None = None) -> Tree:
        """Open a tree on a prompt; its pages stay in the pool until it is closed.

        Args:
            prompt: int [n], token ids.
            key: names the tree's random numbers; by default its place in the order of opening.
            budget: what the tree may take at most; spending it does not affect other trees.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary, or leaves no room in the context or budget.
            OutOfPages: the prompt alone is larger than the whole pool.
        """
        ordinal = self._opened
        key = ordinal if key is None else key
        tree = Tree(prompt, key=key, seed=self.seed, ordinal=ordinal, budget=budget, on_close=self._close)
        self._check_prompt(tree)
        self._opened += 1
        self._trees[ordinal] = tree
        self._prompt_pages += pages_for(tree.prompt_len)
        return tree

    def _check_prompt(self, tree: Tree) -> None:
        tokens, context = tree.root.tokens, self.model.config.max_positions
        if tokens.min() < 0 or tokens.max() >= self.model.config.vocab_size:
            raise ValueError(
                f"prompt: token id {int(tokens.max() if tokens.min() >= 0 else tokens.min())} lies outside the "
                f"vocabulary [0, {self.model.config.vocab_size}); use the model's own tokenizer"
            )
        if len(tokens) >= context:
            raise ValueError(
                f"prompt of {len(tokens)} tokens leaves no room in the model's context of {context}; shorten it"
            )
        most = tree.budget.pages if tree.budget is not None else None
        if most is not None and pages_for(len(tokens)) >= most:
            raise ValueError(
                f"prompt of {len(tokens)} tokens takes {pages_for(len(tokens))} pages and leaves no room in "
                f"Budget.pages={most}; raise it or shorten the prompt"
            )
        if len(tokens) >= self.kv_tokens:
            raise OutOfPages(
                f"prompt of {len(tokens)} tokens needs {pages_for(len(tokens) + 1)} pages, the pool has "
                f"{self.cache.pool.num_pages}; raise kv_tokens (now {self.kv_tokens})"
            )

    @in_one_thread
    def _close(self, tree: Tree) -> None:
        self._cancel(tree.root.subtree())
        growth = self._growth_of(tree)
        if growth is not None:
            growth.tree_closed()
        self._failed = {node: error for node, error in self._failed.items() if node.tree is not tree}
        self.cache.remember(tree)
        self.cache.forget(tree)
        if self._trees.pop(tree.ordinal, None) is not None:
            self._prompt_pages -= pages_for(tree.prompt_len)

    # ---- stepping --------------------------------------------------------------------------------------------

    @in_one_thread
    def _submit(self, nodes: Sequence[Node], sampling: Sampling) -> list[Branch]:
        context = self.model.config.max_positions
        limits = {node: depth_limit(node, self._trees, sampling.max_tokens, context) for node in nodes}
        if len(limits) < len(nodes):
            raise ValueError("a node is given twice; use node.fork(n=2) for two branches")
        sampling.check_serves(self.model.config.vocab_size, has_decode=self.decode is not None)
        features = {node: features_of(node, sampling, self.decode) for node in nodes}  # all, before any is submitted
        branches = []
        for node, limit in within_budgets(limits, self._reserved).items():
            if sampling.seed is not None:
                node.stream = seeded_stream(sampling.seed, node.births())
            branch = Branch(node, sampling, limit.depth, at_limit=limit.finish, features=features[node])
            branches.append(self.scheduler.submit(branch))
            if sampling.pause is not None:
                self._pauses.add(branch, sampling.pause)
        return branches

    def _reserved(self, tree: Tree) -> dict[Node, int]:
        """Depths that a tree's branches may reach: those in progress, and those that its search has not received."""
        growth = self._growth_of(tree)
        depths = {node: branch.limit for node, branch in self.scheduler.branches.items() if node.tree is tree}
        return depths if growth is None else depths | growth.reserved

    @in_one_thread
    def _step(self, most: int = 1) -> None:
        """Run at most `most` scheduler steps; finished nodes are reported to their searches, whichever call steps.

        A branch whose mask, pause or decoder raised is taken off its tree, and the error goes to its search or to
        `_raise_failed`; other branches are not affected.
        """
        try:
            self._take_steps(1 if self._pauses else most)
        except BranchFailed as failed:
            self._fail(failed)

    def _fail(self, failed: BranchFailed) -> None:
        self._cancel([failed.node])
        growth = self._growth_of(failed.node.tree)
        if growth is None or not growth.fail(failed.node, failed.error):
            self._failed[failed.node] = failed.error

    def _raise_failed(self, nodes: Iterable[Node]) -> None:
        """Raise the error of one of these nodes, if one failed."""
        for node in nodes if self._failed else ():
            if node in self._failed:
                raise self._failed.pop(node)

    def _take_steps(self, most: int) -> None:
        if self.scheduler.is_plain:  # no torch in it: entering the modes would cost as much as the rest of the step
            finished: list[Node] | None = self.scheduler.step(self.version, most)
        else:
            with torch.inference_mode(), self._no_autocast():
                self.cache.pool.restore_memory()
                finished = self.scheduler.step(self.version, most)
        if finished is None:
            self._suspend_one()
            return
        if self._pauses:  # they look at each token, so before a reward is called, which may take steps of its own
            finished = finished + self._pauses.due(self.version)
        while self.scheduler.failures:
            self._fail(self.scheduler.failures.pop(0))
        self._ended.extend(finished)
        self._report_ended()

    @in_one_thread
    def _cancel(self, nodes: Iterable[Node]) -> None:
        """Take those of these nodes that are being extended off their trees."""
        nodes = [node for node in nodes if node.in_flight]
        if nodes:
            self.scheduler.cancel(nodes)

    def _give_up(self, leave: Callable[[], None], error: BaseException) -> None:
        """A call ends with an error: `leave` takes what it began off the trees.

        An interrupt may come at any moment: after one the engine is checked, and reset if that fails. It is also reset
        if the interrupt comes in here.
        """
        interrupted = not isinstance(error, Exception | GeneratorExit)
        try:
            leave()
            if interrupted:
                self.check_integrity()
        except BaseException as another:
            again = not isinstance(another, Exception)
            if not (interrupted or again):
                raise
            self.reset()
            leave()
            if again:
                raise

    def reset(self) -> None:
        """Forget all keys and values and take everything in progress off its tree; open trees keep their tokens.

        This repairs what an interrupt (Ctrl-C) at the wrong moment left inconsistent; calls that sample do so
        themselves if needed.
        """
        for tree in self._trees.values():
            growth = self._growth_of(tree)
            for node in tree.root.subtree():
                node.kv = None
                if node.in_flight:
                    node.abandon()
                    if growth is not None:
                        growth.lost(node)
            tree.used = Used(tree.root.subtree())
        counters, index = self.scheduler.counters, self.cache.index
        self.cache.pool.free_all()
        self.scheduler.runner.forget()
        self._begin(self.scheduler.runner)
        self.scheduler.counters = counters
        self.cache.index.hits, self.cache.index.evicted = index.hits, index.evicted
        self._prompt_pages = sum(pages_for(tree.prompt_len) for tree in self._trees.values())

    def _report_ended(self) -> None:
        """Tell the searches what ended, even if a reward is interrupted or takes steps of its own meanwhile."""
        while self._ended:
            self._report(self._ended.popleft())

    def _report(self, node: Node) -> None:
        """Tell the search that grows a node's tree, if any, that the branch ended."""
        growth = self._growth_of(node.tree)
        if growth is not None and node.finish != "scored":
            growth.finished(node)

    def _growth_of(self, tree: Tree) -> Growing | None:
        """The search that grows a tree, if any."""
        found = (searches.growing.get(tree.ordinal) for searches in self._searches)
        return next((growth for growth in found if growth is not None), None)

    def _no_autocast(self) -> AbstractContextManager[None]:
        """Turn the caller's autocast off; if it is not on, skip the cost of entering the context."""
        device = self.model.device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _suspend_one(self) -> None:
        """Pages are short: drop the KV of the youngest tree that a search grows, except the oldest branch's tree."""
        oldest = self.scheduler.waiting[0].node.tree
        growing = [growth for searches in self._searches for growth in searches.growing.values()]
        trees = [growth.tree for growth in growing if growth.tree is not oldest]
        holders = [tree for tree in trees if tree.root.kv is not None]  # if the root has none, no node has
        if not holders:
            raise self._out_of_pages()
        self.cache.forget(max(holders, key=lambda tree: tree.ordinal))

    def _out_of_pages(self) -> OutOfPages:
        owned = {tree.ordinal: self.cache.owned_by(tree) for tree in self._trees.values()}
        holders = [count for count in owned.values() if count]
        return OutOfPages(
            f"{self.scheduler.pages_wanted()} pages needed, {self.cache.pool.num_free} free of "
            f"{self.cache.pool.num_pages}, {sum(holders)} pinned by {len(holders)} trees; close a tree or raise "
            f"kv_tokens (now {self.kv_tokens})"
        )

    # ---- weights and memory ----------------------------------------------------------------------------------

    @in_one_thread
    def weights_changed(self) -> None:
        """Tell the engine that the parameters were updated in place, or adapters switched on or off.

        Cached keys and values of the old weights are dropped; tokens and log-probs stay. A tree that grows further is
        computed anew with the new weights.

        Raises:
            ValueError: the model has another dtype than the pool.
        """
        if self.model.dtype != self.cache.pool.dtype:
            raise ValueError(
                f"the model is now {self.model.dtype}, the engine's pool is {self.cache.pool.dtype}; make a new Engine"
            )
        self._drop_all_kv()
        for branch in self.scheduler.waiting:
            if branch.kept is not None and not branch.is_given and branch.version is None:
                branch.version = self.version
        if self.shadow is not None:
            self.shadow.refresh()
        self.scheduler.runner.weights_changed()
        self.version += 1
        self._weights.renew()

    def _check_weights(self) -> None:
        if not self._weights.is_current():
            raise StaleWeights(
                "parameters were changed, hooks added or removed, or adapters switched since the last call; "
                "call engine.weights_changed() after every update"
            )

    @in_one_thread
    def release(self) -> None:
        """Give the memory of the pool and of captured graphs back to torch's allocator; sampling takes it again.

        Open trees keep their tokens; their keys and values are computed anew when they grow further.
        """
        self._drop_all_kv()
        self.scheduler.runner.forget()
        self.cache.pool.release_memory()

    def restore(self) -> None:
        """Allocate the pool's memory now rather than at the next step, so that a lack of it shows here.

        Raises:
            torch.OutOfMemoryError or RuntimeError: torch's allocator cannot give it.
        """
        with torch.inference_mode():
            self.cache.pool.restore_memory()

    def _drop_all_kv(self) -> None:
        self.scheduler.preempt_all()
        self.cache.index.clear()
        for tree in self._trees.values():
            self.cache.forget(tree)

    def stats(self) -> dict[str, int]:
        """Counts since the engine was made.

        Returns:
            "sampled" and "computed" tokens; "reused", tokens found in the index; "copied", positions that forks
            copied; "evicted_pages"; "preemptions" of branches; "steps".
        """
        index = self.cache.index
        return asdict(self.scheduler.counters) | {
            "reused": index.hits,
            "copied": self.cache.pool.copied,
            "evicted_pages": index.evicted,
        }

    def check_integrity(self) -> None:
        """Check that the engine's data structures agree: page references, free list, index, nodes, slots, branches.

        Raises:
            IntegrityError: they do not; the message says what is wrong, and where.
        """
        check_engine(self._trees.values(), self.scheduler)
