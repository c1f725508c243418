"""EPTree, the entropy-guided tree search of TreeRL (arXiv 2506.11902): branch where the policy was least sure.

M chains from the prompt, then L rounds. In a round the N tokens of the whole tree with the largest surprisal, -log p of
the token sampled, are picked, and T new continuations begin just before each. Not picked are the first token of a
branch (siblings exist there already) and tokens from `deepest` on, where a continuation would run out of room. A tree
that never runs short of tokens to pick has M + L*N*T leaves.

python examples/eptree.py [--model CHECKPOINT_FOLDER] "7*8-5=?" "3+9*4=?"
"""

import argparse
from collections import defaultdict

import torch

from ibtpo.policy import built_in_policy, load_policy
from ibtpo_engine import Engine, Growth, Node, Sampling, Search, Tree


def most_surprising(tree: Tree, count: int, deepest: int) -> dict[Node, list[int]]:
    """The `count` tokens with the largest -log p: offsets (> 0) in each node, increasing."""
    tokens = [
        (float(-node.logprob[at]), node, at)
        for node in tree.nodes()
        if node.start >= tree.prompt_len
        for at in range(1, min(len(node), tree.prompt_len + deepest - node.start))
    ]
    picked = defaultdict(list)
    for _, node, at in sorted(tokens, key=lambda token: -token[0])[:count]:
        picked[node].append(at)
    return {node: sorted(offsets) for node, offsets in picked.items()}


def eptree(m: int = 6, n: int = 2, rounds: int = 1, t: int = 2, *, deepest: int) -> Search:
    """EPTree(M, N, L, T).

    Args:
        m: chains from the prompt.
        n: tokens picked a round.
        rounds: L.
        t: continuations begun before a picked token.
        deepest: tokens this far below the prompt, or farther, are not picked.
    """

    def search(tree: Tree) -> Growth:
        yield tree.root.fork(m)
        for _ in range(rounds):
            branches = []
            for node, offsets in most_surprising(tree, n, deepest).items():
                for at in reversed(offsets):  # a cut leaves what lies before it to the new upper half
                    node = node.split(at)
                    branches += node.fork(t)
            if branches:
                yield branches

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; by default the built-in policy, untrained")
    parser.add_argument("problems", nargs="+")
    args = parser.parse_args()
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    policy = load_policy(args.model, **options) if args.model else built_in_policy(0, **options)
    sampling = Sampling(max_tokens=48, stop_tokens=policy.stops)
    prompts = [policy.tokenizer.encode(problem + "\n") for problem in args.problems]
    for i, tree in Engine(policy.model).run(eptree(rounds=2, deepest=40), prompts, sampling):
        paths = sum(leaf.end - tree.prompt_len for leaf in tree.leaves())
        print(f"{args.problems[i]} {len(tree.leaves())} trajectories, {paths} tokens long, {tree.num_sampled} sampled")


if __name__ == "__main__":
    main()
