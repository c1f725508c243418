"""Every metric of a run: its name, unit and meaning in one list, and how those of trees and evaluations are computed.

The run log refuses a name that is not in `METRICS`; docs/metrics.md is generated from it (``python -m ibtpo.metrics``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ibtpo_engine import Node, Tree

Doubles = npt.NDArray[np.float64]

RIGHT = 0.5  # a trajectory with a reward above this counts as right where something must be right or wrong
_TAIL = 0.025  # on either side of a 95 % interval
_MOST_DRAWN = 1_000_000  # numbers of a bootstrap in memory at once
_DEPTH_BINS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))


@dataclass(frozen=True)
class Metric:
    """One name in the log."""

    name: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """Metrics that belong together."""

    title: str
    metrics: tuple[Metric, ...]


def _depth_name(low: int, high: int | None) -> str:
    return f"branch_depth_{low}" + ("_up" if high is None else f"_{high}" if high > low else "")


def _depth_metric(low: int, high: int | None) -> Metric:
    where = f"{low} or more" if high is None else str(low) if high == low else f"{low} to {high}"
    return Metric(_depth_name(low, high), "share", f"These branches, begun {where} steps below the prompt.")


GROUPS: tuple[Group, ...] = (
    Group(
        "Rewards of the sampled trees",
        (
            Metric("reward", "0 to 1", "Mean reward of all trajectories. In guided trees this is not accuracy."),
            Metric("avg_rate", "0 to 1", "Avg-Rate: mean reward of a prompt's leaves, over prompts; biased if guided."),
            Metric("avg_rate_iid", "0 to 1", "The same over the independent first trajectories of trees: unbiased."),
            Metric("eff_rate", "share", "Eff-Rate: prompts whose trajectories do not all have the same reward."),
        ),
    ),
    Group(
        "Trees",
        (
            Metric("ib_score", "", "IB-Score J(s), mean over nodes with at least two children."),
            Metric("cov_eta1_eta2", "", "Covariance of eta1 (gain) and eta2 (confidence), mean over the same nodes."),
            Metric("confidence", "probability", "eta2 = pi(s), mean over all steps."),
            Metric("sampler_entropy", "nats", "Next-token entropy at temperature 1, mean over sampled tokens."),
            Metric("response_length", "tokens", "Sampled tokens per trajectory, mean."),
            Metric("response_steps", "steps", "Steps per trajectory, mean; 1 if the search does not cut steps."),
            Metric("truncated_share", "share", "Trajectories ended by a limit, budget or abort, not by a stop token."),
            Metric("branch_depth", "steps", "Depth where the branches of later rounds begin, mean; 0 is the prompt."),
            *(_depth_metric(low, high) for low, high in _DEPTH_BINS),
        ),
    ),
    Group(
        "Amounts",
        (
            Metric("prompts", "count", "Prompts; each has one tree."),
            Metric("trajectories", "count", "Trajectories; each is a leaf of its tree."),
            Metric("trajectory_tokens", "tokens", "Sum of the trajectories' lengths; shared tokens count in each."),
            Metric("tokens_sampled", "tokens", "Tokens sampled, each counted once, trained on or not."),
            Metric("tokens_computed", "tokens", "Tokens computed for sampling: prefilled, decoded, recomputed."),
            Metric("tokens_trained", "tokens", "Tokens computed for training, prompts and repeated prefixes included."),
            Metric("sampling_efficiency", "ratio", "trajectory_tokens / tokens_computed."),
            Metric("training_efficiency", "ratio", "Tokens of the trained trajectories / tokens_trained."),
            Metric("reward_timeouts", "count", "Training gradings so far where a reward timed out (it counts as 0)."),
            Metric("reward_failures", "count", "Training gradings so far where a reward failed (it counts as 0)."),
        ),
    ),
    Group(
        "Loss and optimizer",
        (
            Metric("loss", "", "The minimised objective of an optimizer step, mean over the optimizer steps."),
            Metric("weight", "", "Sum of the token weights in the loss; 1 for a token mean."),
            Metric("clip_fraction", "share", "Token weight whose gradient the clipping removed (clip share)."),
            Metric("entropy", "nats", "Entropy of the policy at the sampling temperature, mean over token weights."),
            Metric("entropy_advantage", "nats", "Entropy times advantage, mean over token weights; for IBRO only."),
            Metric("kl_old_k1", "nats", "KL(policy that sampled | policy), k1 estimate, mean over token weights."),
            Metric("kl_old_k3", "nats", "KL(policy that sampled | policy), k3 estimate, mean over token weights."),
            Metric("kl_ref_k1", "nats", "KL(policy | frozen reference), k1 estimate; only if it is penalised."),
            Metric("kl_ref_k3", "nats", "KL(policy | frozen reference), k3 estimate; only if it is penalised."),
            Metric("logprob_gap", "nats", "|sampler's - trainer's log-prob| before any update, mean over weights."),
            Metric("logprob_gap_max", "nats", "The largest such gap."),
            Metric("grad_norm", "", "L2 norm of the gradient before clipping, mean over optimizer steps."),
            Metric("lr", "", "Learning rate of the last optimizer step, or of the next one if none was taken."),
            Metric("optimizer_steps", "count", "Optimizer steps taken."),
            Metric("optimizer_steps_skipped", "count", "Optimizer steps skipped: NaN or Inf in loss or gradient."),
            Metric(
                "groups_skipped",
                "count",
                "Trees left out of the loss: all rewards (vineppo: values) are equal. A step that leaves out all has "
                "no loss, weight, clip_fraction, entropy, kl_*, logprob_gap or grad_norm.",
            ),
        ),
    ),
    Group(
        "Time",
        (
            Metric("sampling_seconds", "s", "Wall-clock time of sampling, without waiting for rewards."),
            Metric("reward_seconds", "s", "Wall-clock time of grading or waiting for it."),
            Metric("training_seconds", "s", "Wall-clock time of packing, forward, backward and update."),
            Metric("evaluation_seconds", "s", "Wall-clock time of an evaluation."),
            Metric("step_seconds", "s", "Wall-clock time of the whole training step."),
            Metric("tokens_per_second", "tokens/s", "tokens_sampled / sampling_seconds."),
            Metric("peak_memory", "bytes", "Peak memory so far: allocated on the GPU; on a CPU, of the process."),
            Metric("memory_planned", "bytes", "Peak memory that the plan predicted before the first step."),
        ),
    ),
    Group(
        "Evaluation: independent rollouts on held-out prompts",
        (
            Metric("eval_avg", "0 to 1", "avg@k: mean reward of k independent samples, mean over prompts; accuracy."),
            Metric("eval_avg_low", "0 to 1", "Lower end of its 95 % interval over prompts."),
            Metric("eval_avg_high", "0 to 1", "Upper end."),
            Metric("eval_pass", "0 to 1", "Unbiased pass@k, 1 - C(n-c, k)/C(n, k), for c of n rewards above .5."),
            Metric("eval_pass_low", "0 to 1", "Lower end of its 95 % interval over prompts."),
            Metric("eval_pass_high", "0 to 1", "Upper end."),
            Metric("eval_maj", "0 to 1", "maj@k: mean reward of the most frequent answer among the k samples."),
            Metric("eval_maj_low", "0 to 1", "Lower end of its 95 % interval over prompts."),
            Metric("eval_maj_high", "0 to 1", "Upper end."),
            Metric("eval_greedy", "0 to 1", "Mean reward of the greedy completion."),
            Metric("eval_greedy_low", "0 to 1", "Lower end of its 95 % interval over prompts."),
            Metric("eval_greedy_high", "0 to 1", "Upper end."),
            Metric("eval_prompts", "count", "Held-out prompts evaluated."),
            Metric("eval_samples", "count", "Samples per prompt, k."),
            Metric("eval_response_length", "tokens", "Length of the sampled completions, mean."),
            Metric("eval_truncated_share", "share", "Sampled completions not ended by a stop token."),
            Metric("eval_reward_timeouts", "count", "Evaluation gradings where a reward timed out (it counts as 0)."),
            Metric("eval_reward_failures", "count", "Evaluation gradings where a reward failed (it counts as 0)."),
        ),
    ),
    Group(
        "Warm start",
        (
            Metric("warm_start_updates", "count", "Updates of the warm start, the decay included."),
            Metric("warm_start_loss", "nats", "Cross-entropy on the worked solutions, mean over their tokens."),
            Metric("warm_start_excess", "nats", "Loss minus the teacher's on the same solutions; last 10 updates."),
            Metric("warm_start_seconds", "s", "Wall-clock time of the warm start."),
        ),
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for group in GROUPS for metric in group.metrics}
"""Every metric by name."""


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError unless every name is in `METRICS`."""
    if unknown := sorted(set(names) - METRICS.keys()):
        raise ValueError(f"unknown metrics {', '.join(unknown)}; describe them in ibtpo/metrics.py first")


