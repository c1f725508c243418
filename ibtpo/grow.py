"""Growing graded trees: the engine samples while the task grades."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ibtpo.config import JsonlConfig
from ibtpo.metrics import is_truncated
from ibtpo.stopping import Interrupted
from ibtpo.tasks import Grades, Problem, format_prompt
from ibtpo_engine import Node, Sampling, Search, Tree, TreeEngine

OnLeaf = Callable[[Tree, Node, str, "float | Future[float]"], None]


def ignore_leaf(tree: Tree, leaf: Node, completion: str, reward: float | Future[float]) -> None:
    """Ignore a finished trajectory; the default `on_leaf`."""


def completion_of(tokenizer: PreTrainedTokenizerBase, tree: Tree, leaf: Node) -> str:
    """The text of a trajectory after its prompt."""
    return str(tokenizer.decode(leaf.prefix()[tree.prompt_len :], skip_special_tokens=True))


@dataclass
class Grading:
    """The reward function of a batch of trees; a tree's key identifies its problem.

    Attributes:
        problems: problem by tree key, of the trees that are growing.
        on_leaf: called with tree, leaf, completion and its reward, as completions arrive.
        seconds: time spent in grading in this process.
    """

    task: Grades
    tokenizer: PreTrainedTokenizerBase
    problems: dict[int, Problem]
    on_leaf: OnLeaf = ignore_leaf
    seconds: float = field(default=0.0, init=False)

    def __call__(self, tree: Tree, leaf: Node) -> float | Future[float]:
        begin = time.perf_counter()
        completion = completion_of(self.tokenizer, tree, leaf)
        reward = self.task.grade(self.problems[tree.key], completion, is_truncated(leaf))
        self.on_leaf(tree, leaf, completion, reward)
        self.seconds += time.perf_counter() - begin
        return reward


@dataclass
class Grower:
    """Grows one graded tree a problem.

    Args:
        engine: samples with the current weights of its model or server.
        task, tokenizer, data: grade completions and format prompts.
        should_stop: asked after every trajectory and tree; True abandons the rest.
    """

    engine: TreeEngine
    task: Grades
    tokenizer: PreTrainedTokenizerBase
    data: JsonlConfig
    should_stop: Callable[[], bool] = lambda: False

    def grow(
        self,
        problems: Iterable[Problem],
        keys: Sequence[int],
        search: Search,
        sampling: Sampling,
        on_tree: Callable[[Tree], None] = lambda tree: None,
        *,
        on_leaf: OnLeaf = ignore_leaf,
        keep: bool = True,
    ) -> tuple[list[Tree], float]:
        """Grow a tree on every problem.

        Args:
            problems: a tree is grown for each; taken as there is room.
            keys: a different integer for each; with the engine's seed it decides the samples.
            search, sampling: how trees are grown.
            on_tree: called as trees are done, in any order.
            on_leaf: called with tree, leaf, completion and its reward (or its future) as trajectories end.
            keep: return the trees; otherwise they are not kept in memory.

        Returns:
            the trees in the order of the problems, each leaf with its reward; seconds spent in grading.

        Raises:
            Interrupted: `should_stop` returned True.
        """

        def leaf_done(tree: Tree, leaf: Node, completion: str, reward: float | Future[float]) -> None:
            on_leaf(tree, leaf, completion, reward)
            if self.should_stop():
                raise Interrupted

        grading = Grading(self.task, self.tokenizer, {}, leaf_done)

        def prompts() -> Iterator[list[int]]:
            for key, problem in zip(keys, problems, strict=True):
                grading.problems[key] = problem
                yield format_prompt(self.tokenizer, problem, self.data)

        waited = self.engine.seconds_waiting
        trees: list[Tree | None] = [None] * len(keys)
        for index, tree in self.engine.run(search, prompts(), sampling, reward=grading, keys=keys):
            del grading.problems[keys[index]]
            trees[index] = tree if keep else None
            on_tree(tree)
            if self.should_stop():
                raise Interrupted
        return [tree for tree in trees if tree is not None], grading.seconds + self.engine.seconds_waiting - waited
