"""Packs finished trees into micro-batches: every shared token once, with the summed weight of its trajectories.

Packing deduplicates the computation, not the objective. Predictions belong to edges (a token and the row that predicts
it); an edge of a token shared by m trajectories carries the sum of their loss weights, so loss and gradient are those
of the unpacked trajectories. The weights include the averaging over the *whole* optimizer step, so the losses of its
micro-batches are simply added up.

A tree larger than the budget is cut into runs of nodes in depth-first order. A run needs the tokens above its first
node as context; they are copied without their edges, so the sum of the gradients does not change::

    nodes        q  a  b  c  d  e  f             q - a - b          depth-first order, cut before e
    first part   q  a  b  c  d                       |   ` c - d
    second part  q  .  .  .  .  e  f                 ` e - f        q is a copy

Tokens that no prediction depends on are left out, such as the last token of every trajectory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo.advantage import NodeAdvantage
from ibtpo.config import LossConfig
from ibtpo_engine.export import PackedTree

Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward and backward pass: a forest of N tokens, of whose rows T predict E tokens.

    Attributes:
        tokens, pos: int64 [N], token ids and depths (RoPE positions).
        end: int32 [N], exclusive subtree ends; query i sees key j <=> j <= i < end[j].
        rows: int64 [T], increasing; indices of the packed tokens whose hidden states predict a token.
        edge_row: int64 [E], index into `rows`.
        targets: int64 [E], the token predicted.
        positive, negative: float [E], sums over the trajectories through the token of weight * max(A, 0) and of
            weight * min(A, 0).
        weight: float [E], the sum of the weights; over an optimizer step it adds up to 1 (token mean).
        positive_weight, negative_weight: float [E], the same over trajectories with A > 0 or A < 0; for metrics.
        old_logprob: float [E], log-prob of the target under the policy that sampled it.
        multiplicity: int64 [E], m, number of trajectories through the token.
        edge_tree, edge_token: int64 [E], origin of the edge: index of its tree among those packed, and index of the
            predicted token in that tree.
    """

    tokens: Tensor
    pos: Tensor
    end: Tensor
    rows: Tensor
    edge_row: Tensor
    targets: Tensor
    positive: Tensor
    negative: Tensor
    weight: Tensor
    positive_weight: Tensor
    negative_weight: Tensor
    old_logprob: Tensor
    multiplicity: Tensor
    edge_tree: Tensor
    edge_token: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def pack(
    advantages: Sequence[NodeAdvantage],
    config: LossConfig,
    *,
    micro_batch_tokens: int,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
    only: Collection[int] | None = None,
) -> list[MicroBatch]:
    """Pack all trees of one optimizer step; skipped groups are left out of everything.

    Args:
        advantages: one a tree, for all trees of the optimizer step: means are taken over them.
        config: aggregation and weight of shared tokens.
        micro_batch_tokens: maximum packed tokens in a micro-batch. A longer trajectory gets a micro-batch of its own.
        max_tokens: length limit of a trajectory, the denominator of `dr_grpo`.
        dtype: of weights and log-probs.
        only: indices of the trees to pack; means are taken over all trees nevertheless.

    Returns:
        micro-batches whose losses add up to the step's loss, in a deterministic order; none if all trees are skipped.
    """
    kept = [(index, tree) for index, tree in enumerate(advantages) if not tree.skipped]
    num_trajectories = sum(len(tree.lengths) for _, tree in kept)
    weights = [_edge_weights(tree, config, num_trajectories, max_tokens) for _, tree in kept]
    if config.aggregation == "token":
        total = sum(of_tree[0].sum() for of_tree in weights)
        weights = [of_tree / total for of_tree in weights]
    parts = [
        _part(index, tree, of_tree, edges, dtype)
        for (index, tree), of_tree in zip(kept, weights, strict=True)
        if only is None or index in only
        for edges in _divide(tree.packed, np.flatnonzero(of_tree[0] > 0), micro_batch_tokens)
    ]
    bins = _first_fit([len(part) for part in parts], micro_batch_tokens)
    return [_side_by_side([parts[i] for i in chosen]) for chosen in bins]


def blank(device: torch.device) -> MicroBatch:
    """A micro-batch with zero loss and gradient, for a process that must take part in another's collective passes."""
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return MicroBatch(
        tokens=zero,
        pos=zero,
        end=zero.to(torch.int32) + 1,
        rows=zero,
        edge_row=zero,
        targets=zero,
        positive=none,
        negative=none,
        weight=none,
        positive_weight=none,
        negative_weight=none,
        old_logprob=none,
        multiplicity=zero,
        edge_tree=zero,
        edge_token=zero,
    ).to(device)


