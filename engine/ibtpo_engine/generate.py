"""Independent samples of prompts: the simplest use of the engine, one round of forks at each root."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from ibtpo_engine.tree import Node, Tree


def independent(n: int) -> Callable[[Tree], Generator[Sequence[Node], list[Node], None]]:
    """The search that samples `n` trajectories from the prompt and ends.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 trajectory a prompt")

    def search(tree: Tree) -> Generator[Sequence[Node], list[Node], None]:
        tree.notes["branches"] = branches = tree.root.fork(n)
        yield branches

    return search


def in_order(trees: Iterator[tuple[int, Tree]]) -> Iterator[list[Node]]:
    """The trajectories of each tree of `Engine.run`, in the order of the prompts."""
    early: dict[int, list[Node]] = {}
    turn = 0
    for index, tree in trees:
        early[index] = tree.notes["branches"]
        while turn in early:
            yield early.pop(turn)
            turn += 1
