"""Trees built by hand, a tiny float64 model, and the unpacked objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

from ibtpo.advantage import NodeAdvantage
from ibtpo.config import IBConfig, LossConfig
from ibtpo.ib import IBEstimates
from ibtpo_engine.tree import Node, Tree

VOCABULARY = 13


def fill(
    node: Node, tokens: Sequence[int], logprob: Sequence[float] | float = -0.5, reward: float | None = None
) -> Node:
    """Give a pending node its tokens; it ends a trajectory if it has a reward."""
    logprobs = [logprob] * len(tokens) if isinstance(logprob, float | int) else logprob
    zeros = np.zeros(len(tokens))
    node.fill(
        np.array(tokens), np.array(logprobs), np.array(logprobs), zeros, finish=None if reward is None else "stop"
    )
    node.reward = reward
    return node


def chain(start: Node, steps: Sequence[tuple[Sequence[int], Sequence[float] | float]], reward: float) -> list[Node]:
    """A trajectory below `start`, one node a step, given as (tokens, log-probs); returns its nodes."""
    nodes = []
    for i, (tokens, logprob) in enumerate(steps):
        start = fill(start.fork()[0], tokens, logprob, reward if i == len(steps) - 1 else None)
        nodes.append(start)
    return nodes


def random_trajectories(
    rng: Random,
    *,
    leaves: int,
    max_steps: int = 4,
    max_length: int = 4,
    vocabulary: int = VOCABULARY,
    binary: bool = True,
) -> tuple[Tree, list[list[Node]]]:
    """A tree grown by branching at random nodes, and each trajectory's new nodes in the order they came."""
    tree = Tree([rng.randrange(vocabulary) for _ in range(rng.randint(1, 5))], key=rng.randrange(1000))
    trajectories: list[list[Node]] = []
    for _ in range(leaves):
        inner = [node for node in tree.nodes() if not node.is_leaf]
        steps = []
        for _ in range(rng.randint(1, max_steps)):
            length = rng.randint(1, max_length)
            tokens = [rng.randrange(vocabulary) for _ in range(length)]
            steps.append((tokens, [-rng.random() * 3 for _ in range(length)]))
        reward = float(rng.randrange(2)) if binary else rng.random()
        trajectories.append(chain(rng.choice(inner), steps, reward))
    return tree, trajectories


def estimate(tree: Tree, trajectories: Sequence[Sequence[Node]], config: IBConfig | None = None) -> IBEstimates:
    """IB estimates after adding the trajectories one by one."""
    estimates = IBEstimates(tree, config or IBConfig())
    for steps in trajectories:
        estimates.add_leaf(steps)
    return estimates


class TinyModel(nn.Module):
    """Two layers of causal attention with learned positions, its mask built densely from pos and end."""

    def __init__(self, seed: int = 0, *, width: int = 8, layers: int = 2, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1]))

        self.embedding = weight(vocabulary, width)
        self.positions = weight(64, width)
        self.projections = nn.ParameterList([weight(4, width, width) for _ in range(layers)])
        self.head = weight(vocabulary, width)

    def packed(self, tokens: Tensor, pos: Tensor, end: Tensor) -> Tensor:
        """Hidden states [N, H]."""
        key = torch.arange(len(tokens))
        visible = (key[None, :] <= key[:, None]) & (key[:, None] < end[None, :])
        x = self.embedding[tokens] + self.positions[pos]
        for q, k, v, out in (projection.unbind() for projection in self.projections):
            scores = (x @ q) @ (x @ k).T / math.sqrt(x.shape[-1])
            attention = scores.masked_fill(~visible, -math.inf).softmax(-1)
            x = x + torch.tanh(attention @ (x @ v) @ out)
        return x


def log_probs(model: nn.Module, tokens: Tensor, pos: Tensor, end: Tensor) -> Tensor:
    """Log-probs [N, V] after every token, by a plain softmax."""
    return (model.packed(tokens, pos, end.to(torch.int32)) @ model.head.T).log_softmax(-1)


def unpacked_loss(
    model: nn.Module,
    advantages: Sequence[NodeAdvantage],
    config: LossConfig,
    max_tokens: int,
    reference: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The objective as it is defined: trajectory by trajectory, token by token, nothing shared."""
    kept = [tree for tree in advantages if not tree.skipped]
    num_trajectories = sum(len(tree.lengths) for tree in kept)
    terms, weights = [], []
    for tree in kept:
        nodes = tree.packed.nodes
        leaves = [node for node in nodes if node.is_leaf]
        for i, leaf in enumerate(leaves):
            path = leaf.path()
            tokens = torch.from_numpy(leaf.prefix().astype(np.int64))
            n = len(tokens)
            length = n - len(path[0])
            inputs = (tokens, torch.arange(n), torch.full((n,), n))
            logp = log_probs(model, *inputs)
            ref = None if reference is None else reference(*inputs)
            old = np.concatenate([node.logprob for node in path]).astype(np.float64)
            for node in path[1:]:
                shared = sum(leaf in node.leaves() for leaf in leaves)
                weight = {"trajectory": 1.0, "sqrt": shared**-0.5, "node": 1 / shared}[config.prefix_weight]
                if config.aggregation == "sequence":
                    weight /= num_trajectories * length
                elif config.aggregation == "dr_grpo":
                    weight /= num_trajectories * max_tokens
                a = float(tree.a[nodes.index(node)] if tree.a_trajectory is None else tree.a_trajectory[i])
                for t in range(node.start, node.end):
                    lp = logp[t - 1, tokens[t]]
                    r = torch.exp(lp - float(old[t]))
                    term = -torch.minimum(r * a, r.clamp(1 - config.clip_low, 1 + config.clip_high) * a)
                    entropy = -(logp[t - 1].exp() * logp[t - 1]).sum()
                    term = term - (config.entropy_coef + config.entropy_advantage_coef * a) * entropy
                    if ref is not None:
                        x = ref[t - 1, tokens[t]] - lp
                        term = term + config.kl_coef * (torch.exp(x) - x - 1)
                    terms.append(weight * term)
                    weights.append(weight)
    total = torch.stack(terms).sum()
    return total / sum(weights) if config.aggregation == "token" else total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
