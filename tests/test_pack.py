"""Packing changes where tokens are computed, never the objective."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from engine_helpers import work
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import policy_loss
from trees import VOCABULARY, TinyModel, chain, estimate, gradients, log_probs, random_trajectories, unpacked_loss

from ibtpo.advantage import NodeAdvantage, advantage
from ibtpo.config import AdvantageConfig, LossConfig
from ibtpo.loss import summarize
from ibtpo.pack import MicroBatch, _cut, _first_fit, pack
from ibtpo_engine.model import Model, initialise
from ibtpo_engine.model_config import ModelConfig
from ibtpo_engine.tree import Node, Tree
from ibtpo_kernels import linear_logprob

MAX_TOKENS = 40
LOSSES = st.builds(
    LossConfig,
    clip_low=st.sampled_from([0.0, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28]),
    kl_coef=st.sampled_from([0.0, 0.5]),
    entropy_coef=st.sampled_from([0.0, 0.3]),
    entropy_advantage_coef=st.sampled_from([0.0, 0.2]),
    aggregation=st.sampled_from(["token", "sequence", "dr_grpo"]),
    prefix_weight=st.sampled_from(["trajectory", "sqrt", "node"]),
)


def forest(seed: int, trees: int = 3, **config: object) -> list[NodeAdvantage]:
    """Random trees with advantages and random rewards in [0, 1]."""
    rng = Random(seed)
    grown = [random_trajectories(rng, leaves=rng.randint(1, 5), binary=False) for _ in range(trees)]
    return [advantage(tree.export(), estimate(tree, t), AdvantageConfig(ib_weight=0.5, **config)) for tree, t in grown]


def near_policy(model: torch.nn.Module, advantages: list[NodeAdvantage], seed: int) -> None:
    """Off-policy old log-probs: the model's own plus noise, so that ratios fall on every side of the clip range."""
    noise = np.random.default_rng(seed)
    for tree in advantages:
        packed = tree.packed
        tokens, pos, end = (torch.from_numpy(a.astype(np.int64)) for a in (packed.tokens, packed.pos, packed.end))
        logp = log_probs(model, tokens, pos, end)[packed.edge_row, packed.tokens[packed.edge_token]].detach().numpy()
        packed.logprob[packed.edge_token] = logp + noise.normal(0, 0.3, len(logp))
        for node, own in zip(packed.nodes, np.split(packed.logprob, packed.first[1:]), strict=True):
            node.logprob = own


def packed_loss(model, batches: list[MicroBatch], config: LossConfig, reference=None):
    """Sum over micro-batches, log-probs through the fused op."""
    losses, metrics = [], []
    for batch in batches:
        hidden = model.packed(batch.tokens, batch.pos, batch.end)[batch.rows]
        logprob, entropy = linear_logprob(hidden, model.head, batch.edge_row, batch.targets)
        ref = None
        if reference is not None:
            ref = reference(batch.tokens, batch.pos, batch.end)[batch.rows][batch.edge_row, batch.targets]
        loss, numbers = policy_loss(logprob, entropy, batch, config, ref)
        losses.append(loss)
        metrics.append(numbers)
    return torch.stack(losses).sum(), summarize(metrics)


def check_gradients(model, advantages: list[NodeAdvantage], config: LossConfig, budget: int, reference=None) -> dict:
    batches = pack(advantages, config, micro_batch_tokens=budget, max_tokens=MAX_TOKENS, dtype=torch.float64)
    loss, metrics = packed_loss(model, batches, config, reference)
    expected = unpacked_loss(model, advantages, config, MAX_TOKENS, reference)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )
    return metrics


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), LOSSES, st.sampled_from(["ib-tpo", "grpo"]), st.integers(5, 60))
def test_packed_gradient_of_every_parameter_equals_the_unpacked_one(seed, config, kind, budget):
    """Random forests, off-policy so that the clip bites, all weightings, budgets that split trees; float64."""
    model = TinyModel(seed)
    advantages = forest(seed, kind=kind)
    if all(tree.skipped for tree in advantages):
        return
    near_policy(model, advantages, seed)
    frozen = TinyModel(seed + 1)
    reference = (lambda *packed: log_probs(frozen, *packed).detach()) if config.kl_coef else None
    check_gradients(model, advantages, config, budget, reference)


