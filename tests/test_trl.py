"""The loss is TRL's with the settings that docs/method.md names, "The same loss in TRL and verl"."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_pack import MAX_TOKENS, near_policy, packed_loss
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trees import TinyModel, estimate, gradients, log_probs, random_trajectories

from ibtpo.advantage import NodeAdvantage, advantage
from ibtpo.config import AdvantageConfig, LossConfig
from ibtpo.pack import pack

LEAVES = 5


@pytest.fixture(scope="module")
def compute_loss() -> Callable[[Any, None, dict[str, Tensor]], Tensor]:
    """``GRPOTrainer._compute_loss`` of the TRL that is installed; importing its module takes a quarter of a minute."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    module = ast.parse((Path(spec.origin).parent / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8"))
    [trainer] = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "GRPOTrainer")
    [method] = (node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss")
    names: dict[str, Any] = {"torch": torch, "math": math, "nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module([method], []), "grpo_trainer.py", "exec"), names)
    return names["_compute_loss"]


def trajectories(trees: list[NodeAdvantage]) -> list[tuple[Tensor, int, Tensor]]:
    """Tokens, the prompt's length and old log-probs of every trajectory, nothing shared."""
    found = []
    for tree in trees:
        for leaf in (node for node in tree.packed.nodes if node.is_leaf):
            old = np.concatenate([node.logprob for node in leaf.path()[1:]])
            found.append((torch.from_numpy(leaf.prefix().astype(np.int64)), leaf.tree.prompt_len, torch.tensor(old)))
    return found


def token_logprobs(model: TinyModel, tokens: Tensor, prompt_len: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a completion's tokens, and the entropies of the rows that predict them."""
    n = len(tokens)
    rows = log_probs(model, tokens, torch.arange(n), torch.full((n,), n))[prompt_len - 1 : -1]
    return rows.gather(1, tokens[prompt_len:, None])[:, 0], -(rows.exp() * rows).sum(1)


class Trainer(SimpleNamespace):
    """What `_compute_loss` asks of its trainer; a switch that is not set is off."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def trl_loss(
    compute_loss: Callable[[Any, None, dict[str, Tensor]], Tensor],
    model: TinyModel,
    frozen: TinyModel,
    trees: list[NodeAdvantage],
    config: LossConfig,
    loss_type: str,
    scale_rewards: str,
) -> Tensor:
    rows = trajectories(trees)
    rewards = torch.tensor(
        [node.reward for tree in trees for node in tree.packed.nodes if node.is_leaf], dtype=torch.float64
    )
    groups = rewards.view(-1, LEAVES)  # as in _generate_and_score_completions
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)

    def padded(values: list[Tensor], side: str = "right") -> Tensor:
        return pad_sequence(values, batch_first=True, padding_side=side)

    def logprobs(*_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        logprob, entropy = zip(*(token_logprobs(model, tokens, begin) for tokens, begin, _ in rows), strict=True)
        return padded(list(logprob)), padded(list(entropy)), None

    completions = [tokens[begin:] for tokens, begin, _ in rows]
    inputs = {
        "prompt_ids": padded([tokens[:begin] for tokens, begin, _ in rows], "left"),
        "prompt_mask": padded([torch.ones(begin, dtype=torch.int64) for _, begin, _ in rows], "left"),
        "completion_ids": padded(completions),
        "completion_mask": padded([torch.ones_like(tokens) for tokens in completions]),
        "advantages": advantages.flatten(),
        "old_per_token_logps": padded([old.double() for _, _, old in rows]),
        "ref_per_token_logps": padded([token_logprobs(frozen, tokens, begin)[0].detach() for tokens, begin, _ in rows]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    trainer = Trainer(
        _get_per_token_logps_and_entropies=logprobs,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=Trainer(steps_per_generation=1),
        beta=config.kl_coef,
        current_gradient_accumulation_steps=1,
        epsilon_high=config.clip_high,
        epsilon_low=config.clip_low,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=MAX_TOKENS,
        model=SimpleNamespace(training=True),
        top_entropy_quantile=1.0,
    )
    return compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("aggregation", "loss_type"), [("token", "dapo"), ("sequence", "grpo"), ("dr_grpo", "dr_grpo")]
)
@pytest.mark.parametrize(("std", "scale_rewards"), [("sample", "group"), ("none", "none")])
@pytest.mark.parametrize(("clip_high", "kl_coef"), [(0.2, 0.0), (0.28, 0.0), (0.28, 0.04)])
def test_loss_and_gradients_are_those_of_trl(
    compute_loss, aggregation, loss_type, std, scale_rewards, clip_high, kl_coef
) -> None:
    """Trees with shared prefixes, one of equal rewards; off-policy so that the clip bites; every parameter, float64."""
    model, frozen, rng = TinyModel(1), TinyModel(2), Random(3)
    grown = [random_trajectories(rng, leaves=LEAVES, binary=False) for _ in range(4)]
    for leaf in grown[0][0].leaves():
        leaf.reward = 1.0
    grpo = AdvantageConfig(kind="grpo", std=std, std_eps=1e-4, uniform_groups="ib_only")
    trees = [advantage(tree.export(), estimate(tree, steps), grpo) for tree, steps in grown]
    near_policy(model, trees, 4)
    assert sum(len(tokens) - begin for tokens, begin, _ in trajectories(trees)) > sum(
        len(tree.packed.edge_token) for tree in trees
    )  # prefixes are shared
    config = LossConfig(aggregation=aggregation, clip_low=0.2, clip_high=clip_high, kl_coef=kl_coef)
    batches = pack(trees, config, micro_batch_tokens=40, max_tokens=MAX_TOKENS, dtype=torch.float64)
    ours, metrics = packed_loss(model, batches, config, lambda *packed: log_probs(frozen, *packed).detach())
    theirs = trl_loss(compute_loss, model, frozen, trees, config, loss_type, scale_rewards)
    assert 0.1 < metrics["clip_fraction"] < 0.9
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
