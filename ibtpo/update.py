"""One training step's update: advantages, packing, mini-batches, the clipped loss, AdamW."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ibtpo.advantage import NodeAdvantage, advantage, over_batch
from ibtpo.config import TrainConfig
from ibtpo.distributed.group import ALONE, Group, balance
from ibtpo.loss import policy_metrics, policy_objective, summarize
from ibtpo.optim import MasterAdamW, NonFinite, NonFiniteGradient
from ibtpo.pack import MicroBatch, blank, pack
from ibtpo_engine import Model, PackedTree, Parity, Tree, sampler_logprob
from ibtpo_kernels import linear_logprob, policy_head, with_value_of


def frozen_copy(model: Model) -> Model:
    """A copy without gradients: the reference policy."""
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return reference


def edge_logprob(model: Model, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of every edge [E] and entropy of every row [T] at this temperature, without top-p or top-k."""
    hidden = model.packed(batch.tokens, batch.pos, batch.end)
    return linear_logprob(hidden[batch.rows], model.head, batch.edge_row, batch.targets, temperature=temperature)


@torch.no_grad()
def full_logprobs(model: Model, batch: MicroBatch, temperature: float, parity: Parity) -> tuple[Tensor, Tensor]:
    """Log-prob of every edge at this temperature and at 1, each [E]; for "bitwise", computed as the sampler does."""
    hidden = model.packed(batch.tokens, batch.pos, batch.end, parity=parity)[batch.rows]
    edges = (hidden, model.head, batch.edge_row, batch.targets)
    if parity == "bitwise":
        return sampler_logprob(*edges, temperature=temperature)
    return linear_logprob(*edges, temperature=temperature)[0], linear_logprob(*edges)[0]


