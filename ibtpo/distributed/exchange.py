"""Grown trees as bytes and back: whatever a search left on them travels along.

Nodes point at their parents and children; pickled as they are, a deep tree would overflow the stack. So a tree's nodes
are listed depth first, their arrays are joined, and any reference to a node or a tree is its number.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from ibtpo_engine import Node, Tree

_ARRAYS = ("tokens", "logprob", "logprob_raw", "entropy")
_LEFT_OUT = {*_ARRAYS, "children", "dropped", "in_flight", "kv", "mask", "parent", "tree"}  # the engine's, or rebuilt
_PLAIN = tuple(name for name in Node.__slots__ if name not in _LEFT_OUT)


def freeze(trees: Sequence[Tree]) -> bytes:
    """Finished trees with their notes; pending nodes and the engine's pages are left out."""
    nodes = [node for tree in trees for node in tree.nodes()]
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, [*trees, *nodes])
    pickler.dump(
        {
            "trees": [{name: value for name, value in vars(tree).items() if name != "_on_close"} for tree in trees],
            "owners": [node.tree for node in nodes],
            "parents": [node.parent for node in nodes],
            "lengths": [len(node) for node in nodes],
            "arrays": {
                name: np.concatenate([getattr(node, name) for node in nodes]) if nodes else () for name in _ARRAYS
            },
            "plain": {name: [getattr(node, name) for node in nodes] for name in _PLAIN},
        }
    )
    return buffer.getvalue()


def thaw(data: bytes) -> list[Tree]:
    """The trees that `freeze` was given, closed, as if they had been grown here."""
    unpickler = _Unpickler(io.BytesIO(data))
    state = unpickler.load()
    trees = [unpickler.made(Tree, index) for index in range(len(state["trees"]))]
    nodes = [unpickler.made(Node, len(trees) + index) for index in range(len(state["lengths"]))]
    for tree, values in zip(trees, state["trees"], strict=True):
        vars(tree).update(values, _on_close=None, closed=True)
    bounds = np.cumsum(state["lengths"])[:-1]
    for name in _ARRAYS if nodes else ():
        for node, values in zip(nodes, np.split(state["arrays"][name], bounds), strict=True):
            setattr(node, name, values)
    for name in _PLAIN:
        for node, value in zip(nodes, state["plain"][name], strict=True):
            setattr(node, name, value)
    for node, tree, parent in zip(nodes, state["owners"], state["parents"], strict=True):
        node.tree, node.parent, node.children = tree, parent, []
        node.kv, node.mask, node.in_flight, node.dropped = None, None, False, False
        if parent is not None:
            parent.children.append(node)  # depth first keeps the order of siblings
    return trees


class _Pickler(pickle.Pickler):
    """Writes the numbers of known objects instead of the objects."""

    def __init__(self, file: io.BytesIO, known: Sequence[Node | Tree]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._known = {id(value): index for index, value in enumerate(known)}

    def persistent_id(self, value: Any) -> tuple[type, int] | None:
        return (type(value), self._known[id(value)]) if isinstance(value, Node | Tree) else None


class _Unpickler(pickle.Unpickler):
    """Makes an empty object wherever a number is met first."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[int, Any] = {}

    def persistent_load(self, number: tuple[type, int]) -> Any:
        return self.made(*number)

    def made(self, kind: type, index: int) -> Any:
        if index not in self._made:
            self._made[index] = object.__new__(kind)
        return self._made[index]
