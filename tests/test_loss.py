"""The clipped objective against arithmetic done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from losses import policy_loss
from torch import Tensor

from ibtpo.config import LossConfig
from ibtpo.loss import summarize
from ibtpo.pack import MicroBatch


def batch_of(positive: list[float], negative: list[float], weight: list[float], old: list[float]) -> MicroBatch:
    """A chain in which row e predicts edge e."""
    n = len(positive)
    index = torch.arange(n)

    def real(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return MicroBatch(
        tokens=index, pos=index, end=torch.full((n,), n, dtype=torch.int32), rows=index, edge_row=index, targets=index,
        positive=real(positive), negative=real(negative), weight=real(weight), old_logprob=real(old),
        positive_weight=real(weight) * (real(positive) > 0), negative_weight=real(weight) * (real(negative) < 0),
        multiplicity=torch.ones_like(index), edge_tree=torch.zeros_like(index), edge_token=index,
    )  # fmt: skip


def run(batch: MicroBatch, ratio: list[float], config: LossConfig, reference: list[float] | None = None):
    logprob = (batch.old_logprob + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    entropy = torch.arange(len(ratio), dtype=torch.float64)
    ref = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    loss, metrics = policy_loss(logprob, entropy, batch, config, ref)
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.item(), gradient.tolist(), summarize([metrics])


NO_KL = LossConfig(kl_coef=0.0, clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize("a", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_one_trajectory_gives_the_clipped_objective(a, ratio):
    """-min(r*A, clip(r)*A), and its gradient -r*A wherever the minimum is the first term."""
    batch = batch_of([max(a, 0.0)], [min(a, 0.0)], [1.0], [-1.0])
    loss, (gradient,), _ = run(batch, [ratio], NO_KL)
    clipped = min(max(ratio, 0.8), 1.28)
    assert loss == pytest.approx(-min(ratio * a, clipped * a))
    assert gradient == pytest.approx(-ratio * a if ratio * a <= clipped * a else 0.0)


def test_a_shared_token_adds_the_objectives_of_its_trajectories():
    """Advantages 3 and -1 on one token at ratio 1.5: -(3*min(1.5, 1.28) - 1*max(1.5, 0.8)) = -2.34."""
    loss, (gradient,), _ = run(batch_of([3.0], [-1.0], [2.0], [-1.0]), [1.5], NO_KL)
    assert loss == pytest.approx(-2.34)
    assert gradient == pytest.approx(1.5)  # only the trajectory that asks for less still pulls


def test_at_ratio_one_nothing_is_clipped_even_with_a_clip_range_of_zero():
    config = LossConfig(kl_coef=0.0, clip_low=0.0, clip_high=0.0)
    _, gradient, metrics = run(batch_of([1.0, 0.0], [0.0, -1.0], [0.5, 0.5], [-1.0, -1.0]), [1.0, 1.0], config)
    assert gradient == [-1.0, 1.0] and metrics["clip_fraction"] == 0


def test_kl_penalty_is_weighted_k3():
    """x = ref - logp = log 2: k3 = 2 - log 2 - 1; its derivative in logp is 1 - 2."""
    config = LossConfig(kl_coef=0.1)
    batch = batch_of([0.0], [0.0], [0.5], [-1.0])
    loss, (gradient,), metrics = run(batch, [1.0], config, [-1.0 + math.log(2)])
    assert loss == pytest.approx(0.1 * 0.5 * (1 - math.log(2)))
    assert gradient == pytest.approx(0.1 * 0.5 * -1)
    assert metrics["kl_ref_k3"] == pytest.approx(1 - math.log(2))
    assert metrics["kl_ref_k1"] == pytest.approx(-math.log(2))
    with pytest.raises(ValueError, match="needs reference_logprob"):
        run(batch, [1.0], config)


def test_metrics_are_weighted_means_whatever_the_micro_batches():
    whole = batch_of([1.0, 1.0, 0.0], [0.0, 0.0, -1.0], [0.5, 0.25, 0.25], [-1.0, -2.0, -3.0])
    ratio = [2.0, 1.0, 0.25]
    _, _, metrics = run(whole, ratio, NO_KL)
    log2, log4 = math.log(2), math.log(4)
    assert metrics["clip_fraction"] == pytest.approx(0.75)  # the first and the last
    assert metrics["entropy"] == pytest.approx(0.25 * 1 + 0.25 * 2)
    assert metrics["kl_old_k1"] == pytest.approx(-(0.5 * log2 - 0.25 * log4))
    assert metrics["kl_old_k3"] == pytest.approx(0.5 * (1 - log2) + 0.25 * (log4 - 0.75))
    assert metrics["logprob_gap"] == pytest.approx(0.5 * log2 + 0.25 * log4)
    assert metrics["logprob_gap_max"] == pytest.approx(log4)
    parts = []
    for keep in ([0, 2], [1]):
        names = ("positive", "negative", "weight", "positive_weight", "negative_weight", "old_logprob", "edge_row")
        part = replace(whole, **{name: getattr(whole, name)[keep] for name in names})
        logprob = part.old_logprob + torch.tensor(ratio, dtype=torch.float64)[keep].log()
        parts.append(policy_loss(logprob, torch.arange(3.0, dtype=torch.float64), part, NO_KL)[1])
    assert summarize(parts) == pytest.approx(metrics)


def test_a_shared_token_is_clipped_for_one_side_alone():
    """Of its weight 1, trajectories with A > 0 have .75 and one with A < 0 has .25; a ratio leaves the range once."""
    batch = batch_of([0.75], [-0.25], [1.0], [-1.0])
    shares = {name: torch.tensor([value], dtype=torch.float64) for name, value in
              (("positive_weight", 0.75), ("negative_weight", 0.25))}  # fmt: skip
    for ratio, clipped in ((2.0, 0.75), (0.5, 0.25), (1.0, 0.0)):
        assert run(replace(batch, **shares), [ratio], NO_KL)[2]["clip_fraction"] == clipped


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ratios_that_would_overflow_stay_finite(sign):
    """A log-prob 1000 nats off: loss and gradients are finite, and beyond e^20 no gradient flows."""
    batch = batch_of([1.0], [-1.0], [1.0], [-1001.0 if sign > 0 else -1.0])
    logprob = batch.old_logprob + 1000.0 * sign
    logprob = logprob.to(torch.float32).requires_grad_()
    loss, metrics = policy_loss(logprob, torch.zeros(1), batch, LossConfig(kl_coef=0.1), batch.old_logprob.float())
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert math.isfinite(loss.item()) and torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in summarize([metrics]).values())
