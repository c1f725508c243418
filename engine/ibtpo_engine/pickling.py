"""Pickling of trees without recursion.

Nodes refer to their parents and children; pickled naively, a deep tree would overflow the stack. So a tree is pickled
as the serial numbers of its nodes, from which empty nodes are made, followed by their contents with arrays joined. A
node is pickled as its tree and its number. `notes` are included and may refer to nodes.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ibtpo_engine.tree import Node, Tree

_ARRAYS = ("tokens", "logprob", "logprob_raw", "entropy")
_OF_THE_ENGINE = {"in_flight": False, "kv": None, "mask": None}
_REBUILT = {"children", "dropped", "parent", "tree"}
_MADE = "_made"  # attribute of an unpickled tree: its nodes by number


def reduce_tree(tree: Tree) -> tuple[Any, ...]:
    """`Tree.__reduce__`; the copy is closed and belongs to no engine."""
    nodes = tree.root.subtree()
    number = {node: i for i, node in enumerate(nodes)}
    plain = [name for name in type(tree.root).__slots__ if name not in {*_ARRAYS, *_OF_THE_ENGINE, *_REBUILT}]
    state = {
        "tree": {name: value for name, value in vars(tree).items() if name not in ("root", "_on_close", _MADE)},
        "parents": [-1 if node.parent is None else number[node.parent] for node in nodes],
        "lengths": [len(node) for node in nodes],
        "arrays": {name: np.concatenate([getattr(node, name) for node in nodes]) for name in _ARRAYS},
        "plain": {name: [getattr(node, name) for node in nodes] for name in plain},
    }
    return _blank_tree, (type(tree), type(tree.root), [node.serial for node in nodes]), state


def fill_tree(tree: Tree, state: dict[str, Any]) -> None:
    """Fill a tree made by `_blank_tree` with the state from `reduce_tree`."""
    vars(tree).update(state["tree"], _on_close=None, closed=True)
    nodes: list[Node] = list(vars(tree)[_MADE].values())
    bounds = np.cumsum(state["lengths"])[:-1]
    for name, joined in state["arrays"].items():
        for node, values in zip(nodes, np.split(joined, bounds), strict=True):
            setattr(node, name, values)
    for name, values in state["plain"].items():
        for node, value in zip(nodes, values, strict=True):
            setattr(node, name, value)
    for node, parent in zip(nodes, state["parents"], strict=True):
        node.tree, node.parent, node.children, node.dropped = tree, None, [], False
        for name, value in _OF_THE_ENGINE.items():
            setattr(node, name, value)
        if parent >= 0:
            node.parent = nodes[parent]
            node.parent.children.append(node)  # depth first keeps the order of siblings
    tree.root = nodes[0]


def reduce_node(node: Node) -> tuple[Any, ...]:
    """`Node.__reduce__`; a dropped node is pickled alone, with its own contents."""
    if node.dropped:
        state = {name: getattr(node, name) for name in node.__slots__} | _OF_THE_ENGINE
        return copyreg.__newobj__, (type(node),), (None, state)  # type: ignore[attr-defined]
    return _node_of, (node.tree, node.serial)


def _blank_tree(tree: type[Tree], node: type[Node], serials: list[int]) -> Tree:
    made = tree.__new__(tree)
    vars(made)[_MADE] = {serial: node.__new__(node) for serial in serials}
    return made


def _node_of(tree: Tree, serial: int) -> Node:
    node: Node = vars(tree)[_MADE][serial]
    return node
