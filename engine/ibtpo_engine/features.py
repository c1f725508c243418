"""Features of some branches beyond a plain step: shaped logits before a token is drawn, stop strings sought after it.

Branches without features are never handled one by one, and a step without any such branch costs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ibtpo_engine.arrays import Ints, Longs
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.shaping import Shape
from ibtpo_engine.stops import Decode, StopWatch
from ibtpo_engine.tree import Node

STOP = 1  # index into slots.FINISH


@dataclass(eq=False)
class Features:
    """The features of one branch, which keeps them when it is preempted."""

    shape: Shape | None = None
    watch: StopWatch | None = None
    may_stop_at: int = 0  # length its path must have for a stop string to end it
    stopped_by: str | None = None

    def leave(self, node: Node) -> None:
        """The branch has ended as this node: store what ended it, and its mask's state for forks below it."""
        if self.stopped_by is not None:
            node.stopped_by = self.stopped_by
        if self.shape is not None:
            node.mask = self.shape.cursor


def features_of(node: Node, sampling: Sampling, decode: Decode | None) -> Features | None:
    """The features of a pending node's branch; None if a plain step serves it.

    Args:
        decode: token ids to text; must be given if there are stop strings.
    """
    shape = Shape(node, sampling) if sampling.shapes_logits else None
    if shape is not None and shape.is_over(node.start):
        shape = None
    if not sampling.stop:
        return None if shape is None else Features(shape)
    assert decode is not None, "Engine checks this"
    watch = StopWatch(decode, sampling.stop, node.prefix(), node.births()[0][0], sampling.stop_block)
    return Features(shape, watch, sampling.length_to_stop(node.tree.prompt_len))


@dataclass
class FeatureTable:
    """The features of the branches that have any, by slot."""

    by_slot: dict[int, Features] = field(default_factory=dict)
    _all: Longs | None = None
    _parts: tuple[Longs, Longs] | None = None
    _shaped: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.by_slot)

    def split(self, slots: Longs, length: Ints) -> tuple[Longs, Longs]:
        """(plain, shaped): the slots whose next logits are sampled unchanged, and the others.

        Returns the same array objects as long as they hold the same slots, so that plans made for them are kept.
        """
        shaped = tuple(slot for slot in slots.tolist() if self.shape(slot, int(length[slot])) is not None)
        if self._all is not slots or self._parts is None or self._shaped != shaped:
            is_shaped = np.isin(slots, shaped)
            self._all, self._shaped = slots, shaped
            self._parts = (slots[~is_shaped] if shaped else slots, slots[is_shaped])
        return self._parts

    def shape(self, slot: int, depth: int) -> Shape | None:
        """The shape to apply to the logits of the slot's token at `depth`, or None."""
        features = self.by_slot.get(slot)
        if features is None or features.shape is None or features.shape.is_over(depth):
            return None
        return features.shape

    def follow(self, slots: Longs, code: Longs, length: Ints, last_token: list[int]) -> list[tuple[int, BaseException]]:
        """Look for stop strings after a token was recorded in each slot; writes the `code` of slots that end.

        Returns:
            (slot, exception of its `decode`), to be raised again once the step is accounted for.
        """
        errors: list[tuple[int, BaseException]] = []
        for i, slot in enumerate(slots.tolist()):
            features = self.by_slot.get(slot)
            if features is None or features.watch is None:
                continue
            try:
                found = features.watch.push(last_token[i])
            except BaseException as raised:
                errors.append((slot, raised))
                continue
            if found is not None and code[i] != STOP and length[slot] >= features.may_stop_at:
                code[i], features.stopped_by = STOP, found
        return errors
