"""EPTree, the entropy-guided tree search of TreeRL (arXiv 2506.11902): branch where the policy was least sure.

M chains from the prompt, then L rounds. A round picks the N tokens below each chain with the largest surprisal, -log p
of the token sampled, and starts T new continuations just before each: M*(1 + L*N*T) leaves, unless tokens to pick run
short. This is the search of `ibtpo train --preset treerl`; without rewards only its growth is needed.

python examples/eptree.py [--model CHECKPOINT_FOLDER] "7*8-5=?" "3+9*4=?"
"""

import argparse

import torch

from ibtpo.policy import built_in_policy, load_policy
from ibtpo.searches.eptree import eptree_leaves
from ibtpo_engine import Engine, Growth, Sampling, Search, Tree


def eptree(m: int = 2, n: int = 2, rounds: int = 1, t: int = 2, *, deepest: int) -> Search:
    """EPTree(M, N, L, T); tokens `deepest` or farther below the prompt are not picked."""

    def search(tree: Tree) -> Growth:
        yield from eptree_leaves(tree, m=m, n=n, rounds=rounds, t=t, deepest=deepest)

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
