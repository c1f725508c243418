"""Independent completions of every problem, passed on as soon as they are graded and their answers extracted."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

from ibtpo.grow import Grower
from ibtpo.metrics import is_truncated
from ibtpo.tasks import Grades, Problem
from ibtpo_engine import Node, Sampling, Search, Tree


class Completion(NamedTuple):
    """One graded completion of a problem."""

    prompt: int
    """Index of the problem."""
    sample: int | None
    """Index of the sample; None is the greedy completion."""
    text: str
    reward: float
    answer: str | None
    """As `Grades.extract` returns it; None if there is none, extraction failed, or the completion is truncated."""
    finish: str
    """What ended it: "stop", "length", ..."""
    tokens: int
    """Sampled tokens."""


def sample_completions(
    grower: Grower,
    problems: Sequence[Problem],
    sampling: Sampling,
    samples: int,
    keep: Callable[[Completion], object],
    *,
    is_done: Callable[[int, int | None], bool] = lambda prompt, sample: False,
    on_prompt: Callable[[Tree], object] = lambda tree: None,
) -> None:
    """Sample `samples` completions of every problem, and its greedy one, except those that are done.

    The same problems get the same random numbers in every evaluation, whatever is done: evaluations are paired.

    Args:
        grower: engine, task, tokenizer.
        sampling: for the independent samples; the greedy pass sets temperature 0.
        keep: called with each completion, in any order.
        is_done: called with a problem's index and a sample's, None for the greedy completion.
        on_prompt: called when a problem's missing samples have ended, and again when its greedy completion has.

    Raises:
        Interrupted: the grower was told to stop.
        GraderError: too many gradings failed.
    """
    greedy = replace(sampling, temperature=0.0)
    passes: tuple[tuple[list[int | None], Sampling], ...] = (([*range(samples)], sampling), ([None], greedy))
    for wanted, how in passes:
        asked = [i for i in range(len(problems)) if not all(is_done(i, sample) for sample in wanted)]
        collector = _Collector(grower.task, problems, wanted, keep)

        def tree_done(tree: Tree, collector: _Collector = collector) -> None:
            collector.hand_on()
            on_prompt(tree)

        try:
            grower.grow(
                map(problems.__getitem__, asked),
                [_key(i) for i in asked],
                _chains(wanted, is_done),
                how,
                tree_done,
                on_leaf=collector,
                keep=False,
            )
        finally:
            collector.hand_on()
        collector.hand_on(wait=True)


def _key(index: int) -> int:
    """The key of a problem's tree, different from those of all training trees."""
    return -1 - index


def _index(key: int) -> int:
    """The index of the problem whose tree has this key."""
    return -1 - key


def _chains(wanted: Sequence[int | None], is_done: Callable[[int, int | None], bool]) -> Search:
    """Independent trajectories, only the missing ones; leaving out others does not change their samples."""

    def search(tree: Tree) -> Generator[list[Node], list[Node], None]:
        nodes = tree.root.fork(len(wanted))
        for node, sample in zip(nodes, wanted, strict=True):
            if is_done(_index(tree.key), sample):
                node.drop()
        yield [node for node in nodes if not node.dropped]

    return search


class _Collector:
    """Turns graded leaves into completions; holds them until their reward and answer are known."""

    def __init__(
        self,
        task: Grades,
        problems: Sequence[Problem],
        wanted: Sequence[int | None],
        keep: Callable[[Completion], object],
    ) -> None:
        self._task, self._problems, self._wanted, self._keep = task, problems, wanted, keep
        self._num_waiting = 0
        self._graded: SimpleQueue[tuple[Completion, Future[float] | None, Future[str | None] | None]] = SimpleQueue()

    def __call__(self, tree: Tree, leaf: Node, text: str, reward: float | Future[float]) -> None:
        index = _index(tree.key)
        answer = None if is_truncated(leaf) else self._task.extract(self._problems[index], text)
        completion = Completion(
            prompt=index,
            sample=self._wanted[leaf.birth[1]],
            text=text,
            reward=0.0 if isinstance(reward, Future) else reward,
            answer=None if isinstance(answer, Future) else answer,
            finish=str(leaf.finish),
            tokens=leaf.end - tree.prompt_len,
        )
        later = (reward if isinstance(reward, Future) else None, answer if isinstance(answer, Future) else None)
        self._num_waiting += 1
        _when_done([future for future in later if future is not None], lambda: self._graded.put((completion, *later)))
        self.hand_on()

    def hand_on(self, *, wait: bool = False) -> None:
        """Pass on the completions that are complete; with `wait`, all of them."""
        while self._num_waiting and (wait or not self._graded.empty()):
            completion, reward, answer = self._graded.get()
            self._num_waiting -= 1
            if reward is not None:
                completion = completion._replace(reward=reward.result())
            if answer is not None:
                completion = completion._replace(answer=answer.result())
            self._keep(completion)


def _when_done(futures: Sequence[Future[Any]], call: Callable[[], object]) -> None:
    """Call `call` once all futures are done, in the thread of the last one; at once if there are none."""
    if futures:
        futures[0].add_done_callback(lambda _: _when_done(futures[1:], call))
    else:
        call()
