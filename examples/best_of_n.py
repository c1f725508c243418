"""Best-of-n at every step, by a process reward: sample n candidates for the next step and continue from the best.

A step ends when a newline is sampled, so the process reward sees whole steps; the engine calls it as they finish, and
it may return a future. The keys and values of rejected candidates are freed at once.

python examples/best_of_n.py [--model CHECKPOINT_FOLDER] [--n 8] "7*8-5=?" "3+9*4=?"
"""

import argparse
import re

import torch

from ibtpo.policy import built_in_policy, load_policy
from ibtpo.tasks.digit_chain import result
from ibtpo_engine import Engine, Growth, Node, Sampling, Search, Tree


def best_of_n(n: int, ends: tuple[int, ...], max_tokens: int) -> Search:
    """A search that appends the best of `n` steps until one ends with a token of `ends` or the path is full."""

    def search(tree: Tree) -> Growth:
        step = tree.root
        while True:
            candidates = yield step.fork(n)
            step = max(candidates, key=lambda node: (node.reward, node.logprob_raw.mean()))
            for node in candidates:
                if node is not step:
                    node.drop()
            if int(step.tokens[-1]) in ends or step.end >= tree.prompt_len + max_tokens:
                return

    return search


def step_reward(step: str) -> float:
    """1 for a correct line, 0.5 for one of the right form, 0 for any other."""
    line = re.fullmatch(r"(\d)([-+*])(\d)=(\d)\n", step)
    if line is None:
        return 0.5 * bool(re.fullmatch(r"\d\.", step))
    a, operation, b, c = line.groups()
    return 1.0 if result((int(a), operation, int(b))) == int(c) else 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; by default the built-in policy, untrained")
    parser.add_argument("--n", type=int, default=8, help="candidates a step")
    parser.add_argument("problems", nargs="+")
    args = parser.parse_args()
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    policy = load_policy(args.model, **options) if args.model else built_in_policy(0, **options)
    [newline] = policy.tokenizer.encode("\n")

    def reward(tree: Tree, step: Node) -> float:
        return step_reward(policy.tokenizer.decode(step.tokens))

    sampling = Sampling(max_tokens=48, stop_tokens=(newline, *policy.stops))
    prompts = [policy.tokenizer.encode(problem + "\n") for problem in args.problems]
    search = best_of_n(args.n, policy.stops, sampling.max_tokens)
    for i, tree in Engine(policy.model).run(search, prompts, sampling, reward=reward):
        [leaf] = tree.leaves()
        rewards = [node.reward for node in leaf.path()[1:]]
        print(f"{args.problems[i]} {len(rewards)} steps, mean process reward {sum(rewards) / len(rewards):.2f}")
        print(policy.tokenizer.decode(leaf.prefix()[tree.prompt_len :]))


if __name__ == "__main__":
    main()
