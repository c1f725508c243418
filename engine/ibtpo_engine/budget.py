"""What one tree may take: tokens, nodes, pages.

A budget is shared out when branches are *submitted*, never while they run: n branches extended together each get an
n-th of what is left and end with "budget" where their share ends. A branch counts with its whole share until whoever
extended it is told that it ended. Who ran ahead of whom therefore decides nothing, and a tree with a budget holds the
same tokens in any batch and any pool. What a branch leaves over goes to the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ibtpo_engine.errors import BudgetSpent
from ibtpo_engine.pages import PAGE, pages_for

if TYPE_CHECKING:
    from ibtpo_engine.tree import Node, Tree


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds of one tree; None leaves a quantity unbounded.

    Attributes:
        tokens: most tokens below the prompt, each counted once; branches that reach their share end with "budget".
        nodes: most nodes below the prompt, pending ones and those made by cutting included; a fork past it raises.
        pages: most pages of the pool, prompt included; branches that reach their share end with "budget".

    Raises:
        ValueError: a bound is less than 1; the message names it.
    """

    tokens: int | None = None
    nodes: int | None = None
    pages: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "nodes", "pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Budget.{name}: {value} must be at least 1 (None sets no bound)")


class Limit(NamedTuple):
    """How far a branch may grow.

    Attributes:
        depth: one past the last position it may reach on its path.
        finish: why it ends there: "length", or "budget" where the tree's budget is what ends it.
    """

    depth: int
    finish: str = "length"


class Used:
    """What a tree holds, counted as it grows and is cut back, so that nobody has to walk it.

    Args:
        nodes: those that are there already.

    Attributes:
        nodes: pending ones and the prompt's included.
        tokens: the prompt's included.
        pages: those that nodes with tokens touch, whether or not keys and values are there.
    """

    def __init__(self, nodes: Sequence[Node] = ()) -> None:
        self.nodes, self.tokens, self.pages = len(nodes), 0, 0
        for node in nodes:
            self.add_tokens(node)

    def add_tokens(self, node: Node, sign: int = 1) -> None:
        """A node was filled (or, with sign -1, is dropped). Cutting it later changes neither sum."""
        self.tokens += sign * len(node)
        self.pages += sign * _pages(node, node.end)


def check_nodes(tree: Tree, more: int) -> None:
    """Refuse `more` nodes that the tree's budget does not hold.

    Raises:
        BudgetSpent: they would exceed `Budget.nodes`.
    """
    if tree.budget is None or tree.budget.nodes is None:
        return
    there = tree.used.nodes - len(tree.prompt.path())
    if there + more > tree.budget.nodes:
        raise BudgetSpent(
            f"{more} nodes more than the {there} of the tree exceed Budget.nodes={tree.budget.nodes}; drop a branch or "
            f"open the tree with a larger budget"
        )


def within_budgets(limits: dict[Node, int], reserved: Callable[[Tree], Mapping[Node, int]]) -> dict[Node, Limit]:
    """Shorten the limits (depths) of branches submitted together to their trees' budgets.

    Args:
        limits: depth each node could reach if there were no budget.
        reserved: tells the depths that branches of a tree submitted before may reach: spoken for.

    Raises:
        BudgetSpent: a tree cannot give each of its branches one token.
    """
    found = {node: Limit(depth=depth) for node, depth in limits.items()}
    by_tree: dict[Tree, list[Node]] = {}
    for node in limits:
        if node.tree.budget is not None:
            by_tree.setdefault(node.tree, []).append(node)
    for tree, nodes in by_tree.items():
        for node, depth in _shared_out(tree, nodes, reserved(tree)).items():
            if depth < limits[node]:
                found[node] = Limit(depth=depth, finish="budget")
    return found


def _shared_out(tree: Tree, nodes: list[Node], reserved: Mapping[Node, int]) -> dict[Node, int]:
    """Depth each node may reach by the tree's budget alone."""
    budget = tree.budget
    assert budget is not None
    tokens, pages = _taken(tree, reserved)
    depth = dict.fromkeys(nodes, 1 << 30)
    if budget.tokens is not None:
        for node, share in zip(nodes, _shares("tokens", budget.tokens, tokens, len(nodes)), strict=True):
            depth[node] = node.start + share
    if budget.pages is not None:
        for node, share in zip(nodes, _shares("pages", budget.pages, pages, len(nodes)), strict=True):
            depth[node] = min(depth[node], (node.start // PAGE + share + _shares_page(node)) * PAGE)
    return depth


def _taken(tree: Tree, reserved: Mapping[Node, int]) -> tuple[int, int]:
    """Tokens below the prompt, and pages, of what is there and of what is spoken for."""
    ahead = [(node, end) for node, end in reserved.items() if not node.dropped]
    tokens = tree.used.tokens - tree.prompt_len + sum(end - node.end for node, end in ahead)
    return tokens, tree.used.pages + sum(_pages(node, end) - _pages(node, node.end) for node, end in ahead)


def check_room(node: Node, lengths: list[int], reserved: Mapping[Node, int]) -> None:
    """Refuse given suffixes of these lengths below a node that its tree's budget does not hold.

    Raises:
        BudgetSpent: they would exceed `Budget.tokens` or `Budget.pages`.
    """
    tree = node.tree
    if tree.budget is None:
        return
    tokens, pages = _taken(tree, reserved)
    for name, bound, used, more in (
        ("tokens", tree.budget.tokens, tokens, sum(lengths)),
        ("pages", tree.budget.pages, pages, sum(pages_for(node.end + n) - node.end // PAGE for n in lengths)),
    ):
        if bound is not None and used + more > bound:
            raise _spent(name, bound, used, f"{more} {name}")


def _shares(name: str, bound: int, used: int, n: int) -> list[int]:
    """What is left in `n` equal parts, the first ones larger by one where it does not divide."""
    left = bound - used
    if left < n:
        raise _spent(name, bound, used, f"{n} branches need {n} {name}")
    return [left // n + (i < left % n) for i in range(n)]


def _spent(name: str, bound: int, used: int, asked: str) -> BudgetSpent:
    return BudgetSpent(
        f"{asked}, {max(bound - used, 0)} left of Budget.{name}={bound}; drop a branch or open the tree with a larger "
        f"budget"
    )


def _pages(node: Node, end: int) -> int:
    """Pages that a node over [node.start, end) adds to its tree; the lower half of a cut shares one."""
    if end <= node.start:
        return 0
    return pages_for(end) - node.start // PAGE - _shares_page(node)


def _shares_page(node: Node) -> bool:
    return node.continues_parent and node.start % PAGE > 0