def qwen3(seed: int) -> Model:
    """A random Qwen3 of two layers in float64, its weights large enough for attention to matter."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "tie_word_embeddings": True,
        }
    )
    model = initialise(Model(config), seed).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dr_grpo"])
@pytest.mark.parametrize("prefix_weight", ["trajectory", "sqrt", "node"])
@pytest.mark.parametrize("kind", ["ib-tpo", "grpo"])
def test_the_real_model_has_the_unpacked_gradient_too(aggregation, prefix_weight, kind):
    model, frozen = qwen3(0), qwen3(1)
    advantages = forest(7, kind=kind)
    near_policy(model, advantages, 7)
    config = LossConfig(
        aggregation=aggregation, prefix_weight=prefix_weight, kl_coef=0.5, entropy_coef=0.3, entropy_advantage_coef=0.2
    )
    reference = lambda *packed: log_probs(frozen, *packed).detach()  # noqa: E731
    metrics = [check_gradients(model, advantages, config, budget, reference) for budget in (10**6, 30)]
    assert 0.1 < metrics[0]["clip_fraction"] < 0.9  # the clip was active
    for name, value in metrics[0].items():  # and what is logged does not depend on the micro-batches either
        assert metrics[1][name] == pytest.approx(value, rel=1e-9), name


def test_weights_of_a_token_mean_add_up_to_one():
    for prefix_weight in ("trajectory", "sqrt", "node"):
        batches = pack(forest(3), LossConfig(prefix_weight=prefix_weight), micro_batch_tokens=20, max_tokens=40)
        assert sum(float(batch.weight.sum()) for batch in batches) == pytest.approx(1.0, abs=1e-6)
    batches = pack(forest(3), LossConfig(aggregation="sequence"), micro_batch_tokens=20, max_tokens=40)
    assert sum(float(batch.weight.sum()) for batch in batches) == pytest.approx(1.0, abs=1e-6)


def shared_step() -> NodeAdvantage:
    """Prompt of 2, a step of 2 shared by two trajectories that end after 1 and 3 more tokens."""
    tree = Tree([1, 2])
    first = chain(tree.root, [([3, 4], -1.0), ([5], -1.0)], 1.0)
    second = chain(first[0], [([6, 7, 8], -1.0)], 0.0)
    return advantage(tree.export(), estimate(tree, [first, second]), AdvantageConfig(kind="grpo", std_eps=0.0))


@pytest.mark.parametrize(
    ("aggregation", "prefix_weight", "shared", "short", "long"),
    [
        ("token", "trajectory", 2 / 8, 1 / 8, 1 / 8),  # trajectories of 3 and 5 tokens
        ("token", "sqrt", 2**0.5 / (2 * 2**0.5 + 4), 1 / (2 * 2**0.5 + 4), 1 / (2 * 2**0.5 + 4)),
        ("token", "node", 1 / 6, 1 / 6, 1 / 6),
        ("sequence", "trajectory", (1 / 3 + 1 / 5) / 2, 1 / 6, 1 / 10),
        ("sequence", "node", (1 / 3 + 1 / 5) / 4, 1 / 6, 1 / 10),
        ("dr_grpo", "trajectory", 2 / 80, 1 / 80, 1 / 80),
        ("dr_grpo", "sqrt", 2**0.5 / 80, 1 / 80, 1 / 80),
    ],
)
def test_hand_computed_weights(aggregation, prefix_weight, shared, short, long):
    config = LossConfig(aggregation=aggregation, prefix_weight=prefix_weight)
    (batch,) = pack([shared_step()], config, micro_batch_tokens=99, max_tokens=40, dtype=torch.float64)
    assert batch.weight.tolist() == pytest.approx([shared] * 2 + [short] + [long] * 3)
    assert batch.multiplicity.tolist() == [2, 2, 1, 1, 1, 1]
    if aggregation == "token":  # advantages are +1 and -1
        assert batch.positive.tolist() == pytest.approx([shared / 2] * 2 + [short] + [0] * 3)
        assert batch.negative.tolist() == pytest.approx([-shared / 2] * 2 + [0] + [-long] * 3)


def test_hand_computed_layout():
    """Packed: 1 2 3 4 | 6 7; the last tokens 5 and 8 predict nothing and are left out."""
    (batch,) = pack([shared_step()], LossConfig(), micro_batch_tokens=99, max_tokens=40)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 6, 7]
    assert batch.pos.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.end.tolist() == [6] * 6
    assert batch.rows.tolist() == [1, 2, 3, 4, 5]  # token 2 is the first to predict
    assert batch.rows[batch.edge_row].tolist() == [1, 2, 3, 3, 4, 5]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.edge_token.tolist() == [2, 3, 4, 5, 6, 7] and batch.edge_tree.tolist() == [0] * 6
    assert (batch.tokens.dtype, batch.end.dtype, batch.weight.dtype) == (torch.int64, torch.int32, torch.float32)


def paths(batch: MicroBatch) -> list[tuple[tuple[int, ...], int]]:
    """What each edge sees, through the visibility rule, and what it predicts."""
    index = torch.arange(len(batch))
    seen = [batch.tokens[(index <= row) & (row < batch.end)] for row in batch.rows[batch.edge_row]]
    return [(tuple(tokens.tolist()), int(target)) for tokens, target in zip(seen, batch.targets, strict=True)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 80))
def test_every_prediction_is_packed_once_with_its_whole_path(seed, budget):
    advantages = forest(seed)
    batches = pack(advantages, LossConfig(), micro_batch_tokens=budget, max_tokens=40)
    expected = []
    for tree in advantages:
        if not tree.skipped:
            for node in tree.packed.nodes[1:]:
                prefix = node.prefix()
                expected += [(tuple(prefix[:t].tolist()), int(prefix[t])) for t in range(node.start, node.end)]
    assert sorted(path for batch in batches for path in paths(batch)) == sorted(expected)
    for batch in batches:
        assert (batch.rows.diff() > 0).all()
        longest = int(batch.pos.max()) + 1
        assert len(batch) <= max(budget, longest)
        assert set(batch.edge_row.tolist()) == set(range(len(batch.rows)))  # no row without an edge
    again = pack(advantages, LossConfig(), micro_batch_tokens=budget, max_tokens=40)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))


def test_edges_name_the_token_they_come_from():
    advantages = forest(11)
    for batch in pack(advantages, LossConfig(), micro_batch_tokens=12, max_tokens=40):
        for tree, token, target in zip(batch.edge_tree, batch.edge_token, batch.targets, strict=True):
            assert advantages[tree].packed.tokens[token] == target


def test_a_trajectory_longer_than_the_budget_is_one_micro_batch():
    tree = Tree([1])
    trajectories = [chain(tree.root, [([2] * 5, -1.0)] * 6, 1.0), chain(tree.root, [([3] * 2, -1.0)], 0.0)]
    result = advantage(tree.export(), estimate(tree, trajectories), AdvantageConfig())
    sizes = [len(batch) for batch in pack([result], LossConfig(), micro_batch_tokens=8, max_tokens=40)]
    assert sorted(sizes) == [2, 30]  # 1 + 30 and 1 + 2 tokens, less the last of each


@pytest.mark.parametrize("seed", range(12))
def test_runs_of_nodes_are_those_that_fit_or_are_one_path(seed):
    """By the definition, which looks at every run of every tree: cut at every budget, the least context is copied."""
    packed = random_trajectories(Random(seed), leaves=9)[0].export()
    start, length = (np.array([value(node) for node in packed.nodes]) for value in (lambda node: node.start, len))
    for budget in range(2, 40, 3):
        copied = {0: 0}
        for end in range(1, len(start) + 1):
            runs = [
                begin
                for begin in range(end)
                if start[begin] + length[begin:end].sum() <= max(budget, (start + length)[begin:end].max())
            ]
            copied[end] = min(copied[begin] + start[begin] for begin in runs)
        cuts = _cut(packed, budget)
        assert start[cuts[:-1]].sum() == copied[len(start)]
        for begin, end in pairwise(cuts):
            assert start[begin] + length[begin:end].sum() <= max(budget, (start + length)[begin:end].max())


def test_a_cut_copies_as_little_context_as_it_can():
    """Between the two subtrees the prompt alone is copied; filling the first part to the brim would copy 10 more."""
    tree = Tree([0] * 2)
    trajectories: list[list[Node]] = []
    for _ in range(2):
        steps = chain(tree.root, [([1] * 10, -1.0), ([2] * 3, -1.0)], 1.0)
        trajectories += [steps, *(chain(steps[0], [([3] * 3, -1.0)], 0.0) for _ in range(2))]
    result = advantage(tree.export(), estimate(tree, trajectories), AdvantageConfig())
    sizes = [len(batch) for batch in pack([result], LossConfig(), micro_batch_tokens=33, max_tokens=40)]
    assert sizes == [2 + 10 + 3 * 2] * 2


def test_whole_trees_share_micro_batches_first_fit_decreasing():
    advantages = []
    for length in (5, 3, 7, 2, 4):
        tree = Tree([0])
        trajectories = [chain(tree.root, [([1] * length, -1.0)], reward) for reward in (0.0, 1.0)]
        advantages.append(advantage(tree.export(), estimate(tree, trajectories), AdvantageConfig()))
    batches = pack(advantages, LossConfig(), micro_batch_tokens=16, max_tokens=40)
    # tokens needed: 1 + 2*(length - 1) = 9 5 13 3 7; decreasing 13 9 7 5 3 -> {13, 3} {9, 7} {5}
    assert [sorted(set(batch.edge_tree.tolist())) for batch in batches] == [[2, 3], [0, 4], [1]]
    assert [len(batch) for batch in batches] == [16, 16, 5]


def test_a_tree_costs_the_same_to_plan_among_few_and_many():
    def each(count: int) -> float:
        sizes = [Random(i).randrange(60, 120) for i in range(count)]
        bins: list[list[int]] = []
        spent = work(lambda: bins.extend(_first_fit(sizes, 100)))
        assert sorted(i for items in bins for i in items) == list(range(count)) and len(bins) > count / 2
        return spent / count

    assert each(512) < 1.2 * each(128)


def test_groups_of_equal_rewards_count_nowhere():
    tree = Tree([0])
    trajectories = [chain(tree.root, [([1] * 30, -1.0)], 1.0) for _ in range(2)]
    uniform = advantage(tree.export(), estimate(tree, trajectories), AdvantageConfig())
    mixed = shared_step()
    for aggregation in ("token", "sequence", "dr_grpo"):
        config = LossConfig(aggregation=aggregation)
        (alone,) = pack([mixed], config, micro_batch_tokens=99, max_tokens=40)
        (beside,) = pack([uniform, mixed], config, micro_batch_tokens=99, max_tokens=40)
        assert torch.equal(alone.weight, beside.weight) and torch.equal(alone.tokens, beside.tokens)
        assert set(beside.edge_tree.tolist()) == {1}
    assert pack([uniform], LossConfig(), micro_batch_tokens=99, max_tokens=40) == []