def documentation() -> str:
    """The text of docs/metrics.md."""
    lines = ["# Metrics", "", "Generated from `ibtpo/metrics.py` by `python -m ibtpo.metrics > docs/metrics.md`.", ""]
    lines += ["Unless stated otherwise, a value belongs to one training step, and averages are over that step.", ""]
    for group in GROUPS:
        lines += [f"## {group.title}", "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning.replace('|', chr(92) + '|')} |" for m in group.metrics]
        lines.append("")
    return "\n".join(lines).rstrip()


def tree_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """The metrics of finished, graded trees.

    What cannot be known is left out: the IB estimates where no search left ``tree.notes["ib"]``, the mean branch depth
    where nothing branched.

    Raises:
        ValueError: there are no trees, or a leaf has no reward.
    """
    if not trees:
        raise ValueError("tree_metrics: no trees")
    groups = [_rewards(tree.leaves()) for tree in trees]
    leaves = [(leaf, tree.prompt_len) for tree in trees for leaf in tree.leaves()]
    lengths = [leaf.end - prompt_len for leaf, prompt_len in leaves]
    iid = [_rewards(tree.notes["iid_leaves"]) for tree in trees if tree.notes.get("iid_leaves")]
    values = {
        "prompts": float(len(trees)),
        "trajectories": float(len(leaves)),
        "trajectory_tokens": float(sum(lengths)),
        "tokens_sampled": float(sum(map(num_sampled, trees))),
        "reward": _mean(reward for group in groups for reward in group),
        "avg_rate": _mean(_mean(group) for group in groups if group),
        "avg_rate_iid": _mean(map(_mean, iid)),
        "eff_rate": _mean(float(len(set(group)) > 1) for group in groups),
        "sampler_entropy": _mean(h for tree in trees for node in _sampled(tree) for h in node.entropy.tolist()),
        "response_length": _mean(map(float, lengths)),
        "response_steps": _mean(
            float(sum(node.start >= prompt_len for node in leaf.path())) for leaf, prompt_len in leaves
        ),
        "truncated_share": _mean(float(is_truncated(leaf)) for leaf, _ in leaves),
    }
    values |= _estimate_metrics(trees) | _depth_metrics(trees)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def num_sampled(tree: Tree) -> int:
    """Tokens sampled for this tree: its own, and those of rollouts that have left it."""
    return tree.num_sampled + int(tree.notes.get("auxiliary_tokens", 0))


