"""Scores of given tokens below a node, without sampling.

A suffix to be scored is a branch that already has its tokens: like a preempted branch it is filled, a chunk at a time,
in the same steps as everything else; then it ends instead of going on::

    prefix, shared         suffix, own pages
    [0 ........ start)     [start ................. end)
               hidden ---> token start              row d predicts token d + 1; the last token needs no row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo_engine.arrays import Floats, Ints
from ibtpo_engine.branches import Branch, Fill
from ibtpo_engine.randomness import mix
from ibtpo_engine.runner import Runner
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.slots import Outputs, Slots
from ibtpo_engine.tree import Node
from ibtpo_kernels import linear_logprob, sample, sampled_logprob

_GIVEN = -2  # mixed with a suffix's tokens into 64 bits that stand for a fork's ordinal, and equal none


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one suffix.

    Attributes:
        tokens: int32 [n], the suffix.
        logprob: float32 [n], log-probability of each token under the model at temperature 1, without filters.
        entropy: float32 [n], entropy in nats of the distribution that predicted each token.
        node: the node that holds the suffix, if it was kept.
    """

    tokens: Ints
    logprob: Floats
    entropy: Floats
    node: Node | None = None

    @property
    def total(self) -> float:
        """Log-probability of the whole suffix."""
        return float(self.logprob.sum(dtype=np.float64))


def check_suffixes(node: Node, suffixes: Sequence[npt.ArrayLike], *, vocabulary: int, context: int) -> list[Ints]:
    """The suffixes as int32 arrays.

    Raises:
        ValueError: one is empty, not flat, not made of token ids of the vocabulary, or longer than the context allows.
    """
    checked = []
    for i, suffix in enumerate(suffixes):
        tokens = np.asarray(suffix)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"score: suffix {i} must be a flat array of at least one token id, got {tokens.dtype} {tokens.shape}"
            )
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"score: suffix {i} has token ids outside the vocabulary [0, {vocabulary})")
        if node.end + len(tokens) > context:
            raise ValueError(
                f"score: suffix {i} of {len(tokens)} tokens ends at depth {node.end + len(tokens)}, past the model's "
                f"context of {context}; shorten it"
            )
        checked.append(tokens.astype(np.int32))
    return checked


def attach(node: Node, suffixes: Sequence[Ints]) -> list[Node]:
    """Pending children for given tokens; they do not count as forks, so later forks draw the same random numbers."""
    taken, children = {child.birth for child in node.children}, []
    for tokens in suffixes:
        birth = (node.end, mix(_GIVEN, *tokens.tolist()))
        while birth in taken:  # the same suffix twice: forks below the two must differ
            birth = (node.end, mix(_GIVEN, birth[1]))
        taken.add(birth)
        child = Node(node.tree, node, node.end, mix(node.stream, *birth))
        child.birth = birth
        children.append(child)
    node.children += children
    return children


def given_branch(node: Node, tokens: Ints) -> Branch:
    """The branch that computes `node`, pending, whose tokens are known."""
    zeros = np.zeros(len(tokens), np.float32)
    kept: Outputs = (tokens, zeros, zeros, zeros)
    return Branch(node, Sampling(), node.start + len(tokens), kept=kept, is_given=True)


def record_scores(slots: Slots, runner: Runner, fill: Fill, depths: Ints, hidden: Tensor | None) -> None:
    """Write into its slot the log-probs and entropies that a chunk of a given branch yields.

    Args:
        slots: hold the branch's slot.
        runner: its model's head is used; with `parity="bitwise"` the numbers have the bits of sampled ones.
        fill: the branch's.
        depths: int32 [c], the rows just run.
        hidden: [c, H], their final hidden states; None if no rows were run.
    """
    branch = fill.branch
    assert branch is not None and branch.node.parent is not None
    states, columns = [], depths + 1 - fill.start
    if len(depths) == 0 or depths[0] == fill.start:  # the first token is predicted by the prefix
        states, columns = [branch.node.parent.kv.hidden[None]], np.concatenate([np.zeros(1, np.int32), columns])
    if hidden is not None and len(depths):
        states.append(hidden)
    state = torch.cat(states)
    target = torch.from_numpy(fill.tokens[columns].astype(np.int64)).to(state.device)
    rows = torch.arange(len(state), device=state.device)
    if runner.parity == "bitwise":
        logits = runner.logits(state)
        logprob, _ = sampled_logprob(logits, rows, target, temperature=1.0)
        entropy = sample(logits, torch.zeros(len(rows), 2, dtype=torch.int64, device=state.device), temperature=1.0)[3]
    else:
        logprob, entropy = linear_logprob(state, runner.model.head, rows, target)
    slots.logprob[branch.slot, columns] = slots.logprob_raw[branch.slot, columns] = logprob.float().cpu().numpy()
    slots.entropy[branch.slot, columns] = entropy.float().cpu().numpy()
