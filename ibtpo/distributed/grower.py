"""Growing trees in several processes: each grows its share of the prompts, and all receive all trees."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ibtpo.distributed.group import ALONE, Group
from ibtpo.grow import Grower, OnLeaf, completion_of, ignore_leaf
from ibtpo.stopping import Interrupted
from ibtpo.tasks import Problem
from ibtpo_engine import Sampling, Search, Tree


@dataclass
class SharedGrower(Grower):
    """A `Grower` whose prompts are divided among the processes of a group.

    A tree's key decides its samples, so the trees are the same as those of a single process.
    """

    group: Group = field(default=ALONE, kw_only=True)

    def grow(
        self,
        problems: Iterable[Problem],
        keys: Sequence[int],
        search: Search,
        sampling: Sampling,
        on_tree: Callable[[Tree], None] = lambda tree: None,
        *,
        on_leaf: OnLeaf = ignore_leaf,
        keep: bool = True,
    ) -> tuple[list[Tree], float]:
        """As `Grower.grow`: all trees, in the order of the problems; the seconds are the slowest process's.

        `on_leaf` and `on_tree` are also called for the other processes' trees, once these have arrived. So all trees
        are kept until then, even without `keep`.

        Raises:
            Interrupted: `should_stop` returned True in any process.
        """
        mine = self.group.share(len(keys))
        own: list[Tree] = []
        grown: tuple[bytes, float] | None
        try:
            own, seconds = super().grow(
                islice(problems, mine.start, mine.stop),
                keys[mine.start : mine.stop],
                search,
                sampling,
                on_tree,
                on_leaf=on_leaf,
            )
            grown = pickle.dumps(own, pickle.HIGHEST_PROTOCOL), seconds
        except Interrupted:
            grown = None
        parts = [part for part in self.group.gather(grown, "exchange their trees") if part is not None]
        if len(parts) < self.group.size:
            raise Interrupted
        trees: list[Tree] = []
        for rank, (data, _) in enumerate(parts):
            theirs = own if rank == self.group.rank else pickle.loads(data)
            if rank != self.group.rank:
                for tree in theirs:
                    self._announce(tree, on_leaf)
                    on_tree(tree)
            trees += theirs
        return trees, max(seconds for _, seconds in parts)

    def _announce(self, tree: Tree, on_leaf: OnLeaf) -> None:
        if on_leaf is not ignore_leaf:  # the only use of the decoded texts
            for leaf in tree.leaves():
                on_leaf(tree, leaf, completion_of(self.tokenizer, tree, leaf), leaf.reward or 0.0)


def make_grower(grower: Grower, group: Group) -> Grower:
    """The grower itself in a group of one, else a `SharedGrower` of it."""
    return grower if group.size == 1 else SharedGrower(**vars(grower), group=group)
