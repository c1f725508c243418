"""Trees and searches over a backend: the same `Tree`, `Node`, search and reward as with an `Engine`.

A round of a search becomes calls of `Backend.extend`: siblings share a call, and so do parents with equally many
children of equal length. Calls of all trees run side by side on threads, while trees, searches and rewards stay on the
caller's thread. So a tree that waits for its round does not block others, and a search needs no locks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event

import numpy as np
import numpy.typing as npt

from ibtpo_engine.backends import Backend, CancellableBackend, Completion
from ibtpo_engine.errors import BackendError, EngineError, NoTokenAllowed
from ibtpo_engine.growing import Growing, Reward, Search, Searches
from ibtpo_engine.limits import depth_limit
from ibtpo_engine.masks import TokenMask
from ibtpo_engine.randomness import seeded_stream
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.tree import Node, Tree

Answer = Future[list[list[Completion]]]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the backend: `families` are the new children of one parent each, equally many of equal length."""

    families: list[list[Node]]
    sampling: Sampling
    version: int  # of the weights when it was asked for

    @property
    def nodes(self) -> list[Node]:
        return [node for family in self.families for node in family]

    def make(self, backend: Backend, cancelled: Event) -> list[list[Completion]]:
        # A stream has 64 bits; its low 31 are a valid seed in any integer type that a server may use.
        seeds = [[node.stream & 0x7FFFFFFF for node in family] for family in self.families]
        parents = [family[0].parent for family in self.families]
        prefixes = [parent.prefix().tolist() for parent in parents if parent is not None]
        if isinstance(backend, CancellableBackend):
            return backend.extend_until(
                prefixes, len(seeds[0]), sampling=self.sampling, seeds=seeds, cancelled=cancelled
            )
        return backend.extend(prefixes, len(seeds[0]), sampling=self.sampling, seeds=seeds)


