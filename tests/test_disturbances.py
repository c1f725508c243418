"""What comes in the middle of something else: cuts, aborts, closings, errors and interrupts harm nobody else."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_idle, expected_tokens, prompt_of, tiny_model

from ibtpo_engine import Ahead, Engine, EngineError, Growth, Node, NoTokenAllowed, OutOfPages, Sampling, Tree

MODEL = tiny_model(positions=1024)
VOCABULARY = MODEL.config.vocab_size


def right(nodes: Sequence[Node], sampling: Sampling) -> None:
    """Assert that each token is the one that a forward pass over its path draws."""
    for node in nodes:
        np.testing.assert_array_equal(expected_tokens(MODEL, node, sampling), node.tokens)


# ---- fills ---------------------------------------------------------------------------------------------------


def test_a_node_may_be_cut_while_its_keys_are_computed_again() -> None:
    sampling = Sampling(max_tokens=300)
    engine = Engine(MODEL, kv_tokens=4000, prefill_tokens=32)
    tree, other = engine.tree(prompt_of(3), key=1), engine.tree(prompt_of(3, seed=2), key=2)
    [node] = engine.extend(tree.root.fork(), Sampling(max_tokens=200))
    engine.weights_changed()
    beside, below, late = other.root.fork(), node.fork(), []
    for event in engine.stream([*beside, *below], sampling):
        if event.node is beside[0] and engine.scheduler.fills and not late:
            [fill] = engine.scheduler.fills.values()
            assert fill.computed < 153 < fill.end
            late = node.fork(at=150)
    engine.extend([*late, *node.fork(2)], sampling)
    right([node, *below, *late, *node.children], sampling)
    [score] = engine.score(node, [below[0].tokens[:3]])
    np.testing.assert_allclose(score.logprob, below[0].logprob_raw[:3], atol=1e-4)
    engine.check_integrity()


def test_a_prompt_may_be_cut_while_it_is_computed() -> None:
    engine = Engine(MODEL, kv_tokens=4000, prefill_tokens=16)
    tree, other = engine.tree(prompt_of(200), key=1), engine.tree(prompt_of(3), key=2)
    engine.extend(other.root.fork(), Sampling(max_tokens=1))
    first, late = tree.root.fork(), []
    for event in engine.stream([*other.root.children[0].fork(), *first], Sampling(max_tokens=40)):
        if event.node.tree is other and engine.scheduler.fills and not late:
            late = tree.root.fork(at=100)
    assert late
    engine.extend(late, Sampling(max_tokens=20))
    right([*first, *late], Sampling())


@pytest.mark.parametrize("deep", [False, True])
def test_an_abort_that_keeps_leaves_no_fill_behind(deep: bool) -> None:
    """The fill of a path whose last branch ended went on writing to pages that another tree had by then."""
    engine = Engine(MODEL, kv_tokens=4000, prefill_tokens=16)
    mine, others = engine.tree(prompt_of(3 if deep else 250, seed=3), key=1), engine.tree(prompt_of(300), key=9)
    [above] = engine.extend(mine.root.fork(), Sampling(max_tokens=200 if deep else 2))
    branch, beside = (above if deep else mine.root).fork(), others.root.fork(8)
    seen, is_released, after = 0, False, 0
    sampling = Sampling(max_tokens=400)
    for event in engine.stream([*beside, *branch], sampling):
        seen += event.node is branch[0] and not is_released
        if seen == 5 and not is_released:
            engine.release()
            is_released = True
        after += is_released and event.node is beside[0]
        if after == 6 and not mine.closed:
            assert engine.scheduler.fills, "its path is being computed again"
            engine.abort(branch, keep=True)
            assert not engine.scheduler.fills
            mine.close()
            engine.check_integrity()
    assert mine.closed and branch[0].finish == "abort"
    right(beside, sampling)


# ---- closing a tree ------------------------------------------------------------------------------------------


def branching(tree: Tree) -> Growth:
    leaves = yield tree.root.fork(4)
    yield [fork for leaf in leaves for fork in leaf.fork(at=len(leaf) // 2)]


def looking_ahead(tree: Tree) -> Growth:
    branches = tree.root.fork(4)
    yield Ahead(branches, branches[:1])
    yield Ahead([], branches)


def closing_itself(tree: Tree) -> Growth:
    yield tree.root.fork(2)
    tree.close()
    yield tree.root.children


@pytest.mark.parametrize("search", [branching, looking_ahead, closing_itself])
def test_a_search_ends_when_its_tree_is_closed(search: Callable[[Tree], Growth]) -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    graded: list[int] = []

    def reward(tree: Tree, leaf: Node) -> float:
        graded.append(tree.ordinal)
        if search is not closing_itself:
            tree.close()  # good enough
        return 1.0

    sampling = Sampling(max_tokens=60, stop_tokens=(3, 4, 5, 6, 7))
    done = dict(engine.run(search, [prompt_of(5, seed=i) for i in range(3)], sampling, reward=reward))
    assert sorted(done) == [0, 1, 2] == sorted(set(graded))
    assert all(not node.in_flight for tree in done.values() for node in tree.nodes())
    assert_idle(engine)


def test_a_reward_that_never_comes_is_not_waited_for_once_the_tree_is_closed() -> None:
    engine = Engine(MODEL, kv_tokens=4000)

    def reward(tree: Tree, leaf: Node) -> Future[float]:
        tree.close()
        return Future()

    assert len(list(engine.run(branching, [prompt_of(5)], Sampling(max_tokens=9), reward=reward))) == 1


def test_a_search_that_looked_ahead_does_not_wait_for_what_was_aborted() -> None:
    engine = Engine(MODEL, kv_tokens=8000)

    def reward(tree: Tree, leaf: Node) -> float:
        engine.abort([child for child in tree.root.children if child.in_flight])
        return 1.0

    sampling = Sampling(max_tokens=60, stop_tokens=(5, 6, 7, 8, 9, 10))
    trees = dict(engine.run(looking_ahead, [prompt_of(4), prompt_of(5)], sampling, reward=reward))
    assert sorted(trees) == [0, 1] and all(tree.leaves() for tree in trees.values())


def test_an_interrupted_close_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    tree = engine.tree(prompt_of(40))
    engine.extend(tree.root.fork(2), Sampling(max_tokens=20))

    def interrupted(tree: Tree) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tree.close()
    assert not tree.closed
    tree.close()
    assert_idle(engine)


# ---- errors --------------------------------------------------------------------------------------------------


def dead_end(prefix: Any) -> list[int]:
    return [] if len(prefix) >= 10 else list(range(VOCABULARY))


def undecodable(ids: Sequence[int]) -> str:
    return "x" * len(ids) if len(ids) < 12 else str(1 // 0)


FAILING = {
    "mask": (Sampling(max_tokens=30, allowed=dead_end), NoTokenAllowed),
    "pause": (Sampling(max_tokens=30, pause=lambda tokens, new: new > 3 and 1 // 0 > 0), ZeroDivisionError),
    "decode": (Sampling(max_tokens=30, stop=("zz",)), ZeroDivisionError),
}


@pytest.mark.parametrize("what", FAILING)
def test_what_one_branch_fails_with_is_raised_to_whoever_extends_it(what: str) -> None:
    failing, error = FAILING[what]
    engine = Engine(MODEL, kv_tokens=4000, decode=undecodable)
    bad, good, third = (engine.tree(prompt_of(5 + i, seed=i)) for i in range(3))
    stream = engine.stream(bad.root.fork(2), failing)
    next(stream)
    sampling = Sampling(max_tokens=30)
    for tree in (good, third):
        right(engine.extend(tree.root.fork(2), sampling), sampling)
    with pytest.raises(error):
        list(stream)
    assert bad.root.children == []
    with pytest.raises(error):
        engine.extend(bad.root.fork(2), failing)
    for tree in (bad, good, third):
        tree.close()
    assert_idle(engine)


def test_a_dead_end_ends_its_own_search_and_the_tree_says_so() -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    prompts = [[i + 3, *prompt_of(3, seed=i)] for i in range(4)]

    def allowed(prefix: Any) -> list[int]:
        return [] if prefix[0] == 5 and len(prefix) > 9 else list(range(VOCABULARY))

    trees = dict(engine.run(branching, prompts, Sampling(max_tokens=20, allowed=allowed)))
    assert [type(trees[i].ended_by) for i in range(4)] == [type(None), type(None), NoTokenAllowed, type(None)]
    assert [len(trees[i].leaves()) for i in (0, 1, 3)] == [8, 8, 8]
    assert_idle(engine)


def test_a_search_may_catch_a_dead_end_and_go_on() -> None:
    engine = Engine(MODEL, kv_tokens=4000)

    def search(tree: Tree) -> Growth:
        try:
            yield tree.root.fork(2)
        except NoTokenAllowed:
            tree.notes["caught"] = True
        yield [child for child in tree.root.children if child.is_pending and not child.in_flight]

    [(_, tree)] = engine.run(search, [prompt_of(5)], Sampling(max_tokens=20, allowed=dead_end))
    assert tree.notes["caught"]


def test_what_a_reward_raises_goes_to_the_caller_of_its_own_run() -> None:
    engine, sampling, done = Engine(MODEL, kv_tokens=4000), Sampling(max_tokens=4), []

    def fails(tree: Tree, node: Node) -> float:
        raise ZeroDivisionError

    def search(tree: Tree) -> Growth:
        yield tree.root.fork(2)

    def beside() -> Iterator[list[int]]:
        yield prompt_of(6)
        with engine.tree(prompt_of(7)) as tree:  # makes the steps in which the branches of both runs end
            done.extend(engine.extend(tree.root.fork(), Sampling(max_tokens=20)))

    def failing() -> Iterator[list[int]]:
        yield prompt_of(5)
        done.extend(engine.run(search, beside(), sampling))

    with pytest.raises(ZeroDivisionError):
        list(engine.run(search, failing(), sampling, reward=fails))
    assert len(done) == 2, "an extend and a tree"
    assert_idle(engine)


def test_a_branch_that_has_no_token_yet_where_another_fails_is_in_order() -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    first, second = trees = [engine.tree(prompt_of(5 + i, seed=i)) for i in range(2)]
    above = [engine.extend(tree.root.fork(), Sampling(max_tokens=6))[0] for tree in trees]
    waiting = above[0].fork(at=2)
    engine._submit(waiting, Sampling(max_tokens=20))
    with pytest.raises(NoTokenAllowed):
        engine.extend(above[1].fork(at=2), Sampling(max_tokens=20, allowed=lambda prefix: []))
    engine.check_integrity()
    engine.abort(waiting, keep=True)
    assert waiting[0].dropped and waiting[0].finish is None
    first.close()
    second.close()
    assert_idle(engine)


def test_a_search_that_extends_by_itself_is_raised_at_in_its_own_call() -> None:
    engine = Engine(MODEL, kv_tokens=4000)

    def search(tree: Tree) -> Growth:
        with pytest.raises(NoTokenAllowed):
            engine.extend(tree.root.fork(2), Sampling(max_tokens=20, allowed=dead_end))
        yield tree.root.fork(2)

    [(_, tree)] = engine.run(search, [prompt_of(5)], Sampling(max_tokens=20))
    assert len(tree.leaves()) == 2 and tree.ended_by is None


def test_what_is_asked_for_and_waits_for_room_is_not_extended_once_the_tree_is_closed() -> None:
    engine = Engine(MODEL, kv_tokens=4000, max_branches=4)
    seen: list[Tree] = []

    def search(tree: Tree) -> Growth:
        seen.append(tree)
        branches = tree.root.fork(4)
        yield Ahead(branches, branches[:1])
        yield [*tree.root.fork(4), *branches]

    def reward(tree: Tree, leaf: Node) -> float:
        if leaf is not tree.root.children[0]:
            for other in seen:
                other.close()
        return 1.0

    sampling = Sampling(max_tokens=60, stop_tokens=tuple(range(3, 12)))
    assert len(list(engine.run(search, [prompt_of(5, seed=i) for i in range(6)], sampling, reward=reward))) == 6
    assert_idle(engine)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (lambda tree: iter([tree.root.fork(2)]), "a search is a generator function"),
        (lambda tree: (node for node in tree.root.fork(2)), "a search yields a list of nodes"),
        (lambda tree: (word for word in ["nodes"]), "a search yields a list of nodes"),
        (lambda tree: (depths for depths in [[1, 2]]), "a search yields a list of nodes"),
        (lambda tree: (nothing for nothing in [None]), "a search yields a list of nodes"),
    ],
)
def test_what_is_no_search_is_told_what_one_is(search: Any, said: str) -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    with pytest.raises(TypeError, match=said):
        list(engine.run(search, [prompt_of(40), prompt_of(50)], Sampling(max_tokens=30)))
    assert_idle(engine)


def test_what_is_no_node_is_told_what_one_is() -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    tree = engine.tree(prompt_of(5))
    for what in ([tree], [3], ["node"]):
        with pytest.raises(TypeError, match=r"is not a Node; give nodes that node\.fork\(\)"):
            engine.extend(what, Sampling(max_tokens=4))  # type: ignore[arg-type]


def test_a_reward_is_a_number_whatever_it_comes_as() -> None:
    """Also one that came at once, as one of a future always was."""
    engine = Engine(MODEL, kv_tokens=4000)

    def rewards(given: Any) -> list[float | None]:
        search = lambda tree: (nodes for nodes in [tree.root.fork(2)])  # noqa: E731
        [(_, tree)] = engine.run(search, [prompt_of(4)], Sampling(max_tokens=4), reward=lambda tree, node: given)
        return [leaf.reward for leaf in tree.leaves()]

    for given, want in ((torch.tensor(0.5), 0.5), (np.float32(1), 1.0), (True, 1.0), ("0.25", 0.25), (None, None)):
        found = rewards(given)
        assert found == [want, want] and {type(reward) for reward in found} == {type(want)}
    with pytest.raises(ValueError, match="could not convert string to float: 'good'"):
        rewards("good")
    assert_idle(engine)


def test_a_search_receives_no_branch_that_a_reward_dropped() -> None:
    received: list[list[int]] = []

    def search(tree: Tree) -> Growth:
        nodes = tree.root.fork(3)
        got = yield nodes
        received.append([nodes.index(node) for node in got])
        yield tree.root.fork()

    def reward(tree: Tree, leaf: Node) -> float:
        if leaf is tree.root.children[0] and len(tree.root.children) == 3:
            leaf.drop()
        return 1.0

    engine = Engine(MODEL, kv_tokens=4000)
    sampling = Sampling(max_tokens=4)
    grown = engine.run(search, [prompt_of(4), prompt_of(6)], sampling, reward=reward)
    assert [len(tree.root.children) for _, tree in grown] == [3, 3]
    assert received == [[1, 2], [1, 2]]
    assert_idle(engine)


@pytest.mark.parametrize("given", [tuple, iter, dict.fromkeys])
def test_branches_may_be_asked_for_in_any_collection(given: Callable[[list[Node]], Any]) -> None:
    def search(tree: Tree) -> Growth:
        tree.notes["received"] = yield given(tree.root.fork(3))

    engine = Engine(MODEL, kv_tokens=4000)
    [(_, tree)] = engine.run(search, [prompt_of(4)], Sampling(max_tokens=4))
    assert tree.notes["received"] == tree.leaves() and len(tree.leaves()) == 3


def test_an_error_of_run_names_the_prompt() -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    with pytest.raises(ValueError, match="outside the vocabulary") as caught:
        list(engine.run(branching, [prompt_of(4), [99]], Sampling(max_tokens=4)))
    assert caught.value.__notes__ == ["(prompt 1 of the run)"]


# ---- interrupts ----------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt() -> Iterator[Callable[[float], None]]:
    """Has KeyboardInterrupt raised after so many seconds, wherever the program is then; after 0, never."""

    def raised(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raised)
    gc.disable()  # what is raised within a callback of the collector is lost
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.enable()
    signal.signal(signal.SIGALRM, before)


def work(kind: str, engine: Engine, key: int) -> None:
    if kind == "run":
        prompts = [prompt_of(20, seed=i) for i in range(5)]
        list(engine.run(branching, prompts, Sampling(max_tokens=40, stop_tokens=(4,))))
        return
    tree = engine.tree(prompt_of(40, seed=key))
    if kind == "extend":
        engine.extend(tree.root.fork(4), Sampling(max_tokens=60))
    elif kind == "score":
        engine.score(tree, [prompt_of(30, seed=1)] * 3)
    else:
        for _ in engine.stream(tree.root.fork(4), Sampling(max_tokens=30)):
            pass


@pytest.mark.parametrize("order", [("interrupted", "other"), ("other", "interrupted")])
def test_an_interrupt_in_a_reward_keeps_no_other_run_waiting(order: tuple[str, str]) -> None:
    """The branches of both runs end in the same step, before and behind the one that is interrupted."""
    engine, ends = Engine(MODEL, kv_tokens=4000), dict.fromkeys(order, 0)

    def search(tree: Tree) -> Growth:
        if tree.prompt_len > 4:  # a shorter one is done at once
            yield tree.root.fork(2)

    def begin(name: str, max_tokens: int) -> Iterator[tuple[int, Tree]]:
        def reward(tree: Tree, node: Node) -> float:
            ends[name] = engine.stats()["steps"]
            if name == "interrupted":
                raise KeyboardInterrupt
            return 1.0

        run = engine.run(
            search, [prompt_of(length) for length in (4, 5, 6)], Sampling(max_tokens=max_tokens), reward=reward
        )
        return chain([next(run)], run)

    runs = {name: begin(name, length) for name, length in zip(order, (40, 39), strict=True)}
    with pytest.raises(KeyboardInterrupt):
        list(runs["interrupted"])
    trees = dict(runs["other"])
    assert ends["interrupted"] == ends["other"] > 0
    assert sorted(trees) == [0, 1, 2]
    assert [leaf.reward for tree in trees.values() for leaf in tree.leaves()] == [1.0] * 4
    assert_idle(engine)


def test_a_reward_may_go_on_with_another_run_whose_branches_ended_in_the_same_step() -> None:
    engine, asked, found = Engine(MODEL, kv_tokens=4000), list[Node](), dict[int, Tree]()
    prompts = [prompt_of(length) for length in (4, 5, 6)]

    def search(tree: Tree) -> Growth:
        if tree.prompt_len > 4:  # a shorter one is done at once
            yield tree.root.fork(2)

    def reward(tree: Tree, node: Node) -> float:
        if not asked:  # within it the others are graded
            asked.append(node)
            found.update(other)
        return 2.0

    graded = engine.run(search, prompts, Sampling(max_tokens=40), reward=reward)
    trees = dict([next(graded)])
    other = engine.run(search, prompts, Sampling(max_tokens=39), reward=lambda tree, node: 1.0)
    found.update([next(other)])
    trees.update(graded)
    for run, value in ((trees, 2.0), (found, 1.0)):
        assert [leaf.reward for tree in run.values() for leaf in tree.leaves()] == [value] * 4
    assert_idle(engine)


def test_searches_whose_branches_are_gone_are_told_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, kv_tokens=4000)
    monkeypatch.setattr(engine, "_report", lambda node: None)
    with pytest.raises(EngineError, match="start the run again"):
        list(engine.run(branching, [prompt_of(5)], Sampling(max_tokens=4)))
    assert_idle(engine)


@pytest.mark.parametrize("kind", ["run", "extend", "score", "stream"])
def test_an_interrupt_at_any_moment_leaves_an_engine_in_order(kind: str, interrupt: Callable[[float], None]) -> None:
    draw, interrupted = random.Random(0), 0
    for key in range(40):
        engine = Engine(MODEL, kv_tokens=draw.choice([16 * 14, 4000]), prefill_tokens=draw.choice([7, 2048]))
        try:
            try:
                interrupt(draw.uniform(0.0002, 0.01))
                work(kind, engine, key)
            finally:
                interrupt(0)  # in which it may come, too
        except KeyboardInterrupt:
            interrupted += 1
        except OutOfPages:
            pass
        for tree in list(engine._trees.values()):
            tree.close()
        assert_idle(engine)
    assert interrupted > 3


@pytest.mark.parametrize("error", [OutOfPages, KeyboardInterrupt])
def test_an_interrupt_while_a_call_is_given_up_leaves_an_engine_in_order(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between taking a branch off the queue and off its tree, after an error or another interrupt."""
    engine = Engine(MODEL, kv_tokens=16 * 4)
    tree = engine.tree(prompt_of(40))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    if error is KeyboardInterrupt:
        monkeypatch.setattr(engine.scheduler, "_sample", interrupted)
    monkeypatch.setattr(engine.scheduler, "_abandon", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        engine.extend(tree.root.fork(4), Sampling(max_tokens=60))
    assert isinstance(raised.value.__context__, error)
    assert tree.root.children == []
    tree.close()
    assert_idle(engine)


def test_reset_puts_broken_books_in_order() -> None:
    sampling = Sampling(max_tokens=50)
    engine = Engine(MODEL, kv_tokens=4000)
    tree = engine.tree(prompt_of(20), key=3)
    [done] = engine.extend(tree.root.fork(), sampling)
    branch = tree.root.fork()
    stream = engine.stream(branch, sampling)
    next(stream)
    engine.cache.pool.refs[done.kv.pages[0]] += 1
    engine.cache.pool._free.pop()
    sampled = engine.stats()["sampled"]
    engine.reset()
    engine.check_integrity()
    assert branch[0].dropped and tree.root.children == [done] and engine.stats()["sampled"] == sampled
    assert [event.finish for event in stream] == ["abort"]
    below = engine.extend([*done.fork(2, at=20), *tree.root.fork()], sampling)
    right(below, sampling)
    tree.close()
    assert_idle(engine)


def test_a_second_thread_is_told_that_an_engine_is_for_one() -> None:
    """Here it comes while the first one asks a pause, which is in the middle of a step."""
    engine = Engine(MODEL, kv_tokens=4000)
    mine, others = engine.tree(prompt_of(5)).root.fork(), engine.tree(prompt_of(6)).root.fork()
    errors: list[BaseException] = []

    def extend() -> None:
        for use in (
            lambda: engine.extend(others, Sampling(max_tokens=3)),
            lambda: engine.score(others[0].tree, [[1]]),
            lambda: engine.abort(mine, keep=True),
            lambda: mine[0].tree.close(),
            lambda: engine.tree([1]),
            engine.release,
            engine.weights_changed,
        ):
            try:
                use()
            except EngineError as error:
                errors.append(error)

    def pause(tokens: Any, new: int) -> bool:
        if new == 2:
            thread = Thread(target=extend)
            thread.start()
            thread.join()
        return False

    sampling = Sampling(max_tokens=9, pause=pause)
    right(engine.extend(mine, sampling), sampling)
    assert len(errors) == 7 and all("one thread at a time" in str(error) for error in errors)
    engine.check_integrity()
    engine.extend(others, sampling)  # the refusal left them as they were


# ---- copies --------------------------------------------------------------------------------------------------


def test_a_copy_for_another_process_takes_nothing_of_the_engine_along() -> None:
    engine = Engine(MODEL, kv_tokens=50_000)
    with engine.tree(prompt_of(5)) as tree:
        [node] = engine.extend(tree.root.fork(), Sampling(max_tokens=5))
        for thing in (node, tree, tree.export()):
            assert len(pickle.dumps(thing)) < 10_000
        copied = pickle.loads(pickle.dumps(node))
        assert copied.tokens.tolist() == node.tokens.tolist() and copied.prefix().tolist() == node.prefix().tolist()
        assert copied.tree.root.children[0] is copied
        copied.tree.close()  # harms nobody
        engine.extend(tree.root.fork(), Sampling(max_tokens=5))
        engine.check_integrity()


def test_a_deep_tree_is_copied_with_its_notes_and_without_recursion() -> None:
    tree = Tree(prompt_of(3), key=1)
    node, numbers = tree.root, np.zeros(2, np.float32)
    for depth in range(3000):
        first, second = node.fork(2)
        node = first.fill([depth % 7, 2], numbers, numbers, numbers, finish="stop")
        second.fill([3, depth % 5], numbers, numbers, numbers, finish="length") if depth % 2 else None
    gone = tree.root.children[0].children[0].children[1]
    gone.drop()
    tree.notes["best"] = [node, node.parent, gone]
    node.notes["above"] = node.parent
    for copied in (copy.deepcopy(node), pickle.loads(pickle.dumps(node)), pickle.loads(pickle.dumps(tree.leaves()))[0]):
        assert copied.tree is not tree and copied.tree.closed
        assert [n.tokens.tolist() for n in copied.tree.nodes()] == [n.tokens.tolist() for n in tree.nodes()]
        assert [n.serial for n in copied.tree.leaves()] == [n.serial for n in tree.leaves()]
        assert copied.prefix().tolist() == node.prefix().tolist()
        best, above, lost = copied.tree.notes["best"]
        assert best is copied and above is copied.parent is copied.notes["above"]
        assert lost.dropped and lost.tokens.tolist() == gone.tokens.tolist()
        again = pickle.loads(pickle.dumps(copied.parent))
        assert again.fork(1)[0].stream == node.parent.fork(1)[0].stream
        node.parent.children.pop()
        node.parent.forks[node.parent.end] -= 1
    assert copy.copy(node) is node
