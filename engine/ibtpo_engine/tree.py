"""A tree of token segments, which is sampled, forked, split, scored and finally trained on.

A node is a run of tokens below its parent. Tokens never change once sampled; only the cuts between nodes do::

    root [0 ........ 7)                     the prompt
      |- a [7 ............. 19)             a.fork(at=5) first cuts a in two at depth 12:
                                              head [7 .. 12)   a new node, takes a's place under the root
                                                |- a [12 .. 19)  the same object, now the tail (still the leaf)
                                                |- b [12 ..      the fork, waiting to be extended

So a reference to a leaf stays valid, and children always begin at a node's end. The tree holds no keys or values: the
engine attaches its pages to ``node.kv``, which the tree splits and releases with the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from operator import index
from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from ibtpo_engine.arrays import Floats, Ints
from ibtpo_engine.budget import Budget, Used, check_nodes
from ibtpo_engine.export import PackedTree, pack_tree
from ibtpo_engine.pickling import fill_tree, reduce_node, reduce_tree
from ibtpo_engine.randomness import mix

_NO_TOKENS: Ints = np.empty(0, np.int32)  # of nodes that are pending: one for all
_NO_NUMBERS: Floats = np.empty(0, np.float32)


class Node:
    """An immutable run of tokens; `fork` grows the tree below it.

    Attributes:
        tokens: int32 [n], the tokens of this segment; empty until the node has been extended.
        logprob: float32 [n], log-probability under the distribution sampled from (temperature, top-p, top-k applied).
        logprob_raw: float32 [n], log-probability under the model at temperature 1, without filters.
        entropy: float32 [n], entropy in nats of the model's full distribution at temperature 1.
            All three are zero on prompt tokens.
        start: depth of the first token on its path (its RoPE position); `end` is one past the last.
        finish: why sampling ended here: "stop", "length", "budget" (the tree's was spent), "abort" (cut short by the
            caller), "scored" (its tokens were given), or None for interior, paused, prompt and pending nodes.
        stopped_by: what ended it, if `finish` is "stop": the stop token's id, or the stop string; else None.
        reward: the reward of the trajectory ending here; None if not a graded leaf.
        version: version of the weights that sampled the tokens, or the first of them if the weights changed meanwhile.
    """

    __slots__ = (
        "birth", "children", "dropped", "entropy", "finish", "forks", "in_flight", "kv", "logprob", "logprob_raw",
        "mask", "notes", "parent", "reward", "serial", "start", "stopped_by", "stream", "tokens", "tree", "version",
    )  # fmt: skip

    def __init__(self, tree: Tree, parent: Node | None, start: int, stream: int) -> None:
        self.tree = tree
        self.parent = parent
        self.children: list[Node] = []
        self.start = start
        self.stream = stream  # names the random numbers of this segment: see randomness.py
        self.birth = (start, -1)  # (depth of the fork, how many forks began there before); names the stream
        self.forks: dict[int, int] = {}  # depth -> how many forks of this stream began there
        self.serial = tree._next_serial()
        tree.used.nodes += 1
        self.tokens: Ints = _NO_TOKENS
        self.logprob: Floats = _NO_NUMBERS
        self.logprob_raw: Floats = _NO_NUMBERS
        self.entropy: Floats = _NO_NUMBERS
        self.finish: str | None = None
        self.stopped_by: str | int | None = None
        self.reward: float | None = None
        self.version = 0
        self.in_flight = False  # is the engine extending it?
        self.dropped = False  # cut off its tree?
        self.kv: Any = None  # the engine's; opaque here
        self.mask: Any = None  # the engine's: state, at the end of this node, of the grammar it was sampled with
        self.notes: dict[str, Any] = {}  # the search's scratch space

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_node(self)

    def __copy__(self) -> Self:
        return self  # a node is unique in its tree; copy.deepcopy copies the tree, too

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        return True  # a pending node has no tokens and is still a node

    def __repr__(self) -> str:
        return f"Node({self.serial}, [{self.start}, {self.end}), children={len(self.children)}, finish={self.finish})"

    @property
    def end(self) -> int:
        """Depth one past the last token: the number of tokens from the root's first to here."""
        return self.start + len(self.tokens)

    @property
    def is_pending(self) -> bool:
        """True between `fork` and the end of `Engine.extend`."""
        return len(self.tokens) == 0

    @property
    def continues_parent(self) -> bool:
        """True if this node continues its parent's branch: the lower half of a cut, or a resumed node."""
        return self.parent is not None and self.parent.birth == self.birth

    @property
    def is_leaf(self) -> bool:
        """True if a trajectory ends here: finished, with nothing sampled below."""
        return self.finish is not None and all(child.is_pending for child in self.children)

    def path(self) -> list[Node]:
        """The nodes from the root to this one, both included."""
        nodes = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def births(self) -> list[tuple[int, int]]:
        """(depth of the fork, number of earlier forks there) of every branch that leads here: the place in the tree.

        The first depth is where sampling began: the prompt's length, or less below a fork within the prompt.
        """
        return [node.birth for node in self.path()[1:] if not node.continues_parent]

    def prefix(self) -> Ints:
        """int32 [end], every token from the root to the end of this node."""
        return np.concatenate([node.tokens for node in self.path()])

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first, children in the order they were forked; pending nodes left out."""
        stack = [self]
        while stack:
            node = stack.pop()
            if not node.is_pending:
                yield node
                stack.extend(reversed(node.children))

    def subtree(self) -> list[Node]:
        """As `walk`, pending nodes included."""
        nodes, stack = [], [self]
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(reversed(node.children))
        return nodes

    def leaves(self) -> list[Node]:
        """The finished trajectories that pass through this node, in depth-first order."""
        return [node for node in self.walk() if node.is_leaf]

    def split(self, at: int) -> Node:
        """Cut this node before its token `at` and return the new upper half; this object stays the lower half.

        ``at == len(self)`` cuts nothing and returns this node itself; ``at == 0`` returns the parent.

        Raises:
            ValueError: `at` lies outside [0, len(self)], or is 0 on the root.
        """
        at = index(at)
        if not 0 <= at <= len(self.tokens):
            raise ValueError(f"split: at={at} lies outside [0, {len(self.tokens)}] of {self!r}")
        if at == len(self.tokens):
            return self
        if at == 0:
            if self.parent is None:
                raise ValueError("split: at=0 on the root would leave an empty prompt")
            return self.parent
        return self.cut([at])[0]

    def cut(self, offsets: Iterable[SupportsIndex]) -> list[Node]:
        """Cut this node before each of these tokens and return the parts, top down; this object stays the lowest.

        The same as splitting the upper parts off one by one, in one pass.

        Raises:
            ValueError: the offsets do not increase inside (0, len(self)).
        """
        bounds = [0, *map(index, offsets), len(self.tokens)]
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cut: offsets {bounds[1:-1]} must increase inside (0, {len(self.tokens)}) of {self!r}")
        parts: list[Node] = []
        for a, b in pairwise(bounds[:-1]):
            parts.append(self._part(a, b, below=parts[-1] if parts else self.parent))
        if parts:
            self._move_below(parts)
        return [*parts, self]

    def _part(self, a: int, b: int, *, below: Node | None) -> Node:
        """A node of its own with tokens [a, b) of this one, not on the tree yet."""
        part = Node(self.tree, below, self.start + a, self.stream)
        part.birth, part.forks = self.birth, self.forks  # one stream, one count of forks
        part.version = self.version
        part.tokens, part.logprob = self.tokens[a:b], self.logprob[a:b]
        part.logprob_raw, part.entropy = self.logprob_raw[a:b], self.entropy[a:b]
        return part

    def _move_below(self, parts: list[Node]) -> None:
        """Give up to `parts`, each below the one before, what they hold, and hang below them in their place."""
        for part in parts:
            part.serial, self.serial = self.serial, part.serial  # upper parts keep their place in the sibling order
            if self.kv is not None:
                part.kv = self.kv.split_off(part.end)
        for above, part in pairwise([*parts, self]):
            above.children = [part]
        if self.parent is None:
            self.tree.root = parts[0]
        else:
            siblings = self.parent.children
            siblings[siblings.index(self)] = parts[0]
        self.parent = parts[-1]
        at = self.parent.end - self.start
        self.tokens, self.logprob = self.tokens[at:], self.logprob[at:]
        self.logprob_raw, self.entropy = self.logprob_raw[at:], self.entropy[at:]
        self.start += at

    def fork(self, n: int = 1, at: int | None = None) -> list[Node]:
        """Begin `n` new branches that share everything before token `at` of this node (default: all of it).

        This only creates nodes: whole pages are shared, and at most one page is copied when a branch is extended.

        Returns:
            `n` pending nodes, to be given to `Engine.extend` (or yielded by a search).

        Raises:
            ValueError: `n` < 1, `at` out of range, or the node is still pending or was dropped.
            BudgetSpent: the tree would have more nodes than its budget allows; nothing is cut.
        """
        if n < 1:
            raise ValueError(f"fork: n={n} must be at least 1")
        at = at if at is None else index(at)
        if self.in_flight:
            raise ValueError(f"fork: {self!r} is being extended; abort it with keep=True, then fork it and resume it")
        if self.is_pending:
            raise ValueError(f"fork: {self!r} has no tokens yet; extend it first")
        if self.dropped:
            raise ValueError(f"fork: {self!r} was dropped from its tree; fork a node that is still there")
        check_nodes(self.tree, n + (at is not None and 0 < at < len(self)))
        base = self if at is None else self.split(at)
        return [base._branch() for _ in range(n)]

    def resume(self) -> Node:
        """Continue below this node with the random numbers that its branch would have drawn next.

        A branch that paused and was resumed holds the tokens of one that never paused: pausing is a `split` made early.
        Any end of a branch can be resumed: one that reached `max_tokens` continues as if that had been larger.

        Returns:
            A pending node, to be given to `Engine.extend`.

        Raises:
            ValueError: the node is the prompt, is pending, was dropped, or already has a continuation.
            BudgetSpent: the tree has all the nodes its budget allows.
        """
        if self.is_pending or self.dropped:
            raise ValueError(f"resume: {self!r} is pending or was dropped; resume a node that holds tokens")
        if self.stream == self.tree.root.stream:
            raise ValueError("resume: the prompt was not sampled; fork it instead")
        if any(child.continues_parent for child in self.children):
            raise ValueError(f"resume: {self!r} has been continued already; fork it for another branch")
        check_nodes(self.tree, 1)
        child = Node(self.tree, self, self.end, self.stream)
        child.birth, child.forks = self.birth, self.forks  # one stream, one count of forks
        self.children.append(child)
        return child

    def _branch(self) -> Node:
        ordinal = self.forks.get(self.end, 0)
        self.forks[self.end] = ordinal + 1
        child = Node(self.tree, self, self.end, mix(self.stream, self.end, ordinal))
        child.birth = (self.end, ordinal)
        self.children.append(child)
        return child

    def fill(
        self,
        tokens: Ints,
        logprob: Floats,
        logprob_raw: Floats,
        entropy: Floats,
        *,
        finish: str | None,
        version: int = 0,
    ) -> Self:
        """Give a pending node its tokens (each array [n]); the engine calls this when a branch ends.

        Raises:
            ValueError: the node holds tokens already.
        """
        if not self.is_pending:
            raise ValueError(f"fill: {self!r} already holds tokens; fork it to grow below it")
        self.tokens = np.asarray(tokens, np.int32)
        self.logprob = np.asarray(logprob, np.float32)
        self.logprob_raw = np.asarray(logprob_raw, np.float32)
        self.entropy = np.asarray(entropy, np.float32)
        self.finish = finish
        self.stopped_by = int(self.tokens[-1]) if finish == "stop" else None
        self.version = version
        self.tree.used.add_tokens(self)
        return self

    def drop(self) -> None:
        """Cut this node and everything below it off the tree and give its pages back.

        Raises:
            ValueError: this is the prompt (close the tree instead), or a branch below is being extended.
        """
        if self.parent is None or self.stream == self.tree.root.stream:
            raise ValueError("drop: the prompt cannot be dropped; close the tree instead")
        below = self.subtree()
        if any(node.in_flight for node in below):
            raise ValueError(f"drop: a branch below {self!r} is being extended; wait until it has finished")
        self.parent.children.remove(self)
        self.tree.used.nodes -= len(below)
        for node in below:
            self.tree.used.add_tokens(node, -1)
            node.dropped = True
            if node.kv is not None:
                node.kv.release()
                node.kv = None

    def abandon(self) -> None:
        """Take this node, which is being extended, off its tree; the engine calls this."""
        assert self.parent is not None
        self.in_flight, self.dropped = False, True
        self.parent.children.remove(self)
        self.tree.used.nodes -= 1


class Tree:
    """A prompt and everything sampled below it.

    Args:
        prompt: the prompt's token ids, at least one.
        key: names this tree's random numbers; the same seed and key give the same tokens.
        seed: the engine's seed.
        ordinal: place among the trees of an engine; neighbours are batched side by side.
        budget: what the tree may take at most; None sets no bounds.
        on_close: called once with the tree when it is closed (the engine takes its pages back).

    Attributes:
        closed: have its pages been given back?
        used: the quantities it holds that a budget may bound.
        ended_by: the error of this tree that ended its search early, `BudgetSpent` or `NoTokenAllowed`; else None.
    """

    def __init__(
        self,
        prompt: npt.ArrayLike,
        *,
        key: int = 0,
        seed: int = 0,
        ordinal: int = 0,
        budget: Budget | None = None,
        on_close: Callable[[Tree], None] | None = None,
    ) -> None:
        prompt = np.asarray(prompt)
        if prompt.ndim != 1 or len(prompt) == 0:
            raise ValueError(f"a tree needs a flat prompt of at least one token, got shape {prompt.shape}")
        if prompt.dtype.kind not in "iu" or not np.array_equal(prompt, prompt.astype(np.int32)):
            raise ValueError(f"a prompt is made of token ids, 32-bit integers; got {prompt.dtype} {prompt[:4]}...")
        if not (hasattr(key, "__index__") and hasattr(seed, "__index__")):
            raise ValueError(f"a tree's key and an engine's seed are integers; got key={key!r}, seed={seed!r}")
        self.key = key
        self.ordinal = ordinal
        self.budget = budget
        self.used = Used()
        self._serials = 0
        self._on_close = on_close
        self.closed = False
        self.ended_by: Exception | None = None
        self.root = Node(self, None, 0, mix(seed, key, -1))
        nothing = np.zeros(len(prompt), np.float32)
        self.root.fill(prompt, nothing, nothing, nothing, finish=None)
        self.prompt_len = len(prompt)
        self.notes: dict[str, Any] = {}

    def _next_serial(self) -> int:
        self._serials += 1
        return self._serials - 1

    @property
    def prompt(self) -> Node:
        """The node that the prompt ends with: the root, or the lowest part of a prompt that was cut."""
        node = self.root
        while node.end < self.prompt_len:
            node = node.children[0]  # the lower half of a cut prompt comes first, and is never dropped
        return node

    def nodes(self) -> list[Node]:
        """Every node that holds tokens, depth first."""
        return list(self.root.walk())

    def leaves(self) -> list[Node]:
        """The last node of every finished trajectory, depth first."""
        return self.root.leaves()

    @property
    def num_sampled(self) -> int:
        """Tokens sampled in this tree: every token but the prompt's, each counted once."""
        return self.used.tokens - self.prompt_len

    def export(self) -> PackedTree:
        """The tree in the layout the trainer and the kernels share (see `PackedTree`)."""
        return pack_tree(self)

    def close(self) -> None:
        """Give the tree's pages back; tokens and log-probs stay readable. Closing twice is allowed.

        Branches that are being extended leave the tree, and a search that grows it ends.
        """
        if not self.closed:
            if self._on_close is not None:
                self._on_close(self)
            self.closed = True  # not earlier: if interrupted, closing can be repeated
            self._on_close = None  # keeping the tree must not keep the engine, whose pool may be most of the memory

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_tree(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        fill_tree(self, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
