"""Budgets: how many tokens, nodes and pages one tree may take.

A budget is divided when branches are *submitted*, never while they run: n branches extended together each get an n-th
of the rest and end with "budget" where their share ends. A branch counts with its whole share until its caller has
received it. So the order in which branches run or finish decides nothing, and a tree with a budget holds the same
tokens in any batch and any pool. The unused part of a share is available to the next call.
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
        nodes: most nodes below the prompt, including pending ones and those made by cutting; a fork past it raises.
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
        finish: why it ends there: "length", or "budget" if the tree's budget set the limit.
    """

    depth: int
    finish: str = "length"


class Used:
    """What a tree holds, counted as it grows and shrinks, so that it need not be walked.

    Args:
        nodes: those that are there already.

    Attributes:
        nodes: number of nodes, including pending ones and the prompt's.
        tokens: number of tokens, including the prompt's.
        pages: pages that nodes with tokens touch, whether or not keys and values are there.
    """

    def __init__(self, nodes: Sequence[Node] = ()) -> None:
        self.nodes, self.tokens, self.pages = len(nodes), 0, 0
        for node in nodes:
            self.add_tokens(node)

    def add_tokens(self, node: Node, sign: int = 1) -> None:
        """Count a node that was filled (or, with sign -1, is dropped). Cutting it later changes neither sum."""
        self.tokens += sign * len(node)
        self.pages += sign * _pages(node, node.end)


def check_nodes(tree: Tree, more: int) -> None:
    """Refuse `more` nodes if the tree's budget has no room for them.

    Raises:
        BudgetSpent: they would exceed `Budget.nodes`.
    """
    if tree.budget is None or tree.budget.nodes is None:
        return
    there = tree.used.nodes - len(tree.prompt.path())
    if there + more > tree.budget.nodes:
        raise BudgetSpent(
            f"{more} nodes, {max(tree.budget.nodes - there, 0)} left of Budget.nodes={tree.budget.nodes}; drop a "
            "branch or open the tree with a larger budget"
        )


def within_budgets(limits: dict[Node, int], reserved: Callable[[Tree], Mapping[Node, int]]) -> dict[Node, Limit]:
    """Shorten the limits (depths) of branches submitted together to their trees' budgets.

    Args:
        limits: depth each node could reach if there were no budget.
        reserved: gives the depths that a tree's earlier branches may reach, which count as used.

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
    """Tokens below the prompt, and pages, that a tree holds or that are reserved."""
    ahead = [(node, end) for node, end in reserved.items() if not node.dropped]
    tokens = tree.used.tokens - tree.prompt_len + sum(end - node.end for node, end in ahead)
    return tokens, tree.used.pages + sum(_pages(node, end) - _pages(node, node.end) for node, end in ahead)


def check_room(node: Node, lengths: list[int], reserved: Mapping[Node, int]) -> None:
    """Refuse given suffixes of these lengths below a node if its tree's budget has no room for them.

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
    """The rest of a budget in `n` parts, equal or with the first ones larger by one."""
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
