"""Searches in progress; an engine runs any number of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy.typing as npt

from ibtpo_engine.errors import BudgetSpent, EngineError, NoTokenAllowed
from ibtpo_engine.tree import Node, Tree


@dataclass(frozen=True)
class Ahead:
    """What a search yields to go on before all its branches have ended.

    What the search receives, and when, depends on the tree alone: not on which branch ended first, so not on the batch.
    The same holds for the final tree: branches that the search has not received when it ends are dropped, ended or not.

    Attributes:
        extend: pending nodes to be extended.
        until: branches asked for now or before; the search receives them, finished, as soon as all of them are.
    """

    extend: Sequence[Node]
    until: Sequence[Node]


Growth = Generator["Sequence[Node] | Ahead | Future[Any]", list[Node], None]
"""Yields branches to be extended and receives them finished; yields a future to wait for it, and receives nothing."""
Search = Callable[[Tree], Growth]
"""Called once with each tree, which has only its prompt then; usually a generator function."""
Reward = Callable[[Tree, Node], "float | Future[Any] | None"]
"""Called with (tree, node) of each branch that ended (not of a paused one); `Node.reward` becomes the number returned,
or the future's once that is done. None leaves the node ungraded."""


class Stirred:
    """The searches of a run that may have become ready, so that a step need not look at all of them.

    Attributes:
        growths: by the ordinal of their tree.
        awaiting: those that wait for a future, whose callback adds them, on whatever thread it is done.
    """

    def __init__(self) -> None:
        self.growths: dict[int, Growing] = {}
        self.awaiting: dict[int, Growing] = {}
        self._done: SimpleQueue[Growing | None] = SimpleQueue()

    def add(self, growth: Growing) -> None:
        """It may have become ready."""
        self.growths[growth.tree.ordinal] = growth

    def expect(self, growth: Growing, future: Future[Any]) -> None:
        """Add it once the future is done."""
        self.awaiting[growth.tree.ordinal] = growth
        future.add_done_callback(lambda _: self._done.put(growth))

    def is_ready(self, growth: Growing) -> bool:
        """Can it go on?"""
        ready = growth.is_ready()
        if not growth.awaits_futures():
            self.awaiting.pop(growth.tree.ordinal, None)
        return ready

    def forget(self, growth: Growing) -> None:
        """Remove a search that has ended, even if it still awaits futures."""
        self.growths.pop(growth.tree.ordinal, None)
        self.awaiting.pop(growth.tree.ordinal, None)

    def look(self) -> None:
        """Add those whose futures are done."""
        while not self._done.empty():
            self.wait()

    def wait(self) -> None:
        """Wait until a future is done or `wake` is called."""
        growth = self._done.get()
        if growth is not None and not growth.done:
            self.add(growth)

    def wake(self) -> None:
        """End the current or the next `wait`; from any thread."""
        self._done.put(None)