class BackendEngine:
    """Grows trees from what a backend samples.

    Args:
        backend: samples; called from up to `max_calls` threads.
        seed: with a tree's key and a branch's place in the tree, decides the seed of every request.
        max_calls: most concurrent calls of the backend; `run` opens trees until there are as many.
        max_positions: the model's context in tokens; None leaves it to the backend to report a full context.
        vocabulary: the model's number of token ids, `len(tokenizer)` or its padded size; None takes any id.

    Raises:
        ValueError: `max_calls`, `max_positions` or `vocabulary` is not positive.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int = 0,
        max_calls: int = 32,
        max_positions: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        for name, value in (("max_calls", max_calls), ("max_positions", max_positions), ("vocabulary", vocabulary)):
            if value is not None and value < 1:
                raise ValueError(f"BackendEngine: {name}={value} must be at least 1")
        self.backend = backend
        self.seed = seed
        self.max_calls = max_calls
        self.max_positions = max_positions
        self.vocabulary = vocabulary
        self.version = 0
        self.seconds_waiting = 0.0  # with nothing asked of the backend, for rewards
        self._trees: dict[int, Tree] = {}  # open trees by ordinal
        self._opened = 0
        self._searches: list[Searches] = []  # of each `run` under way

    def tree(self, prompt: npt.ArrayLike, *, key: int | None = None) -> Tree:
        """Open a tree on a prompt; as `Engine.tree`, but no pages are held.

        Raises:
            ValueError: the prompt is empty, or leaves no room in the context.
        """
        ordinal = self._opened
        tree = Tree(prompt, key=ordinal if key is None else key, seed=self.seed, ordinal=ordinal, on_close=self._close)
        if self.max_positions is not None and tree.prompt_len >= self.max_positions:
            raise ValueError(
                f"prompt of {tree.prompt_len} tokens leaves no room in the context of {self.max_positions}; shorten it"
            )
        self._opened += 1
        self._trees[ordinal] = tree
        return tree

    def _close(self, tree: Tree) -> None:
        self._trees.pop(tree.ordinal, None)
        for searches in self._searches:
            if tree.ordinal in searches.growing:
                searches.growing[tree.ordinal].tree_closed()
        _abandon(tree.root.subtree())

    def weights_changed(self) -> None:
        """The backend samples from other weights now: nodes asked for from here on get the next version."""
        self.version += 1

    def extend(self, nodes: Iterable[Node], sampling: Sampling) -> list[Node]:
        """Have each pending node sampled to its end; as `Engine.extend`.

        Raises:
            ValueError: a node cannot be extended, or the backend does not know a sampling parameter.
            BackendError: the backend failed; the nodes are taken off their trees again.
        """
        nodes = list(nodes)
        calls = self._calls(nodes, sampling)
        pool, left = ThreadPoolExecutor(self.max_calls, thread_name_prefix="backend"), Event()
        try:
            answers = [pool.submit(call.make, self.backend, left) for call in calls]
            for call, answer in zip(calls, answers, strict=True):
                self._fill(call, answer)
            if closed := [node for node in nodes if node.dropped]:
                raise EngineError(
                    f"the tree of {closed[0]!r} was closed while it was being extended; close it after that"
                )
        except BaseException:
            _abandon(nodes)
            raise
        finally:
            left.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return nodes

    def run(
        self,
        search: Search,
        prompts: Iterable[npt.ArrayLike],
        sampling: Sampling,
        *,
        reward: Reward | None = None,
        keys: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, Tree]]:
        """Grow a tree on every prompt, the rounds of all of them side by side; as `Engine.run`.

        Yields:
            (index of the prompt, its tree) as the trees are done. `NoTokenAllowed` is raised only in the search
            concerned, for all branches of a call.

        Raises:
            BackendError: the backend failed.
            ValueError: a search yields a node it may not extend, there are fewer keys than prompts, or the backend does
                not know a sampling parameter.
        """
        calls: dict[Answer, _Call] = {}
        pool, left = ThreadPoolExecutor(self.max_calls, thread_name_prefix="backend"), Event()

        def submit(growth: Growing) -> None:
            for call in self._calls(growth.nodes, sampling):
                answer = pool.submit(call.make, self.backend, left)
                calls[answer] = call
                answer.add_done_callback(lambda _: searches.wake())

        def has_room() -> bool:
            return len(calls) < self.max_calls

        searches = Searches(search, prompts, keys, reward, lambda prompt, key: self.tree(prompt, key=key), submit)
        self._searches.append(searches)
        try:
            while True:
                searches.open_while(has_room)
                if not searches.growing:
                    return
                if not searches.any_ready():
                    self._await(calls, searches)
                yield from searches.resume(has_room, self.max_calls)
        finally:
            left.set()
            pool.shutdown(wait=False, cancel_futures=True)  # requests already sent are not waited for
            self._searches.remove(searches)
            searches.close()

    def _await(self, calls: dict[Answer, _Call], searches: Searches) -> None:
        """Wait until a call or a reward has arrived; fill the nodes that were answered and have them graded."""
        begin = time.perf_counter()
        if not any(answer.done() for answer in calls):
            searches.wait()
        if not calls:
            self.seconds_waiting += time.perf_counter() - begin
        for answer in [answer for answer in calls if answer.done()]:
            call = calls.pop(answer)
            if isinstance(error := answer.exception(), NoTokenAllowed):
                _fail(call, error, searches)
                continue
            for node in self._fill(call, answer):
                growth = searches.growing.get(node.tree.ordinal)  # an earlier node's reward may have closed the tree
                if growth is not None:
                    growth.finished(node)

    def _calls(self, nodes: Sequence[Node], sampling: Sampling) -> list[_Call]:
        """Sort nodes into calls and mark them as in flight."""
        if len(set(nodes)) < len(nodes):
            raise ValueError("a node is given twice; use node.fork(n=2) for two branches")
        if sampling.pause is not None:
            raise ValueError("Sampling.pause: a backend does not pause; use an Engine")
        if sampling.stop or isinstance(sampling.allowed, TokenMask):
            name = "stop" if sampling.stop else "allowed"
            for node in [node for node in nodes if node.births()[0][0] < node.start]:
                raise ValueError(
                    f"Sampling.{name}: {node!r} continues sampled tokens, which a backend gets as part of the prompt, "
                    "so a stop string or grammar that began in them would start again; use an Engine"
                )
        limits = {node: depth_limit(node, self._trees, sampling.max_tokens, self.max_positions) for node in nodes}
        families: dict[Node | None, list[Node]] = {}
        for node in nodes:
            families.setdefault(node.parent, []).append(node)
        alike: dict[tuple[int, int, int], list[list[Node]]] = {}
        for family in families.values():
            first = family[0]
            most = limits[first] - first.start
            least = sampling.min_tokens - (first.start - first.tree.prompt_len)
            alike.setdefault((len(family), most, min(max(least, 0), most)), []).append(family)
        for node in nodes:
            if sampling.seed is not None:
                node.stream = seeded_stream(sampling.seed, node.births())
            node.in_flight = True
        return [
            _Call(
                families=group,
                sampling=replace(sampling, max_tokens=most, min_tokens=least, seed=None),
                version=self.version,
            )
            for (_, most, least), group in alike.items()
        ]

    def _fill(self, call: _Call, answer: Answer) -> list[Node]:
        """Give the nodes of a call what the backend sampled for them."""
        completions = answer.result()
        if [len(row) for row in completions] != [len(family) for family in call.families]:
            raise BackendError(
                f"the backend returned {[len(row) for row in completions]} completions for "
                f"{[len(family) for family in call.families]} requested ones; a backend must return [P][n] of them"
            )
        filled = []
        for family, row in zip(call.families, completions, strict=True):
            for node, completion in zip(family, row, strict=True):
                if node.dropped:  # its tree was closed meanwhile
                    continue
                _check(completion, call.sampling.max_tokens, self.vocabulary)
                node.fill(
                    completion.tokens,
                    completion.logprob,
                    completion.logprob_raw,
                    completion.entropy,
                    finish=completion.finish,
                    version=call.version,
                )
                if completion.stopped_by is not None:
                    node.stopped_by = completion.stopped_by
                node.in_flight = False
                filled.append(node)
        return filled


def _fail(call: _Call, error: NoTokenAllowed, searches: Searches) -> None:
    """Take the nodes of a call, which is one search's, off their tree and tell the search."""
    growth = searches.growing.get(call.nodes[0].tree.ordinal)
    _abandon(call.nodes)
    if growth is not None:
        first, *others = call.nodes
        growth.fail(first, error)
        for node in others:
            growth.lost(node)


