"""Growing one tree and printing it as an outline: steps with value, IB-Score, confidence and round."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree as Outline

from ibtpo.config import TrainConfig
from ibtpo.grow import Grower
from ibtpo.metrics import RIGHT
from ibtpo.policy import Policy
from ibtpo.printable import printable
from ibtpo.rewards import RewardSpec, parse_rewards
from ibtpo.search import make_search
from ibtpo.setup import make_engine, make_sampling, open_model
from ibtpo.steps import step_splitter
from ibtpo.tasks import DigitChain, Grades, Problem, RewardGrades, Task
from ibtpo.tasks.digit_chain import parse_prompt
from ibtpo_engine import Node, Tree


def print_tree(config: TrainConfig, console: Console, *, prompt: str | None, answer: str | None, index: int) -> None:
    """Grow a tree on a prompt, or on the task's training problem number `index`, and print it.

    Args:
        prompt: "\\n" stands for a newline.
        answer: the reference, needed for a prompt unless the task is digit-chain.
    """
    _, policy, task = open_model(config, console)
    with closing(task):
        problem, grades = _problem(config, task, prompt, answer, index)
        with closing(grades):
            grower = Grower(make_engine(config, policy), grades, policy.tokenizer, config.jsonl)
            splitter = step_splitter(policy.tokenizer, config.search)
            search = make_search(config.search, config.ib, splitter, config.sampling.max_tokens)
            [tree], _ = grower.grow([problem], [index], search, make_sampling(config, policy))
    console.print(_outline(tree, policy, problem))
    leaves = tree.leaves()
    console.print(
        f"trajectories: {len(leaves)}, {outcome([leaf.reward or 0.0 for leaf in leaves])}; tokens: {tree.num_sampled} "
        f"sampled, {sum(leaf.end - tree.prompt_len for leaf in leaves)} in the trajectories"
    )


def outcome(rewards: Sequence[float]) -> str:
    """How many are right and, if some rewards lie between 0 and 1, the mean reward."""
    partly = any(0 < reward < 1 for reward in rewards)
    mean = f" (mean reward {sum(rewards) / len(rewards):.3g})" if partly else ""
    return f"{sum(reward > RIGHT for reward in rewards)} right{mean}"


def _problem(
    config: TrainConfig, task: Task, prompt: str | None, answer: str | None, index: int
) -> tuple[Problem, Grades]:
    """The problem to sample for, and its grader."""
    if prompt is None:
        return task.train_problem(index), task
    prompt = prompt.replace("\\n", "\n")
    if answer is not None:
        return Problem(prompt, answer), _grades_of(config)
    if task.name == DigitChain.name:
        return parse_prompt(prompt if prompt.endswith("\n") else prompt + "\n"), task
    raise ValueError("prompt: without the right answer there is no reward; give it with --answer")


def _grades_of(config: TrainConfig) -> RewardGrades:
    """The grader of a prompt that is not from the task."""
    return RewardGrades(parse_rewards(config.reward) or (RewardSpec(config.jsonl.grade),), config.jsonl)


def _outline(tree: Tree, policy: Policy, problem: Problem) -> Outline:
    """The tree as indented text: a line a step, indented further at every fork."""
    estimates = tree.notes["ib"]
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    outline = Outline(f"[bold]{escape(printable(prompt.strip()))}[/]  value {estimates.value(tree.root):.2f}")

    def line(node: Node) -> str:
        text = escape(repr(str(policy.tokenizer.decode(node.tokens.tolist())))[1:-1])
        notes = f"round {node.notes['round']}  pi {estimates.eta2(node):.2f}  value {estimates.value(node):.2f}"
        if node.children:
            notes += f"  J {estimates.score(node):+.2f}"
        mark = "" if node.reward is None else "  [green]right[/]" if node.reward > RIGHT else "  [red]wrong[/]"
        return f"{text}  [dim]{notes}[/]{mark}"

    below = [(child, outline) for child in reversed(tree.root.children)]
    while below:
        node, place = below.pop()
        lines = [line(node)]
        while len(node.children) == 1:  # an unbranched chain of steps is not indented further
            [node] = node.children
            lines.append(line(node))
        place = place.add("\n".join(lines))
        below += [(child, place) for child in reversed(node.children)]
    return outline