def is_mixed(tree: Tree) -> bool:
    """Do the rewards of this graded tree differ?"""
    return len(set(_rewards(tree.leaves()))) > 1


def is_truncated(leaf: Node) -> bool:
    """Did something other than a stop token end the trajectory: the length limit, a budget, an abort?"""
    return leaf.finish != "stop"


def _rewards(leaves: Iterable[Node]) -> list[float]:
    rewards = []
    for leaf in leaves:
        if leaf.reward is None:
            raise ValueError(f"tree_metrics: {leaf!r} has no reward yet")
        rewards.append(leaf.reward)
    return rewards


def _sampled(tree: Tree) -> list[Node]:
    return [node for node in tree.nodes() if node.start >= tree.prompt_len]


def _estimate_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    estimated = [tree for tree in trees if "ib" in tree.notes]
    branched = [(tree.notes["ib"], node) for tree in estimated for node in tree.nodes() if len(node.children) > 1]
    return {
        "ib_score": _mean(ib.score(node) for ib, node in branched),
        "cov_eta1_eta2": _mean(ib.covariance(node) for ib, node in branched),
        "confidence": _mean(tree.notes["ib"].eta2(node) for tree in estimated for node in _sampled(tree)),
    }


def _depth_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    depths = [len(node.path()) - 1 for tree in trees for _, node, _ in tree.notes.get("branched", ())]
    shares = {
        _depth_name(low, high): _mean(float(low <= depth <= (math.inf if high is None else high)) for depth in depths)
        for low, high in _DEPTH_BINS
    }
    return {"branch_depth": _mean(map(float, depths))} | shares


