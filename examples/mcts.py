"""Monte Carlo tree search over reasoning steps: UCT walks down, a trajectory is sampled from there, its reward goes up.

python examples/mcts.py [--model CHECKPOINT_FOLDER] "7*8-5=?" "3+9*4=?"
"""

import argparse
import math

import torch

from ibtpo.policy import built_in_policy, load_policy
from ibtpo.steps import StepSplitter, split_steps
from ibtpo.tasks.digit_chain import parse_prompt, right_solution
from ibtpo_engine import Engine, Growth, Node, Sampling, Search, Tree


def uct(node: Node, weight: float = 1.4) -> float:
    """Mean reward below a step, plus a bonus for having been tried little."""
    visits, above = node.notes["visits"], node.parent.notes["visits"]
    return node.notes["total"] / visits + weight * math.sqrt(math.log(above) / visits)


def mcts(splitter: StepSplitter, *, simulations: int = 32, width: int = 3) -> Search:
    """`simulations` rounds; below a step, `width` continuations are tried before UCT chooses among them."""

    def search(tree: Tree) -> Growth:
        for _ in range(simulations):
            node = tree.root
            while len(node.children) >= width:
                node = max(node.children, key=uct)
            if node.finish is None:  # otherwise UCT came to the end of a trajectory, and it counts once more
                [node] = yield node.fork()
                split_steps(node, splitter)
            for step in node.path():
                step.notes["visits"] = step.notes.get("visits", 0) + 1
                step.notes["total"] = step.notes.get("total", 0.0) + node.reward

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; by default the built-in policy, untrained")
    parser.add_argument("problems", nargs="+")
    args = parser.parse_args()
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    policy = load_policy(args.model, **options) if args.model else built_in_policy(0, **options)

    def reward(tree: Tree, leaf: Node) -> float:  # share of the characters that agree with the right derivation
        text = policy.tokenizer.decode(leaf.prefix())
        prompt, answer = text[: tree.prompt_len], text[tree.prompt_len :]  # a token is a character
        right = right_solution(parse_prompt(prompt))
        return sum(map(str.__eq__, answer, right)) / len(right)

    prompts = [policy.tokenizer.encode(problem + "\n") for problem in args.problems]
    sampling, search = Sampling(max_tokens=48, stop_tokens=policy.stops), mcts(StepSplitter(policy.tokenizer, "\n"))
    for i, tree in Engine(policy.model).run(search, prompts, sampling, reward=reward):
        best = max(tree.leaves(), key=lambda leaf: leaf.reward)
        print(f"{args.problems[i]} {len(tree.leaves())} trajectories, best reward {best.reward:.2f}")


if __name__ == "__main__":
    main()
