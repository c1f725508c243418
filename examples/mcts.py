"""Monte Carlo tree search over reasoning steps: descend by UCT, sample a trajectory, back up its reward.

python examples/mcts.py [--model CHECKPOINT_FOLDER] "7*8-5=?" "3+9*4=?"
"""

import argparse
import math

import torch

from ibtpo.policy import built_in_policy, load_policy
from ibtpo.steps import StepSplitter, split_steps
from ibtpo.tasks.digit_chain import parse_prompt, right_solution
from ibtpo_engine import Engine, Growth, Node, Sampling, Tree


def uct(node: Node, weight: float = 1.4) -> float:
    """Mean reward below a step, plus a bonus for rarely tried steps."""
    rewards, tried = node.notes["rewards"], len(node.parent.notes["rewards"])
    return sum(rewards) / len(rewards) + weight * math.sqrt(math.log(tried) / len(rewards))


def mcts(tree: Tree, splitter: StepSplitter, *, simulations: int = 32, width: int = 3) -> Growth:
    """`simulations` rounds; each step gets `width` continuations before UCT chooses among them."""
    for _ in range(simulations):
        node = tree.root
        while len(node.children) >= width:
            node = max(node.children, key=uct)
        if node.finish is None:  # otherwise UCT reached the end of a trajectory, which is counted once more
            [node] = yield node.fork()
            split_steps(node, splitter)
        for step in node.path():
            step.notes.setdefault("rewards", []).append(node.reward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; by default the built-in policy, untrained")
    parser.add_argument("problems", nargs="+")
    args = parser.parse_args()
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    policy = load_policy(args.model, **options) if args.model else built_in_policy(0, **options)
    sampling, steps = Sampling(max_tokens=48, stop_tokens=policy.stops), StepSplitter(policy.tokenizer, "\n")
    prompts = [policy.tokenizer.encode(problem + "\n") for problem in args.problems]

    def reward(tree: Tree, leaf: Node) -> float:  # share of characters that agree with the correct derivation
        prompt, _, answer = policy.tokenizer.decode(leaf.prefix()).partition("\n")
        right = right_solution(parse_prompt(prompt + "\n"))
        return sum(map(str.__eq__, answer, right)) / len(right)

    for i, tree in Engine(policy.model).run(lambda tree: mcts(tree, steps), prompts, sampling, reward=reward):
        best = max(leaf.reward for leaf in tree.leaves())
        print(f"{args.problems[i]} {len(tree.leaves())} trajectories, best reward {best:.2f}")


if __name__ == "__main__":
    main()
