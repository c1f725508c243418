"""Shaping the logits of a branch before sampling: the bias, then forbidden stop tokens, then the mask.

    shaped[v] = logit[v] + bias[v];   -inf if v is a stop token before min_tokens, or if the mask forbids v

Temperature and filters come after. `logprob` is that of the shaped distribution; `logprob_raw` and `entropy` stay those
of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibtpo_engine.arrays import Ints
from ibtpo_engine.errors import BranchFailed, NoTokenAllowed
from ibtpo_engine.masks import MaskCursor
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.tree import Node
from ibtpo_kernels import sample, sampled_logprob


class Shape:
    """Shapes the logits of one branch.

    Args:
        node: the pending node it samples.
        sampling: `logit_bias`, `min_tokens` with `stop_tokens`, and `allowed` are read.
    """

    def __init__(self, node: Node, sampling: Sampling) -> None:
        self.node = node
        self._ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64)
        self._may_stop_at = sampling.length_to_stop(node.tree.prompt_len) - 1  # depth of the first token that may stop
        self._allowed = sampling.allowed
        self.cursor: MaskCursor | None = None  # made with the first token, so that its error concerns only this branch

    def is_over(self, depth: int) -> bool:
        """Are logits left unchanged from the token at `depth` on?"""
        return self._allowed is None and len(self._ids) == 0 and (depth >= self._may_stop_at or len(self._stops) == 0)

    def apply(self, logits: Tensor, tokens: Ints) -> None:
        """Shape one row in place.

        Args:
            logits: [V], for the token at depth `node.start + len(tokens)`.
            tokens: int32 [n], what the branch sampled so far.

        Raises:
            NoTokenAllowed: every token is forbidden.
            ValueError: the mask returned something that is no mask.
        """
        depth, vocabulary = self.node.start + len(tokens), len(logits)
        if len(self._ids):
            logits.index_add_(0, self._ids.to(logits.device), self._bias.to(logits))
        if depth < self._may_stop_at:
            logits[self._stops[(self._stops >= 0) & (self._stops < vocabulary)].to(logits.device)] = -torch.inf
        if self._allowed is not None:
            if self.cursor is None:
                self.cursor = MaskCursor.at(self.node, self._allowed)
            assert self.cursor.depth <= depth, "a branch never loses what it sampled"
            self.cursor.advance(tokens[self.cursor.depth - self.node.start :])
            allowed = torch.from_numpy(self.cursor.allowed(vocabulary))
            logits.masked_fill_(~allowed.to(logits.device), -torch.inf)
        if bool((logits == -torch.inf).all()):
            raise NoTokenAllowed(
                f"{self.node!r}: Sampling.allowed, min_tokens and logit_bias leave no token at depth {depth}; let the "
                "mask allow a stop token where the text may end, and set min_tokens no higher than that"
            )


def sample_shaped(
    logits: Tensor,
    keys: Tensor,
    shapes: list[tuple[int, Shape, Ints]],
    *,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample`, after shaping the logits of some rows in float32: in place, if that is their type.

    Args:
        logits: [B, V].
        shapes: (row, its shape, the tokens its branch sampled) of each row to shape.

    Returns:
        token int64, logprob, logprob_raw, entropy float32, each [B]; see the top of this file.
    """
    if shapes:
        logits = logits.float()
        rows = torch.tensor([row for row, _, _ in shapes], device=logits.device)
        model = logits[rows]
        for row, shape, tokens in shapes:
            try:
                shape.apply(logits[row], tokens)
            except Exception as error:
                raise BranchFailed(shape.node, error) from error
    token, logprob, logprob_raw, entropy = sample(
        logits, keys, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
    if shapes:  # the model's own numbers, from its unshaped logits by the arithmetic of `sample`
        entropy[rows] = sample(model, keys[: len(rows)], temperature=0.0)[3]
        logprob_raw[rows] = sampled_logprob(model, torch.arange(len(rows), device=rows.device), token[rows])[1]
    return token, logprob, logprob_raw, entropy
