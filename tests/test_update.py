"""One training step's update on hand-made trees: it learns, in the right direction, however the work is divided."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import tiny_model
from losses import policy_loss
from trees import VOCABULARY, chain, estimate, random_trajectories

from ibtpo.config import AdvantageConfig, LossConfig, OptimConfig, SamplingConfig, TrainConfig
from ibtpo.optim import MasterAdamW
from ibtpo.update import Updater, edge_logprob, frozen_copy
from ibtpo_engine import Model
from ibtpo_engine.tree import Node, Tree
from ibtpo_kernels import linear_logprob, one_pass

PLAIN = SamplingConfig(temperature=0.8, top_p=1.0, max_tokens=64)


def _config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "sampling": PLAIN,
        "loss": LossConfig(kl_coef=0.0),
        "optim": OptimConfig(lr=1e-3, warmup_steps=0, eps=1e-2),  # smooth in the gradient: rounding stays rounding
        "mini_batches": 1,
    }
    return TrainConfig(**(settings | changes))


def _model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    return tiny_model(seed, vocabulary=VOCABULARY, dtype=dtype).requires_grad_(True)


@torch.no_grad()
def _logprob(model: Model, tree: Tree, temperature: float) -> np.ndarray:
    """[N]: log-prob of every sampled token, 0 on the prompt."""
    packed = tree.export()
    tokens = torch.from_numpy(packed.tokens).long()
    hidden = model.packed(tokens, torch.from_numpy(packed.pos).long(), torch.from_numpy(packed.end))
    rows, targets = torch.from_numpy(packed.edge_row).long(), tokens[torch.from_numpy(packed.edge_token).long()]
    logprob, _ = linear_logprob(hidden, model.head, rows, targets, temperature=temperature)
    full = np.zeros(len(packed), np.float32)
    full[packed.edge_token] = logprob.float().numpy()
    return full


def _sampled_by(model: Model, tree: Tree, trajectories: Sequence[Sequence[Node]], temperature: float = 0.8) -> Tree:
    """The tree as if this model had sampled its tokens, with its estimates."""
    packed = tree.export()
    for name, values in (("logprob", _logprob(model, tree, temperature)), ("logprob_raw", _logprob(model, tree, 1.0))):
        for node, first in zip(packed.nodes, packed.first.tolist(), strict=True):
            setattr(node, name, values[first : first + len(node)])
    tree.notes["ib"] = estimate(tree, trajectories)
    return tree


def _trees(model: Model, count: int = 6, seed: int = 0, leaves: int = 5) -> list[Tree]:
    """Random trees, each with a right and a wrong trajectory at least."""
    rng, trees = Random(seed), []
    while len(trees) < count:
        tree, trajectories = random_trajectories(rng, leaves=leaves)
        if len({leaf.reward for leaf in tree.leaves()}) > 1:
            trees.append(_sampled_by(model, tree, trajectories))
    return trees


def _updater(model: Model, config: TrainConfig, reference: Model | None = None) -> Updater:
    return Updater(model, MasterAdamW(model, config.optim), reference, config)


def _flat(model: Model) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", ["ib-tpo", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_steps_become_likelier_and_wrong_ones_less_likely(kind: str, dtype: torch.dtype) -> None:
    model = _model(dtype=dtype)
    tree = Tree([1, 2, 3])
    right = chain(tree.root, [([4, 5], -1.0), ([6], -1.0)], reward=1.0)
    wrong = chain(tree.root, [([7], -1.0), ([8, 9], -1.0)], reward=0.0)
    _sampled_by(model, tree, [right, wrong])
    before = _logprob(model, tree, 0.8)
    config = _config(advantage=AdvantageConfig(kind=kind), optim=OptimConfig(lr=2e-3, warmup_steps=0))
    values = _updater(model, config).update([tree])
    change = _logprob(model, tree, 0.8) - before
    assert (change[3:6] > 0).all()  # packed depth first: the prompt, the right chain, the wrong one
    assert (change[6:9] < 0).all()
    assert values["optimizer_steps"] == 1
    assert values["tokens_trained"] == 3 + 2 + 2  # no prediction depends on the last token of a trajectory
    assert values["grad_norm"] > 0


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows", [5, 64], ids=["many-chunks", "one-chunk"])
def test_loss_metrics_and_gradients_are_those_of_log_probs_and_a_loss_after_them(
    chunk_rows: int, kl_coef: float, entropy_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one-pass head of the update against `policy_loss` of `edge_logprob`, in float64, by every parameter."""
    monkeypatch.setattr(one_pass, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(one_pass, "_CHUNK_ROWS", chunk_rows)
    model, reference = _model(dtype=torch.float64), _model(seed=1, dtype=torch.float64)
    loss_config = LossConfig(kl_coef=kl_coef, entropy_coef=entropy_coef, entropy_advantage_coef=entropy_coef / 2)
    config = _config(loss=loss_config)
    updater = _updater(model, config, reference if kl_coef else None)
    trees = _trees(_model(seed=2))  # sampled by another policy: ratios differ from one, some are clipped
    (batch,) = updater._pack([updater._advantage(tree) for tree in trees])
    logprob, entropy = edge_logprob(model, batch, 0.8)
    of_reference = edge_logprob(reference, batch, 0.8)[0].detach() if kl_coef else None
    loss, expected = policy_loss(logprob, entropy, batch, config.loss, of_reference)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    metrics = updater._accumulate(batch)
    assert expected["clip_fraction"] > 0
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, atol=1e-12, rtol=1e-12)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-10, msg=name)


