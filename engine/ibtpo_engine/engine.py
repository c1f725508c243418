"""The engine: grows trees in this process, from the trainer's own parameters."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy.typing as npt

from ibtpo_engine.budget import Budget, check_nodes, check_room
from ibtpo_engine.core import EngineCore
from ibtpo_engine.errors import BudgetSpent, EngineError
from ibtpo_engine.generate import in_order, independent
from ibtpo_engine.given import Score, attach, check_suffixes, given_branch
from ibtpo_engine.growing import Growing, Reward, Search, Searches
from ibtpo_engine.limits import check_open
from ibtpo_engine.runner import MOST_STEPS
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.stream import Event, Follower
from ibtpo_engine.threads import in_one_thread
from ibtpo_engine.tree import Node, Tree


class Engine(EngineCore):
    """Samples trees of tokens from a model it borrows; for one thread at a time.

    Args:
        model: its parameters are used in place, nothing is copied; or a `Shadow`, which `weights_changed` refreshes.
        kv_tokens: size of the KV pool in tokens (rounded up to pages of 16); 200,000 unless `kv_share` is given.
        kv_share: instead, the share in (0, 1] of the device's free memory that the pool takes.
        seed: with a tree's key and a token's place in the tree, decides every sample.
        max_branches: most branches decoded in one step.
        prefill_tokens: most known tokens computed in one step.
        decode: token ids to text, as `tokenizer.decode`; stop strings need it.
        parity: "bitwise" gives a branch the same bits in every batch, prefilled, decoded, forked or preempted, and
            those of `Model.packed(parity="bitwise")`; "fast" promises equality up to rounding.
        cuda_graphs: capture decode steps as CUDA graphs (`step_graphs`); for a model on a GPU, with Triton.

    Raises:
        ValueError: a size is not positive, both sizes of the pool are given, `parity` is unknown or cannot be kept
            with this model, or graphs cannot be captured here.
    """

    def extend(self, nodes: Iterable[Node], sampling: Sampling) -> list[Node]:
        """Sample each pending node to its end.

        Args:
            nodes: pending nodes from `Node.fork`, of any trees of this engine.
            sampling: how; `max_tokens` counts from the end of the prompt.

        Returns:
            The same nodes, in the same order, finished, or paused by `sampling.pause`.

        Raises:
            ValueError: a node is given twice, is not pending, was dropped, or its tree is closed or of another engine;
                or `sampling` names a token outside the vocabulary, or stop strings without `decode`.
            NoTokenAllowed: mask, bias and `min_tokens` together forbid every token to a branch.
            BudgetSpent: a tree cannot give each of its nodes one token; nothing is sampled.
            OutOfPages: the pages of open trees fill the pool; the nodes are taken off their trees again.
            StaleWeights: parameters changed since the last call without `weights_changed`.
        """
        nodes = list(nodes)
        self._check_weights()
        self._submit(nodes, sampling)
        try:
            for node in nodes:
                while node.in_flight:
                    self._step(MOST_STEPS)
                    self._raise_failed(nodes)
        except BaseException as error:
            self._give_up(lambda: self._cancel(nodes), error)
            raise
        return nodes

    def generate(
        self, prompts: Iterable[npt.ArrayLike], sampling: Sampling, *, n: int = 1, keys: Iterable[int] | None = None
    ) -> Iterator[list[Node]]:
        """Sample `n` independent trajectories of every prompt, all in one continuously batched stream.

        Args:
            prompts: int [m] each; taken as there is room, so they may be a stream.
            sampling: how.
            n: trajectories a prompt.
            keys: names of the random numbers, one a prompt: the same key gives the same trajectories again.

        Yields:
            The `n` finished nodes of each prompt, in the order of the prompts, once they and all earlier ones are done.

        Raises:
            ValueError: n < 1, or as `run`.
            OutOfPages, StaleWeights: as `run`.
        """
        return in_order(self.run(independent(n), prompts, sampling, keys=keys))

    def stream(self, nodes: Iterable[Node], sampling: Sampling) -> Iterator[Event]:
        """Sample as `extend` does, and yield the tokens as they come.

        Between two events the caller may do anything: abort branches, extend others, release the memory. Leaving the
        loop takes unfinished branches off their trees.

        Yields:
            The new tokens of each branch after each step; the last event of a branch has `done` set.

        Raises:
            As `extend`, once the iteration begins.
        """
        nodes = list(nodes)
        self._check_weights()
        follower = Follower(self._submit(nodes, sampling), self.scheduler)
        try:
            while follower.watches:
                self._check_weights()  # the caller had a turn
                self._raise_failed(nodes)  # a step of another call may have failed one
                if any(node.in_flight for node in nodes):
                    self._step()
                    self._raise_failed(nodes)
                yield from follower.events()
        except BaseException as error:
            self._give_up(lambda: self._cancel(nodes), error)
            raise

    @in_one_thread
    def abort(self, nodes: Iterable[Node], *, keep: bool = False) -> None:
        """End branches that are being extended, between two steps: from the body of a `stream`, a search or a reward.

        Args:
            nodes: those that are not being extended (any more) are left as they are.
            keep: keep what was sampled, as a node with `finish` "abort"; otherwise, or if nothing was sampled yet,
                the node leaves its tree and gives its pages back.
        """
        nodes = [node for node in nodes if self._trees.get(node.tree.ordinal) is node.tree]
        for node in nodes:
            growth = self._growth_of(node.tree)
            if growth is not None and growth.withdraw(node):
                node.drop()
        nodes = [node for node in nodes if node.in_flight]
        for node in self.scheduler.truncate(nodes, self.version) if keep else []:
            self._report(node)
        nodes = [node for node in nodes if node.in_flight]
        self._cancel(nodes)
        for node in nodes:
            growth = self._growth_of(node.tree)
            if growth is not None:
                growth.lost(node)

    @in_one_thread
    def score(self, below: Node | Tree, suffixes: Sequence[npt.ArrayLike], *, keep: bool = False) -> list[Score]:
        """Log-probs and entropies of given tokens after a prefix, which is computed once; nothing is sampled.

        Args:
            below: the node whose end the suffixes follow; a tree stands for its prompt.
            suffixes: int [n] each, n at least 1; computed side by side, in as many steps as `prefill_tokens` requires.
            keep: leave each suffix on the tree, as a node with `finish` "scored"; otherwise the tree is left unchanged.

        Returns:
            One score a suffix, in order.

        Raises:
            ValueError: a suffix is not made of token ids or too long, or the node is pending, dropped, or not ours.
            BudgetSpent: the tree's budget has no room for suffixes that are to be kept.
            EngineError: the tree was closed meanwhile, or the engine reset.
            OutOfPages, StaleWeights: as `extend`.
        """
        self._check_weights()
        node = below.prompt if isinstance(below, Tree) else below
        check_open(node, self._trees)
        if node.is_pending:
            raise ValueError(f"score: {node!r} has no tokens yet; extend it first")
        config = self.model.config
        tokens = check_suffixes(node, suffixes, vocabulary=config.vocab_size, context=config.max_positions)
        if keep:
            check_nodes(node.tree, len(tokens))
            check_room(node, [len(suffix) for suffix in tokens], self._reserved(node.tree))
        children = attach(node, tokens)
        for child, suffix in zip(children, tokens, strict=True):
            self.scheduler.submit(given_branch(child, suffix))
        try:
            while any(child.in_flight for child in children):
                self._step()
                for child in children if not keep else []:  # the next one may wait for its pages
                    if not (child.in_flight or child.dropped):
                        child.drop()
            if any(child.is_pending for child in children):
                raise EngineError(f"the tree of {node!r} was closed while it was being scored; wait until that is done")
        except BaseException as error:

            def drop() -> None:
                self._cancel(children)
                for child in [child for child in children if not child.dropped]:
                    child.drop()

            self._give_up(drop, error)
            raise
        return [
            Score(tokens=child.tokens, logprob=child.logprob_raw, entropy=child.entropy, node=child if keep else None)
            for child in children
        ]

    def run(
        self,
        search: Search,
        prompts: Iterable[npt.ArrayLike],
        sampling: Sampling,
        *,
        reward: Reward | None = None,
        keys: Iterable[int] | None = None,
        budget: Budget | None = None,
    ) -> Iterator[tuple[int, Tree]]:
        """Grow a tree on every prompt, all in one continuously batched stream.

        Args:
            search: called with a tree, returns a generator that yields pending nodes and receives them finished. It may
                also yield a future, to go on once that is done; meanwhile other trees are opened and grown.
            prompts: int [n] each.
            sampling: how branches are sampled.
            reward: grades a finished leaf, or returns None; a future lets the other trees go on meanwhile. An exception
                of the reward or of a search ends the run.
            keys: names of the trees' random numbers, one a prompt.
            budget: of each tree; `BudgetSpent`, like `NoTokenAllowed`, is raised only in that tree's search. Unless
                caught, it ends the search and becomes the tree's `ended_by`.

        Yields:
            (index of the prompt, its tree) as the trees are done; the tree is closed by then, but keeps its tokens.

        Raises:
            OutOfPages: not even the oldest tree alone fits into the pool.
            StaleWeights: parameters changed, also between two trees, without `weights_changed`.
            ValueError: a search yields a node it may not extend, or there are fewer keys than prompts.
        """
        self._check_weights()
        searches = Searches(
            search,
            prompts,
            keys,
            reward,
            open_tree=lambda prompt, key: self.tree(prompt, key=key, budget=budget),
            submit=lambda growth: self._submit_round(growth, sampling),
        )
        self._searches.append(searches)
        try:
            while True:
                searches.open_while(self._has_room)
                if not searches.growing:
                    break
                self._advance(searches)
                for index, tree in searches.resume(self._has_room, self.max_branches if self._is_half_free() else 0):
                    yield index, tree
                    self._check_weights()  # the caller had a turn
        except BaseException as error:
            self._searches.remove(searches)
            self._give_up(searches.close, error)
            raise
        self._searches.remove(searches)

    def _has_room(self) -> bool:
        return self.scheduler.num_branches < self.max_branches

    def _is_half_free(self) -> bool:
        """Is at least half the pool left for trees to grow into? Of pages in the index, open trees own only prompts."""
        return 2 * (self.cache.num_loose - self._prompt_pages) >= self.cache.pool.num_pages

    def _advance(self, searches: Searches) -> None:
        """Step the scheduler; if every tree waits for rewards or other futures, wait for the first instead."""
        self._report_ended()
        if self.scheduler.num_branches:
            self._step(1 if searches.await_futures() else MOST_STEPS)
        elif searches.any_ready() or searches.holds_back:
            return
        elif searches.await_futures():
            begin = time.perf_counter()
            searches.wait()
            self.seconds_waiting += time.perf_counter() - begin
        else:
            raise EngineError(
                "searches wait for branches that no longer exist, as after an interrupt; start the run again"
            )

    def _submit_round(self, growth: Growing, sampling: Sampling) -> None:
        while True:
            try:
                branches = self._submit(growth.nodes, sampling)
            except BudgetSpent as error:
                growth.refuse(error)
            else:
                if growth.tree.budget is not None:
                    growth.reserved.update((branch.node, branch.limit) for branch in branches)
                return