class Growing:
    """A search in progress: its generator, what it waits for, and its outstanding rewards.

    Attributes:
        nodes: the nodes it last asked to extend.
        submitted: have they been submitted to the engine?
        turns: how often it has asked.
        rewards: futures of ended branches, until they have been read.
        stirred: told when this search may have become ready.
        reserved: with a budget, the depth each branch may reach that the search has not received yet.
    """

    def __init__(self, index: int, tree: Tree, search: Search, reward: Reward | None, stirred: Stirred) -> None:
        self.index = index
        self.tree = tree
        self.search = search
        self.reward = reward
        self.stirred = stirred
        self.generator: Growth | None = None
        self.nodes: list[Node] = []
        self.rewards: dict[Node, Future[float | None]] = {}
        self.reserved: dict[Node, int] = {}
        self.done = False
        self.turns = 0
        self.submitted = True
        self._under_way: set[Node] = set()
        self._untold: dict[Node, None] = {}  # asked for and not received yet, in order
        self._until: list[Node] = []
        self._waits_for: set[Node] = set()  # those of `_until` that are under way
        self._gate: Future[Any] | None = None
        self._failed: dict[Node, Exception] = {}  # errors of branches that it does not wait for yet
        self._error: Exception | None = None  # raised in the search at its next turn
        self._not_graded: BaseException | None = None  # what the reward raised: for the caller of `run`

    def ask(self) -> None:
        """Send the search what it waited for (the first call starts it) and take what it asks for next."""
        self._check_grades()
        self.turns += 1
        error, self._error = self._error, None
        if self.generator is None:
            generator = self.search(self.tree)
            if not isinstance(generator, Generator):
                raise TypeError(f"a search is a generator function; this one returned {generator!r}")
            self.generator = generator
            self._resume(lambda generator: next(generator))
        elif self.tree.closed:
            self._end()
        elif error is not None:
            self._resume(lambda generator: generator.throw(error))
        else:
            received = [node for node in self._until if not node.dropped]  # without those taken off meanwhile
            for node in received:
                self._untold.pop(node, None)
                self.reserved.pop(node, None)
            self._resume(lambda generator: generator.send(received))

    def _resume(self, go: Callable[[Growth], Sequence[Node] | Ahead | Future[Any]]) -> None:
        """Give the search its turn; it ends if it returns, its tree was closed, or its tree's own error escapes it."""
        assert self.generator is not None
        try:
            asked = go(self.generator)
        except StopIteration:
            self._end()
        except (BudgetSpent, NoTokenAllowed) as error:
            self.tree.ended_by = error
            self._end()
        else:
            if self.tree.closed:
                self._end()
            else:
                self._take(asked)

    def refuse(self, error: BudgetSpent) -> None:
        """The tree's budget does not allow the round asked for: tell the search, which ends or asks for less."""
        assert self.generator is not None
        self._under_way.difference_update(self.nodes)
        for node in self.nodes:
            node.drop()
        self._resume(lambda generator: generator.throw(error))

    def fail(self, node: Node, error: Exception) -> bool:
        """A branch failed and is off the tree: its search gets the error once it waits for the branch.

        Returns:
            False if the branch is not of this search.
        """
        if node not in self._under_way:
            return False
        if node in self._waits_for:
            self._error = error
        else:
            self._failed[node] = error
        self.lost(node)
        return True

    def _take(self, asked: Sequence[Node] | Ahead | Future[Any]) -> None:
        self._gate = asked if isinstance(asked, Future) else None
        if isinstance(asked, Future):
            self.stirred.expect(self, asked)
            asked = Ahead([], [])
        elif not isinstance(asked, Ahead):
            nodes = list(asked) if isinstance(asked, Iterable) else [None]  # once: it may be an iterator
            if not all(isinstance(node, Node) for node in nodes):
                raise TypeError(f"a search yields a list of nodes, an Ahead or a future; this one yielded {asked!r}")
            asked = Ahead(nodes, nodes)
        failed = (self._failed.pop(node) for node in asked.until if node in self._failed)
        self._error = self._error or next(failed, None)  # one may be left from a round that the budget refused
        self.nodes, self._until = list(asked.extend), [node for node in asked.until if not node.dropped]
        if any(node.tree is not self.tree for node in [*self.nodes, *self._until]):
            raise ValueError("a search may yield nodes of its own tree only; use engine.extend for others")
        self._under_way.update(self.nodes)
        self._untold.update(dict.fromkeys(self.nodes))
        if never := [node for node in self._until if node.is_pending and node not in self._under_way]:
            raise ValueError(f"a search waits for {never[0]!r}, but has not yielded it to be extended; yield it first")
        self._waits_for = self._under_way.intersection(self._until)
        self.submitted = False

    def _check_grades(self) -> None:
        if self._not_graded is not None:
            raise self._not_graded

    def _end(self) -> None:
        """End the search and drop ended branches it has not received: which have ended depends on the batch."""
        assert self.generator is not None
        for node in self._untold if not self.tree.closed else ():
            if not (node.in_flight or node.dropped or node.children):
                node.drop()
        self._check_grades()
        self.generator.close()
        self.nodes, self._until, self._waits_for, self._gate, self.done = [], [], set(), None, True
        self.submitted = True

    def told(self) -> None:
        """What the search asked for has been submitted."""
        self.submitted = True
        self.stirred.add(self)

    def tree_closed(self) -> None:
        """Its tree was closed: the search ends at its next turn."""
        self.stirred.add(self)

    def finished(self, node: Node) -> None:
        """A branch ended: grade it, unless it only paused.

        An exception of the reward is kept for the next turn, since the step may belong to another call. An interrupt is
        raised there, too.
        """
        self._leaves(node)
        try:
            graded = self.reward(self.tree, node) if self.reward is not None and node.finish is not None else None
            graded = graded if graded is None or isinstance(graded, Future) else float(graded)
        except BaseException as error:
            self._not_graded = error
            if not isinstance(error, Exception):
                raise
            return
        if isinstance(graded, Future):
            self.rewards[node] = graded
            self.stirred.expect(self, graded)
        else:
            node.reward = graded

    def lost(self, node: Node) -> None:
        """A branch was aborted or its tree closed: it is off the tree, and the search is not told."""
        self.reserved.pop(node, None)
        if node in self._under_way:
            self._leaves(node)

    def withdraw(self, node: Node) -> bool:
        """Remove a branch that was asked for but not submitted yet, without telling the search; False if it is none."""
        if self.submitted or node not in self.nodes:
            return False
        self.nodes.remove(node)
        self.lost(node)
        return True

    def _leaves(self, node: Node) -> None:
        self._under_way.discard(node)
        self._waits_for.discard(node)
        self.stirred.add(self)

    def awaits_futures(self) -> bool:
        """Does it wait for rewards that `is_ready` has not read yet, or for the future it yielded?"""
        return not self.tree.closed and (bool(self.rewards) or not (self._gate is None or self._gate.done()))

    def is_ready(self) -> bool:
        """Is everything the search asked for submitted, and everything it waits for finished and graded?"""
        if self.tree.closed or self._error is not None or self._not_graded is not None:
            return self.submitted
        for node in [node for node, future in self.rewards.items() if future.done()]:
            reward = self.rewards.pop(node).result()
            node.reward = reward if reward is None else float(reward)
        if self._waits_for or not self.submitted or not (self._gate is None or self._gate.done()):
            return False
        return not (self.rewards and any(node in self.rewards for node in self._until))