def _abandon(nodes: Iterable[Node]) -> None:
    """Take the nodes that are still in flight off their trees."""
    for node in nodes:
        if node.in_flight:
            node.abandon()


def _check(completion: Completion, most: int, vocabulary: int | None) -> None:
    """Refuse a completion that no node can hold.

    Raises:
        BackendError: the message says what is wrong.
    """
    count = len(completion.tokens)
    if not 1 <= count <= most:
        raise BackendError(
            f"a completion has {count} tokens, but 1 to {most} were requested; check that the server obeys max_tokens"
        )
    tokens, end = np.asarray(completion.tokens), vocabulary if vocabulary is not None else 1 << 31
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise BackendError(f"Completion.tokens: {tokens.dtype} {tokens.shape}; expected a flat array of token ids")
    outside = tokens[(tokens < 0) | (tokens >= end)]
    if len(outside):
        raise BackendError(
            f"a completion holds token id {outside[0]}, outside the vocabulary [0, {end}); check whether the server "
            "serves another model, or a padded vocabulary"
        )
    for name in ("logprob", "logprob_raw", "entropy"):
        if len(getattr(completion, name)) != count:
            found = len(getattr(completion, name))
            raise BackendError(f"Completion.{name} has {found} values for {count} tokens; expected one per token")
    if completion.finish not in ("stop", "length"):
        raise BackendError(f'Completion.finish: {completion.finish!r} is neither "stop" nor "length"')