def _alone(model: Model, leaf: Node, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [n] of a trajectory's n sampled tokens, computed without the rest of its tree."""
    tokens = torch.from_numpy(leaf.prefix()).long()
    hidden = model.packed(tokens, torch.arange(len(tokens)), torch.full((len(tokens),), len(tokens), dtype=torch.int32))
    logprobs = torch.log_softmax(hidden[leaf.tree.prompt_len - 1 : -1] @ model.head.T / temperature, dim=-1)
    of_tokens = logprobs.gather(1, tokens[leaf.tree.prompt_len :, None])[:, 0]
    return of_tokens, -(logprobs.exp() * logprobs).sum(dim=-1)


def _by_the_formula(leaf: Node, kind: str, config: TrainConfig) -> torch.Tensor:
    """Advantages [n] of a trajectory's sampled tokens, from the rewards of the leaves below its steps."""
    steps, group = leaf.path(), [other.reward for other in leaf.tree.leaves()]
    value = [np.mean([other.reward for other in step.leaves()]) for step in steps]
    deviation = np.std(group) + 1e-6
    if kind == "grpo":
        of_steps = [(leaf.reward - value[0]) / deviation] * (len(steps) - 1)
    else:
        ratio = [v / above if above > 0 else 1.0 for above, v in pairwise(value)]
        local = [
            (r - 1 - 1 / config.ib.beta) * np.exp(step.logprob.mean(dtype=np.float64))
            for r, step in zip(ratio, steps[1:], strict=True)
        ]
        weight = config.advantage.ib_weight
        of_steps = [(v - value[0]) / deviation + weight * a for v, a in zip(value[1:], local, strict=True)]
    return torch.tensor(np.repeat(of_steps, [len(step) for step in steps[1:]]))


@pytest.mark.parametrize("kind", ["ib-tpo", "grpo"])
def test_an_off_policy_step_logs_what_its_trajectories_come_to_one_at_a_time(kind: str) -> None:
    """Advantages, loss, clip share, divergences, entropies and gradient norm, none of them from a packed tree."""
    model, reference = _model(dtype=torch.float64), _model(seed=1, dtype=torch.float64)
    loss = LossConfig(clip_low=0.1, clip_high=0.3, kl_coef=0.2, entropy_coef=0.05, entropy_advantage_coef=0.03)
    config = _config(advantage=AdvantageConfig(kind=kind, ib_weight=0.5), loss=loss)
    trees = _trees(_model(seed=2))  # sampled by another policy: ratios differ from one
    leaves = [leaf for tree in trees for leaf in tree.leaves()]
    a = torch.cat([_by_the_formula(leaf, kind, config) for leaf in leaves])
    old = torch.cat([torch.from_numpy(np.concatenate([s.logprob for s in leaf.path()[1:]])) for leaf in leaves])
    logprob, entropy = (torch.cat(part) for part in zip(*(_alone(model, leaf, 0.8) for leaf in leaves), strict=True))
    other = torch.cat([_alone(reference, leaf, 0.8)[0].detach() for leaf in leaves])
    ratio, to_other = torch.exp(logprob - old), other - logprob
    k3 = torch.exp(to_other) - to_other - 1
    clipped = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
    objective = (clipped + 0.2 * k3 - 0.05 * entropy - 0.03 * entropy * a).mean()
    gradients = torch.autograd.grad(objective, list(model.parameters()))
    expected = {
        "loss": objective,
        "weight": torch.tensor(1.0),
        "clip_fraction": torch.where(a > 0, ratio > 1.3, (ratio < 0.9) & (a < 0)).double().mean(),
        "entropy": entropy.mean(),
        "entropy_advantage": (entropy * a).mean(),
        "kl_old_k1": (old - logprob).mean(),
        "kl_old_k3": (ratio - 1 - (logprob - old)).mean(),
        "kl_ref_k1": -to_other.mean(),
        "kl_ref_k3": k3.mean(),
        "logprob_gap": (logprob - old).abs().mean(),
        "grad_norm": torch.cat([gradient.flatten() for gradient in gradients]).norm(),
    }
    values = _updater(model, config, reference).update(trees)
    assert 0.01 < values["clip_fraction"] < 0.99
    assert {name: values[name] for name in expected} == pytest.approx({n: v.item() for n, v in expected.items()}, 1e-5)


def test_ratio_is_one_before_the_first_update_when_the_sampler_is_the_trainer() -> None:
    model = _model()
    values = _updater(model, _config()).update(_trees(model))
    assert values["logprob_gap_max"] < 1e-5
    assert abs(values["kl_old_k1"]) < 1e-6
    assert values["clip_fraction"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": SamplingConfig(temperature=0.8, top_p=0.9, max_tokens=64)},
        {"sampling": SamplingConfig(temperature=0.8, top_p=1.0, top_k=5, max_tokens=64)},
        {"sampling": SamplingConfig(temperature=0.8, top_p=1.0, min_p=0.1, max_tokens=64)},
        {"loss": LossConfig(kl_coef=0.0, old_logprob="recompute")},
    ],
)
def test_recomputed_ratio_is_exactly_one_whatever_the_sampler_renormalised(changes: dict[str, Any]) -> None:
    """Top-p, top-k, min-p: the sampler's log-probs are those of another distribution; the gap is taken on raw ones."""
    model = _model()
    trees = _trees(model)
    for tree in trees:
        for node in tree.nodes()[1:]:
            node.logprob = node.logprob + np.float32(0.5)  # as if two fifths of the mass had been cut off
    values = _updater(model, _config(**changes)).update(trees)
    assert values["kl_old_k1"] == 0.0
    assert values["kl_old_k3"] == 0.0
    assert values["clip_fraction"] == 0.0
    assert 0 <= values["logprob_gap"] <= values["logprob_gap_max"] < 1e-5