class Updater:
    """Updates a model in place from the trees of a training step.

    Args:
        model: the policy.
        optimizer: over its parameters.
        reference: the frozen starting policy; needed for a KL penalty or ``advantage.pi_ref = "reference"``. If it is
            `full` itself, its adapters are switched off for the reference's forward passes.
        config: everything else.
        group: the processes that share the work; all receive the same trees.
        full: the policy that samples, if `model` is its sharded copy; by default `model`.

    Attributes:
        nonfinite_in_a_row: optimizer steps skipped since the last one taken.
    """

    def __init__(
        self,
        model: Model,
        optimizer: MasterAdamW,
        reference: Model | None,
        config: TrainConfig,
        *,
        group: Group = ALONE,
        full: Model | None = None,
    ) -> None:
        self.nonfinite_in_a_row = 0
        self.model = model
        self.optimizer = optimizer
        self.reference = reference
        self.config = config
        self.group = group
        self.full = model if full is None else full
        sampling = config.sampling
        truncated = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        self.recompute = truncated or config.loss.old_logprob == "recompute"

    def _as_reference(self) -> AbstractContextManager[None]:
        return self.full.adapters_off() if self.reference is self.full else nullcontext()

    def update(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Take the optimizer steps of a training step; skipped groups are dropped first.

        An optimizer step whose loss or gradient holds NaN or Inf is skipped: weights and optimizer stay unchanged.

        Args:
            trees: finished and graded, with their estimates in ``tree.notes["ib"]``.

        Returns:
            metrics; if all groups are skipped, only `groups_skipped`, zero counts and the learning rate.

        Raises:
            NonFinite: too many optimizer steps in a row had to be skipped.
        """
        advantages = over_batch(self._advantages(trees), self.config.advantage)
        kept = [one for one in advantages if not one.skipped]
        counts = {
            "groups_skipped": float(len(trees) - len(kept)),
            "tokens_trained": 0.0,
            "optimizer_steps": 0.0,
            "optimizer_steps_skipped": 0.0,
            "lr": self.optimizer.lr,
        }
        parts = _divide(kept, self.config.mini_batches)
        mini_batches = [self._pack(part) for part in parts]
        if not mini_batches:
            return counts
        gap: dict[str, float] = {}
        if self.recompute:  # before the first optimizer step, while the weights are still the sampler's
            gap = self._recompute(mini_batches, parts)
        results, norms = [], []
        for batches in mini_batches:
            results.append(summarize(self._gradients(batches)))
            counts["lr"] = self.optimizer.lr
            if (norm := self._step(results[-1]["loss"])) is not None:
                norms.append(norm)
        packed = sum(len(batch) for batches in mini_batches for batch in batches)
        counts["tokens_trained"] = float(sum(self.group.gather(packed, "count tokens")))
        counts["optimizer_steps"] = float(len(norms))
        counts["optimizer_steps_skipped"] = float(len(mini_batches) - len(norms))
        norm = sum(norms) / len(norms) if norms else math.nan
        first = {name: results[0][name] for name in ("logprob_gap", "logprob_gap_max")}
        mean = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        trained = sum(int(one.lengths.sum()) for one in kept)
        efficiency = trained / counts["tokens_trained"]
        return mean | first | gap | counts | {"grad_norm": norm, "training_efficiency": efficiency}

    def _step(self, loss: float) -> float | None:
        """Take an optimizer step and return the gradient norm; None if it was skipped: loss or gradient not finite."""
        fault = f"the loss is {loss}"
        if math.isfinite(loss):
            try:
                norm = self.optimizer.step()
                self.nonfinite_in_a_row = 0
                return norm
            except NonFiniteGradient as error:
                fault = str(error).partition(";")[0]
        self.optimizer.discard()
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row > self.config.safeguards.nonfinite_steps:
            raise NonFinite(
                f"{self.nonfinite_in_a_row} optimizer steps in a row had NaN or Inf in loss or gradient and were "
                f"skipped (the last: {fault}); lower optim.lr and continue from the last checkpoint, or "
                "allow more with safeguards.nonfinite_steps"
            )
        return None

    def _gradients(self, batches: Sequence[MicroBatch]) -> list[Mapping[str, Tensor]]:
        """Add up gradients over this process's micro-batches; returns the metrics of all processes' micro-batches."""
        most = len(batches)
        if self.model is not self.full:  # sharded: every process must run as many passes as the one with most
            most = max(self.group.gather(most, "count micro-batches"))
        metrics = [self._accumulate(batch) for batch in batches]
        for _ in range(most - len(batches)):
            self._accumulate(blank(self.model.device))
        if self.group.size == 1:
            return [*metrics]
        return self.group.join([{n: value.cpu() for n, value in one.items()} for one in metrics], "share metrics")

    def _advantages(self, trees: Sequence[Tree]) -> list[NodeAdvantage]:
        if self.config.advantage.pi_ref != "reference":
            return [self._advantage(tree) for tree in trees]
        own = [self._reference_logprob(trees[i].export()) for i in self.group.share(len(trees))]
        logprobs = self.group.join(own, "score trees under the reference")
        return [self._advantage(*pair) for pair in zip(trees, logprobs, strict=True)]

    def _advantage(self, tree: Tree, reference: npt.NDArray[np.float32] | None = None) -> NodeAdvantage:
        return advantage(tree.export(), tree.notes["ib"], self.config.advantage, reference_logprob=reference)

    def _pack(self, advantages: Sequence[NodeAdvantage]) -> list[MicroBatch]:
        mine = balance([len(one.packed) for one in advantages], self.group.size)[self.group.rank]
        batches = pack(
            advantages,
            self.config.loss,
            micro_batch_tokens=self.config.micro_batch_tokens,
            max_tokens=self.config.sampling.max_tokens,
            only=mine,
        )
        return [batch.to(self.model.device) for batch in batches]

    def _accumulate(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch; gradients accumulate in the parameters."""
        temperature = self.config.sampling.temperature
        config, parity = self.config.loss, self.config.parity
        reference_logprob = None
        if self.reference is not None and config.kl_coef > 0:
            with self._as_reference():
                if parity == "bitwise":  # computed as the policy's, so that the penalty starts at exactly 0
                    reference_logprob, _ = full_logprobs(self.reference, batch, temperature, parity)
                else:
                    with torch.no_grad():
                        reference_logprob, _ = edge_logprob(self.reference, batch, temperature)
        hidden = self.model.packed(
            batch.tokens, batch.pos, batch.end, parity=parity, checkpointing=self.config.gradient_checkpointing
        )[batch.rows]
        exact: Tensor | None = None
        if parity == "bitwise":  # `policy_head` below computes the gradient, at log-probs equal up to rounding
            edges_of = (hidden, self.model.head, batch.edge_row, batch.targets)
            exact, _ = sampler_logprob(*edges_of, temperature=temperature)

        def objective(logprob: Tensor, entropy: Tensor, edges: Tensor | slice, rows: Tensor | slice) -> Tensor:
            if exact is not None:
                logprob = with_value_of(logprob, exact[edges])
            return policy_objective(logprob, entropy, batch, config, reference_logprob, edges, rows)

        loss, logprob, entropy = policy_head(
            hidden, self.model.head, batch.edge_row, batch.targets, objective, temperature=temperature
        )
        loss.backward()  # type: ignore[no-untyped-call]
        logprob = logprob if exact is None else exact
        metrics = policy_metrics(logprob, entropy, batch, config, reference_logprob)
        return metrics | {"loss": loss.detach()}

    @torch.no_grad()
    def _recompute(self, mini_batches: list[list[MicroBatch]], parts: list[list[NodeAdvantage]]) -> dict[str, float]:
        """Replace the sampler's log-probs (renormalised by top-p or top-k) in place by the trainer's full-softmax ones.

        Returns:
            the gap between sampler and trainer, measured on the full softmax at temperature 1, which both record.
        """
        total, weight, largest = 0.0, 0.0, 0.0
        for batches, part in zip(mini_batches, parts, strict=True):
            trees = [one.packed for one in part]
            for i, batch in enumerate(batches):
                old, raw = full_logprobs(self.full, batch, self.config.sampling.temperature, self.config.parity)
                difference = (raw.cpu() - _sampled_raw(trees, batch)).abs()
                total += float((difference * batch.weight.cpu()).sum())
                weight += float(batch.weight.sum())
                largest = max(largest, float(difference.max()))
                batches[i] = replace(batch, old_logprob=old)
        totals, weights, most = zip(*self.group.gather((total, weight, largest), "compare log-probs"), strict=True)
        return {"logprob_gap": sum(totals) / sum(weights), "logprob_gap_max": max(most)}

    @torch.no_grad()
    def _reference_logprob(self, packed: PackedTree) -> npt.NDArray[np.float32]:
        """[N]: the frozen reference's log-prob of every sampled token at the sampling temperature; 0 on the prompt."""
        assert self.reference is not None
        device = self.reference.device
        tokens = torch.from_numpy(packed.tokens).long().to(device)
        with self._as_reference():
            hidden = self.reference.packed(
                tokens, torch.from_numpy(packed.pos).to(device), torch.from_numpy(packed.end).to(device)
            )
        row = torch.from_numpy(packed.edge_row).long().to(device)
        target = tokens[torch.from_numpy(packed.edge_token).long().to(device)]
        logprob, _ = linear_logprob(
            hidden, self.reference.head, row, target, temperature=self.config.sampling.temperature
        )
        full = np.zeros(len(packed), np.float32)
        full[packed.edge_token] = logprob.cpu().numpy()
        return full


def _divide(trees: Sequence[NodeAdvantage], parts: int) -> list[list[NodeAdvantage]]:
    """Split in order into at most `parts` non-empty runs whose sizes differ by at most one."""
    parts = min(parts, len(trees))
    bounds = [round(i * len(trees) / parts) for i in range(parts + 1)] if parts else []
    return [list(trees[a:b]) for a, b in pairwise(bounds)]


def _sampled_raw(trees: Sequence[PackedTree], batch: MicroBatch) -> Tensor:
    """[E]: the sampler's full log-prob at temperature 1 of every edge's token."""
    pairs = zip(batch.edge_tree.tolist(), batch.edge_token.tolist(), strict=True)
    return torch.tensor([float(trees[tree].logprob_raw[token]) for tree, token in pairs])