def _edge_weights(tree: NodeAdvantage, config: LossConfig, num_trajectories: int, max_tokens: int) -> Doubles:
    """[5, E]: the sums of `NodeAdvantage.weigh` for every edge; `token` still lacks its denominator."""
    per_trajectory = {
        "token": np.ones(len(tree.lengths)),
        "sequence": 1.0 / (num_trajectories * tree.lengths),
        "dr_grpo": np.full(len(tree.lengths), 1.0 / (num_trajectories * max_tokens)),
    }[config.aggregation]
    m = np.maximum(tree.multiplicity, 1)
    of_prefix = {"trajectory": np.ones(len(m)), "sqrt": 1.0 / np.sqrt(m), "node": 1.0 / m}[config.prefix_weight]
    per_node = np.stack(tree.weigh(per_trajectory)) * of_prefix
    return per_node[:, tree.packed.node[tree.packed.edge_token]]  # an edge belongs to the token it predicts


def _divide(packed: PackedTree, edges: Longs, budget: int) -> list[Longs]:
    """Edges of a tree by part: one part if the tokens they need fit the budget, else one for each run of `_cut`."""
    if _needed(packed, edges).sum() <= budget:
        return [edges]
    node = packed.node[packed.edge_token[edges]]
    parts = np.split(edges, np.searchsorted(node, _cut(packed, budget)[1:-1]))  # edges lie in packed order
    return [part for part in parts if len(part) > 0]


def _part(index: int, tree: NodeAdvantage, weights: Doubles, edges: Longs, dtype: torch.dtype) -> MicroBatch:
    """These edges of a tree and the tokens they need."""
    packed = tree.packed
    needed = _needed(packed, edges)
    place = np.concatenate([[0], np.cumsum(needed)])  # packed index -> index among the needed
    token = packed.edge_token[edges]
    rows, edge_row = np.unique(place[packed.edge_row[edges]], return_inverse=True)
    mass, positive, negative, positive_weight, negative_weight = torch.from_numpy(weights[:, edges]).to(dtype)
    return MicroBatch(
        tokens=_longs(packed.tokens[needed]),
        pos=_longs(packed.pos[needed]),
        end=_longs(place[packed.end[needed]]).to(torch.int32),
        rows=_longs(rows),
        edge_row=_longs(edge_row),
        targets=_longs(packed.tokens[token]),
        positive=positive,
        negative=negative,
        weight=mass,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
        old_logprob=torch.from_numpy(packed.logprob[token]).to(dtype),
        multiplicity=_longs(tree.multiplicity[packed.node[token]]),
        edge_tree=torch.full((len(edges),), index),
        edge_token=_longs(token),
    )


def _longs(values: npt.NDArray[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _needed(packed: PackedTree, edges: Longs) -> npt.NDArray[np.bool_]:
    """[N]: the tokens that the rows of these edges attend to, including themselves."""
    is_row = np.zeros(len(packed), np.int64)
    is_row[packed.edge_row[edges]] = 1
    before = np.concatenate([[0], np.cumsum(is_row)])
    return before[packed.end] > before[:-1]  # some row lies in [j, end[j])


def _cut(packed: PackedTree, budget: int) -> list[int]:
    """Bounds of runs of nodes that fit the budget together with their context, such that the least context is copied.

    In depth-first order every ancestor of a node in a run lies in the run or above its first node, so a run costs
    ``start of its first node + sum of its lengths``. A run may exceed the budget only if it is a single path: one with
    several paths costs more than the longest of them alone.
    """
    start = np.array([node.start for node in packed.nodes])
    length = np.array([len(node) for node in packed.nodes])
    before = np.concatenate([[0], np.cumsum(length)])
    forks = np.append(np.flatnonzero(start[1:] != (start + length)[:-1]) + 1, len(start))  # no child of the node before
    copied = np.full(len(start) + 1, np.inf)  # least context copied for nodes [0, i)
    copied[0] = 0
    origin = np.zeros(len(start) + 1, np.int64)
    for i in range(len(start)):
        fits = np.searchsorted(before, before[i] + budget - start[i], "right") - 1
        path = forks[np.searchsorted(forks, i, "right")]
        ends = np.arange(i + 1, max(fits, path) + 1)
        better = ends[copied[i] + start[i] < copied[ends]]
        copied[better] = copied[i] + start[i]
        origin[better] = i
    cuts = [len(start)]
    while cuts[-1] > 0:
        cuts.append(int(origin[cuts[-1]]))
    return cuts[::-1]


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: largest first, each into the first bin with room; equal sizes in the order given."""
    bins: list[list[int]] = []
    room = np.full(len(sizes), budget)  # of all possible bins; only a part larger than the budget fits in none
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen = int(np.argmax(room[: len(bins) + 1] >= sizes[item])) if sizes[item] <= budget else len(bins)
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        room[chosen] -= sizes[item]
    return [sorted(items) for items in bins]


def _side_by_side(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Concatenate micro-batches into one forest, shifting the indices."""
    joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(MicroBatch)}
    num_tokens = list(accumulate((len(part) for part in parts), initial=0))  # before each part
    num_rows = list(accumulate((len(part.rows) for part in parts), initial=0))
    joined["end"] = torch.cat([part.end + n for part, n in zip(parts, num_tokens, strict=False)])
    joined["rows"] = torch.cat([part.rows + n for part, n in zip(parts, num_tokens, strict=False)])
    joined["edge_row"] = torch.cat([part.edge_row + n for part, n in zip(parts, num_rows, strict=False)])
    return MicroBatch(**joined)