def test_recomputing_takes_the_old_policy_before_any_of_the_mini_batches() -> None:
    """The second mini-batch's ratio is measured against the policy before the first one's step, not against itself."""
    model = _model()
    trees = _trees(model)
    sampler, recompute = (
        _updater(copy.deepcopy(model), _config(mini_batches=3, loss=LossConfig(kl_coef=0.0, old_logprob=source)))
        for source in ("sampler", "recompute")
    )
    first, second = sampler.update(trees), recompute.update(trees)
    assert first["kl_old_k3"] > 1e-8
    assert second["kl_old_k3"] == pytest.approx(first["kl_old_k3"], rel=1e-2)
    torch.testing.assert_close(_flat(sampler.model), _flat(recompute.model), rtol=0, atol=1e-6)


def test_a_gap_between_sampler_and_trainer_is_reported() -> None:
    model = _model()
    trees = _trees(model)
    trees[0].nodes()[1].logprob = trees[0].nodes()[1].logprob - np.float32(0.25)
    values = _updater(model, _config()).update(trees)
    assert values["logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)
    assert 0 < values["logprob_gap"] < 0.25


def _divergence(model: Model, reference: Model, trees: Sequence[Tree]) -> float:
    gaps = [_logprob(reference, tree, 0.8) - _logprob(model, tree, 0.8) for tree in trees]
    gap = np.concatenate(gaps)
    return float((np.expm1(gap) - gap).mean())


def test_a_kl_penalty_keeps_the_policy_closer_to_its_reference() -> None:
    distances = {}
    for kl_coef in (0.0, 1.0):
        model = _model()
        reference = frozen_copy(model)
        trees = _trees(model)
        updater = _updater(model, _config(loss=LossConfig(kl_coef=kl_coef)), reference)
        values = [updater.update(trees) for _ in range(12)]
        distances[kl_coef] = _divergence(model, reference, trees)
        assert ("kl_ref_k3" in values[-1]) == (kl_coef > 0)
        assert torch.equal(_flat(reference), _flat(_model()))  # the reference itself never moves
        if kl_coef:
            assert values[0]["kl_ref_k3"] == pytest.approx(0, abs=1e-9)
            assert values[-1]["kl_ref_k3"] > 0
    assert distances[1.0] < 0.7 * distances[0.0]


def test_frozen_copy_takes_no_gradient_and_shares_no_weight() -> None:
    model = _model()
    reference = frozen_copy(model)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert not torch.equal(next(model.parameters()), next(reference.parameters()))


@pytest.mark.parametrize("budget", [1, 12, 30])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_update_does_not_depend_on_the_micro_batch_budget(budget: int, top_p: float) -> None:
    """Trees larger than the budget are split at nodes; the parameters after the update are the same."""
    models = []
    for micro_batch_tokens in (100_000, budget):
        model = _model()
        trees = _trees(model, count=4, leaves=7)
        sampling = SamplingConfig(temperature=0.8, top_p=top_p, max_tokens=64)
        config = _config(micro_batch_tokens=micro_batch_tokens, sampling=sampling, mini_batches=2)
        values = _updater(model, config).update(trees)
        models.append((model, values))
    (whole, one), (split, many) = models
    assert many["tokens_trained"] > one["tokens_trained"]  # what is above a part is computed again
    assert not torch.equal(_flat(whole), _flat(_model()))
    torch.testing.assert_close(_flat(split), _flat(whole), rtol=0, atol=1e-6)
    for name in ("loss", "entropy", "kl_old_k3", "grad_norm", "weight"):
        assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_uniform_groups_alone_change_nothing() -> None:
    model = _model()
    before = _flat(model)
    trees = []
    for reward in (0.0, 1.0):
        tree = Tree([1, 2])
        trees.append(_sampled_by(model, tree, [chain(tree.root, [([i], -1.0)], reward) for i in (3, 4)]))
    updater = _updater(model, _config())
    values = updater.update(trees)
    assert torch.equal(_flat(model), before)
    assert updater.optimizer.num_steps == 0
    assert values.pop("optimizer_steps_skipped") == 0.0
    assert values == {"groups_skipped": 2.0, "tokens_trained": 0.0, "optimizer_steps": 0.0, "lr": 1e-3}


def test_uniform_groups_among_others_are_left_out() -> None:
    model, other = _model(), _model()
    trees = _trees(model, count=2)
    tree = Tree([1, 2])
    uniform = _sampled_by(model, tree, [chain(tree.root, [([i], -1.0)], 1.0) for i in (3, 4)])
    with_uniform = _updater(model, _config()).update([trees[0], uniform, trees[1]])
    without = _updater(other, _config()).update(trees)
    assert with_uniform.pop("groups_skipped") == 1
    assert without.pop("groups_skipped") == 0
    assert with_uniform == without
    assert torch.equal(_flat(model), _flat(other))


def test_ib_only_trains_uniform_groups_too() -> None:
    model = _model()
    before = _flat(model)
    tree = Tree([1, 2])
    _sampled_by(model, tree, [chain(tree.root, [([i], -1.0)], 1.0) for i in (3, 4)])
    values = _updater(model, _config(advantage=AdvantageConfig(uniform_groups="ib_only"))).update([tree])
    assert values["groups_skipped"] == 0
    assert not torch.equal(_flat(model), before)


def test_no_more_mini_batches_than_groups_that_are_kept() -> None:
    model = _model()
    trees = _trees(model, count=2)
    uniform = []
    for _ in range(4):
        tree = Tree([1, 2])
        uniform.append(_sampled_by(model, tree, [chain(tree.root, [([i], -1.0)], 1.0) for i in (3, 4)]))
    updater = _updater(model, _config(mini_batches=6))
    values = updater.update([*uniform[:2], trees[0], *uniform[2:], trees[1]])
    assert values["optimizer_steps"] == 2 == updater.optimizer.num_steps
    assert values["groups_skipped"] == 4


@pytest.mark.parametrize(("count", "mini_batches", "steps"), [(6, 2, 2), (5, 3, 3), (1, 4, 1), (6, 6, 6)])
def test_every_mini_batch_is_one_optimizer_step(count: int, mini_batches: int, steps: int) -> None:
    model = _model()
    updater = _updater(model, _config(mini_batches=mini_batches))
    trees = _trees(model, count=count)
    values = updater.update(trees)
    assert values["optimizer_steps"] == steps == updater.optimizer.num_steps
    assert values["tokens_trained"] == sum(len(tree.export()) - len(tree.leaves()) for tree in trees)  # each once
    assert values["weight"] == pytest.approx(1.0)  # metrics are means over the mini-batches


def test_a_mini_batch_whose_loss_is_nan_leaves_no_trace_in_the_next() -> None:
    model, other = _model(), _model()
    broken, sound = _trees(model, count=2)
    broken.leaves()[0].logprob[:] = np.nan
    updater = _updater(model, _config(mini_batches=2))
    values = updater.update([broken, sound])
    assert (values["optimizer_steps"], values["optimizer_steps_skipped"]) == (1, 1)
    assert updater.nonfinite_in_a_row == 0
    _updater(other, _config()).update([sound])
    assert torch.equal(_flat(model), _flat(other))


def test_pi_ref_reference_scales_by_the_reference_not_by_the_sampler() -> None:
    """The same as "sampling" while the reference is the policy that sampled; different with another reference."""
    results = []
    for pi_ref, reference_seed in (("sampling", 0), ("reference", 0), ("reference", 5)):
        model = _model()
        trees = _trees(model)
        config = _config(advantage=AdvantageConfig(pi_ref=pi_ref, ib_weight=1.0))
        assert config.needs_reference == (pi_ref == "reference")
        _updater(model, config, frozen_copy(_model(reference_seed))).update(trees)
        results.append(_flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert float((results[0] - results[2]).abs().max()) > 1e-5