class Searches:
    """The searches of one `run`, each on a prompt of its own.

    Args:
        search: called with each tree.
        prompts: taken one by one, as there is room.
        keys: one a prompt, or None.
        reward: grades branches that end.
        open_tree: opens a tree on (prompt, key).
        submit: submits what a search asked for, `Growing.nodes`, to the engine.

    Attributes:
        growing: searches in progress, by the ordinal of their tree.
    """

    def __init__(
        self,
        search: Search,
        prompts: Iterable[npt.ArrayLike],
        keys: Iterable[int] | None,
        reward: Reward | None,
        open_tree: Callable[[npt.ArrayLike, int | None], Tree],
        submit: Callable[[Growing], None],
    ) -> None:
        self.growing: dict[int, Growing] = {}
        self._stirred = Stirred()
        self._held: list[Growing] = []  # searches whose branches are not submitted yet
        self._search = search
        self._reward = reward
        self._waiting = iter(enumerate(prompts))
        self._keys = None if keys is None else iter(keys)
        self._open_tree = open_tree
        self._submit = submit

    def open(self) -> bool:
        """Start a search on the next prompt; False if there is none.

        Raises:
            ValueError: it has no key.
        """
        item = next(self._waiting, None)
        if item is None:
            return False
        index, prompt = item
        key = None if self._keys is None else next(self._keys, None)
        if self._keys is not None and key is None:
            raise ValueError(f"run: no key is left for prompt {index}; give one key per prompt")
        try:
            tree = self._open_tree(prompt, key)
        except (EngineError, ValueError) as error:
            error.add_note(f"(prompt {index} of the run)")
            raise
        growth = self.growing[tree.ordinal] = Growing(index, tree, self._search, self._reward, self._stirred)
        growth.ask()
        self._tell(growth)
        return True

    def open_while(self, has_room: Callable[[], bool]) -> None:
        """Start searches as long as there is room, and at least one if none is in progress."""
        while not self.growing or has_room():
            if not self.open():
                return

    def _tell(self, growth: Growing) -> None:
        if not growth.tree.closed:
            self._submit(growth)
        growth.told()

    @property
    def holds_back(self) -> bool:
        """Are there branches that were asked for and not submitted yet?"""
        return bool(self._held)

    def any_ready(self) -> bool:
        """Can any of them go on?"""
        self._stirred.look()
        return any(map(self._stirred.is_ready, self._stirred.growths.values()))

    def await_futures(self) -> bool:
        """Does any of them wait for a future?"""
        return bool(self._stirred.awaiting)

    def wait(self) -> None:
        """Wait until one of these futures is done or `wake` is called."""
        self._stirred.wait()

    def wake(self) -> None:
        """End the current or the next `wait`; from any thread."""
        self._stirred.wake()

    def resume(self, has_room: Callable[[], bool], breadth: int) -> Iterator[tuple[int, Tree]]:
        """Resume the searches that can go on; yield the trees whose search has ended.

        A tree's rounds run one after another, each round's branches side by side. If rounds went before new trees, the
        last trees would be opened late and finish alone, in small batches. So new trees go first, then the searches
        with the fewest rounds so far.

        Args:
            has_room: is there room for more branches? If not, what was asked for is submitted later.
            breadth: open new trees first while fewer than this are in progress; at 0, open none and submit every round
                at once.
        """
        self._stirred.look()
        stirred = [growth for _, growth in sorted(self._stirred.growths.items())]
        self._stirred.growths.clear()
        for growth in [growth for growth in stirred if self._stirred.is_ready(growth)]:
            growth.ask()
            if growth.done:
                self.growing.pop(growth.tree.ordinal)
                self._stirred.forget(growth)
                growth.tree.close()
                yield growth.index, growth.tree
            else:
                self._held.append(growth)
        while len(self.growing) < breadth and has_room() and self.open():
            pass
        self._held.sort(key=lambda growth: growth.turns)
        while self._held and (not breadth or has_room()):
            self._tell(self._held.pop(0))

    def close(self) -> None:
        """End the searches in progress and close their trees."""
        with ExitStack() as closing:  # calls them all, last first, even if a search raises
            for growth in self.growing.values():
                if growth.generator is not None:
                    closing.callback(growth.generator.close)
                closing.callback(growth.tree.close)
            self.growing = {}
            self._stirred = Stirred()
            self._held = []
