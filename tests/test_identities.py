"""The identities of the method (docs/method.md): what must hold whatever the data."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import policy_loss
from trees import (
    VOCABULARY,
    TinyModel,
    chain,
    estimate,
    gradients,
    log_probs,
    random_trajectories,
)

from ibtpo.advantage import advantage
from ibtpo.config import AdvantageConfig, IBConfig, LossConfig, SearchConfig
from ibtpo.ib import IBEstimates
from ibtpo.pack import pack
from ibtpo.search import make_search
from ibtpo.studies.table_policy import TablePolicy
from ibtpo_engine.tree import Tree

SIMPLEX = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.0, 1.0)), min_size=2, max_size=6)


@settings(max_examples=100, deadline=None)
@given(SIMPLEX, st.floats(0.1, 20))
def test_1_the_cross_form_of_the_objective_is_affine_in_the_score(choices, beta):
    """(1+beta) H(S) - beta H(S | a*) = 1 + beta E_pi[pi (r - (1 + 1/beta))], Tsallis-2, by brute-force sums."""
    p = np.array([weight for weight, _ in choices])
    p /= p.sum()
    v = np.array([value for _, value in choices]) + 1e-3
    posterior = p * v / (p @ v)  # Bayes: p(s | a*)
    entropy = 1 - (p * p).sum()  # H(S) = 1 - E_p[p]
    cross_entropy = 1 - (posterior * p).sum()  # H(S | a*) = 1 - E_{p(.|a*)}[p]
    ratio = v / (p @ v)
    direct = (1 + beta) * entropy - beta * cross_entropy
    assert direct == pytest.approx(1 + beta * (p * p * (ratio - (1 + 1 / beta))).sum(), abs=1e-10)


def test_1_the_score_is_the_monte_carlo_estimate_of_that_expectation():
    """Children drawn from a table in exact proportion: J/(1+beta) is E_pi[pi (r - (1 + 1/beta))]."""
    p, v = [0.5, 0.25, 0.25], [0.75, 0.25, 0.5]
    tree = Tree([0])
    trajectories = []
    for step, draws in enumerate((2, 1, 1)):  # four draws in the proportions of p
        trajectories += [chain(tree.root, [([1 + step], math.log(p[step]))], v[step]) for _ in range(draws)]
    ib = estimate(tree, trajectories, IBConfig(beta=2.0))
    mean = np.dot(p, v)
    exact = sum(pi * pi * (value / mean - 1.5) for pi, value in zip(p, v, strict=True))
    assert ib.score(tree.root) / 3 == pytest.approx(exact, abs=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.5, 5.0]))
def test_2_score_is_covariance_minus_confidence_over_beta(seed, leaves, beta):
    """With recursive values J = (1+beta)(Cov(eta1, eta2) - mean(eta2)/beta) at every node, values of 0 included."""
    tree, trajectories = random_trajectories(Random(seed), leaves=leaves)
    ib = estimate(tree, trajectories, IBConfig(value="recursive", beta=beta))
    for node, score in ib.branching():
        confidence = np.mean([ib.eta2(child) for child in node.children])
        assert score == pytest.approx((1 + beta) * (ib.covariance(node) - confidence / beta), abs=1e-12)


def plain_grpo(model: TinyModel, trees: list[Tree]) -> torch.Tensor:
    """- sum over trajectories and tokens of A_i log pi / number of tokens, A_i = (R_i - mean)/std."""
    terms, tokens = [], 0
    for tree in trees:
        leaves = tree.leaves()
        rewards = np.array([leaf.reward for leaf in leaves])
        if rewards.std() == 0:
            continue
        for leaf, a in zip(leaves, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
            ids = torch.from_numpy(leaf.prefix().astype(np.int64))
            n = len(ids)
            logp = log_probs(model, ids, torch.arange(n), torch.full((n,), n))
            predicted = torch.arange(tree.prompt_len, n)
            terms.append(-a * logp[predicted - 1, ids[predicted]].sum())
            tokens += len(predicted)
    return torch.stack(terms).sum() / tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["ib-tpo", "grpo"])
def test_3_without_the_local_term_the_first_step_is_plain_grpo(seed, kind):
    """lambda 0, leaf means, trajectory weights, token mean, ratio 1: equal gradients of every parameter, float64."""
    model, rng = TinyModel(seed), Random(seed)
    grown = [random_trajectories(rng, leaves=5) for _ in range(4)]
    config = AdvantageConfig(kind=kind, ib_weight=0.0)
    advantages = [advantage(tree.export(), estimate(tree, steps), config) for tree, steps in grown]
    loss_config = LossConfig(kl_coef=0.0)
    losses = []
    for batch in pack(advantages, loss_config, micro_batch_tokens=40, max_tokens=99, dtype=torch.float64):
        logp = log_probs(model, batch.tokens, batch.pos, batch.end)[batch.rows]
        chosen = logp[batch.edge_row, batch.targets]
        batch.old_logprob.copy_(chosen.detach())  # ratio 1
        losses.append(policy_loss(chosen, torch.zeros(len(batch.rows)), batch, loss_config)[0])
    expected = gradients(model, plain_grpo(model, [tree for tree, _ in grown]))
    for name, gradient in gradients(model, torch.stack(losses).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.sampled_from(["leaf_mean", "recursive"]))
def test_4_a_tree_of_independent_chains_has_the_advantage_of_grpo(rewards, value):
    tree = Tree([0])
    trajectories = [chain(tree.root, [([i % VOCABULARY], -1.0), ([0, 1], -0.5)], r) for i, r in enumerate(rewards)]
    result = advantage(tree.export(), estimate(tree, trajectories, IBConfig(value=value)), AdvantageConfig())
    std = np.std(rewards) + 1e-6
    grpo = np.array(rewards) - np.mean(rewards) if min(rewards) < max(rewards) else np.zeros(len(rewards))
    assert result.a_gl[1:] == pytest.approx(np.repeat(grpo / std, 2), abs=1e-6)
    # local term: the first step against the prompt; below it a chain gains nothing, so -pi/beta
    assert result.a_ib[2::2] == pytest.approx(-math.exp(-0.5) / 5)


def biases(policy: TablePolicy, method: str, trees: int, **search: object) -> dict[str, tuple[float, float]]:
    """(mean error of the prompt's value, its standard error) under each estimator, over many trees of one policy."""
    config = SearchConfig(method=method, group_size=12, **search)
    run = make_search(config, IBConfig(zero_parent="zero"), lambda tokens: range(1, len(tokens)), 100)
    errors: dict[str, list[float]] = {"leaf_mean": [], "recursive": [], "iid": []}
    rng = Random(0)
    for key in range(trees):
        tree = policy.run(run, Tree([7], key=key), rng)
        recursive = IBEstimates(tree, IBConfig(value="recursive"))
        for leaf in sorted(tree.leaves(), key=lambda leaf: leaf.serial):
            recursive.add_leaf([node for node in leaf.path()[1:] if node.notes["round"] == leaf.notes["round"]])
        errors["leaf_mean"].append(tree.notes["ib"].value(tree.root) - policy.value)
        errors["recursive"].append(recursive.value(tree.root) - policy.value)
        errors["iid"].append(np.mean([leaf.reward for leaf in tree.notes["iid_leaves"]]) - policy.value)
    return {name: (float(np.mean(e)), float(np.std(e)) / math.sqrt(trees)) for name, e in errors.items()}


@pytest.mark.parametrize("method", ["independent", "random-tree"])
def test_5_branching_that_ignores_outcomes_leaves_values_unbiased(method):
    for mean, error in biases(TablePolicy(), method, 1500).values():
        assert abs(mean) < 4 * error and error < 0.01


def test_5_guided_branching_biases_the_leaf_mean_upwards_and_the_recursive_mean_less():
    """So reward under a guided tree is not accuracy; the B0 trajectories of round 0 are unbiased."""
    bias = biases(TablePolicy(), "ibtree", 1500)
    assert bias["leaf_mean"][0] > 5 * bias["leaf_mean"][1]
    assert abs(bias["recursive"][0]) < bias["leaf_mean"][0]
    assert abs(bias["iid"][0]) < 4 * bias["iid"][1]