def _mean(values: Iterable[float]) -> float:
    """The mean, or NaN of nothing."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan


def avg_at_k(rewards: npt.ArrayLike) -> Doubles:
    """[P, k] rewards of k samples a prompt -> [P], each prompt's mean; their mean is avg@k."""
    means: Doubles = np.asarray(rewards, np.float64).mean(axis=1)
    return means


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k)/C(n, k) (Chen et al., 2021).

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass_at_k: n={num_samples}, c={num_right}, k={k} need 1 <= k <= n and 0 <= c <= n")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_rates(rewards: npt.ArrayLike, k: int) -> list[float]:
    """[P, n] rewards -> each prompt's unbiased pass@k."""
    array = np.asarray(rewards, np.float64)
    return [pass_at_k(array.shape[1], int((row > RIGHT).sum()), k) for row in array]


def bootstrap_interval(per_prompt: npt.ArrayLike, *, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of [P] values, resampling prompts; NaNs where there are none."""
    values = np.asarray(per_prompt, np.float64)
    if values.size == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    levels, counts = np.unique(values, return_counts=True)  # drawing prompts is drawing how many have which value
    share, rows = counts / values.size, max(_MOST_DRAWN // len(levels), 1)
    sizes = [min(rows, resamples - begin) for begin in range(0, resamples, rows)]
    sums = np.concatenate([rng.multinomial(values.size, share, size=size) @ levels for size in sizes])
    low, high = np.quantile(sums / values.size, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def accuracy_interval(per_prompt: npt.ArrayLike) -> tuple[float, float]:
    """As `bootstrap_interval`, of [P] values in [0, 1]; also where all are equal, and no resampling differs.

    There, as many prompts may be unlike those seen as leave a chance of 2.5 % to draw none of them, and their values
    may be anything: for 0 or 1 this is the interval of Clopper and Pearson for none, or all, of P.
    """
    values = np.asarray(per_prompt, np.float64)
    if values.size == 0 or np.ptp(values) > 1e-9:
        return bootstrap_interval(values)
    alike = _TAIL ** (1 / values.size)
    value = min(max(float(values[0]), 0.0), 1.0)
    return value * alike, 1 - (1 - value) * alike


def evaluation_metrics(
    sampled: npt.ArrayLike, greedy: npt.ArrayLike, *, majority: npt.ArrayLike | None = None
) -> dict[str, float]:
    """The accuracies of an evaluation with their intervals, under the names of the log.

    Args:
        sampled: [P, k] rewards of k independent samples a prompt.
        greedy: [P] rewards of the greedy completions.
        majority: [P] maj@k of the prompts, if their answers are known.
    """
    rewards = np.asarray(sampled, np.float64)
    num_prompts, k = rewards.shape
    accuracies: dict[str, npt.ArrayLike] = {"eval_avg": avg_at_k(rewards), "eval_pass": pass_rates(rewards, k)}
    if majority is not None:
        accuracies["eval_maj"] = majority
    accuracies["eval_greedy"] = greedy
    values = {"eval_prompts": float(num_prompts), "eval_samples": float(k)}
    for name, per_prompt in accuracies.items():
        values[name] = float(np.mean(np.asarray(per_prompt, np.float64)))
        values[f"{name}_low"], values[f"{name}_high"] = accuracy_interval(per_prompt)
    return values


if __name__ == "__main__":
    print(documentation())
