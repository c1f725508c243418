"""Masks and grammars: their states over forks, and what they may not answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_helpers import VOCABULARY, assert_idle
from shaped_sampling import KINDS, PROMPT, Alternate, check, engine_on, spell

from ibtpo_engine import Node, NoTokenAllowed, Sampling, Tree


def test_a_fork_goes_on_with_a_copy_of_the_state(how: str) -> None:
    """At a leaf the state is copied and the prompt not read again; within a segment the tokens before are replayed."""
    grammar = Alternate()
    sampling = Sampling(max_tokens=10, allowed=grammar)
    engine = engine_on(how)
    tree = engine.tree(PROMPT)
    [leaf] = engine.extend(tree.root.fork(), sampling)
    assert (grammar.begun, grammar.copied, grammar.advanced) == (1, 0, 9), "the last token is handed on when needed"
    longer = replace(sampling, max_tokens=20)
    ends = engine.extend(leaf.fork(3), longer)
    assert (grammar.begun, grammar.copied) == (1, 3)
    assert grammar.advanced == 9 + 3 * (1 + 9)
    inner = engine.extend(leaf.fork(2, at=4), longer)
    assert (grammar.begun, grammar.copied) == (3, 3), "nothing above holds a state"
    assert len({tuple(node.tokens) for node in ends}) == 3
    for node in [*ends, *inner]:
        parity = node.prefix()[len(PROMPT) - 1 :] % 2
        assert (parity[1:] != parity[:-1]).all()
        check(node, longer)


def test_another_mask_below_does_not_take_over_the_state() -> None:
    one, other = Alternate(), Alternate()
    engine = engine_on()
    tree = engine.tree(PROMPT)
    [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=6, allowed=one))
    engine.extend(leaf.fork(), Sampling(max_tokens=12, allowed=other))
    assert (one.copied, other.begun, other.advanced) == (0, 1, 6 + 5)


@pytest.mark.parametrize("when", [0, 1, 7])
def test_no_token_left_is_an_error_that_names_the_branch_and_leaves_the_engine_usable(how: str, when: int) -> None:
    engine = engine_on(how)
    tree, other = engine.tree(PROMPT), engine.tree(PROMPT, key=9)

    def dries_up(prefix: npt.NDArray[np.int32]) -> list[int]:
        return [] if len(prefix) == len(PROMPT) + when else [5, 6, 7]

    bystander = other.root.fork()
    engine._submit(bystander, KINDS["grammar"])
    pending = tree.root.fork(2)
    with pytest.raises(NoTokenAllowed, match=rf"Node\(1, .*leave no token at depth {37 + when}"):
        engine.extend(pending, Sampling(allowed=dries_up))
    assert all(node.dropped for node in pending)
    engine.check_integrity()
    while bystander[0].in_flight:
        engine._step()
    check(bystander[0], KINDS["grammar"])
    tree.close()
    other.close()
    assert_idle(engine)
    assert not engine.scheduler.slots.features


class Broken(Alternate):
    """Fails to begin after `prompt`; without one, its states fail to be copied."""

    def __init__(self, prompt: list[int] | None = None) -> None:
        super().__init__()
        self.prompt = prompt

    def begin(self, prompt: npt.NDArray[np.int32]) -> Any:
        if prompt.tolist() == self.prompt:
            raise ZeroDivisionError("begin")
        state = super().begin(prompt)
        if self.prompt is None:
            state.copy = self.fail  # type: ignore[method-assign]
        return state

    def fail(self) -> Any:
        raise ZeroDivisionError("copy")


@pytest.mark.parametrize("what", ["begin", "copy"])
def test_a_state_that_cannot_be_had_is_the_branchs_own_failure(how: str, what: str) -> None:
    """As an answer that fails: the branch leaves its tree, its caller is told, and those beside it go on."""
    engine = engine_on(how)
    sampling = Sampling(max_tokens=9, allowed=Broken(PROMPT if what == "begin" else None))
    tree, other = engine.tree(PROMPT), engine.tree(PROMPT[:20])
    below = tree.root
    if what == "copy":
        [below] = engine.extend(tree.root.fork(), replace(sampling, max_tokens=4))
    pending, [beside] = below.fork(2), other.root.fork()
    engine._submit([beside], sampling)
    with pytest.raises(ZeroDivisionError, match=what):
        engine.extend(pending, sampling)
    assert all(node.dropped for node in pending) and not below.children
    engine.check_integrity()
    engine.extend(below.fork(), KINDS["plain"])
    while beside.in_flight:
        engine._step()
    check(beside, replace(sampling, allowed=Alternate()))
    tree.close()
    other.close()
    assert_idle(engine)


@pytest.mark.parametrize("what", ["mask", "decoder"])
@pytest.mark.parametrize("catches", [True, False])
def test_a_mask_or_decoder_that_cannot_begin_is_told_to_its_search(what: str, catches: bool) -> None:
    def decode(tokens: list[int]) -> str:
        if tokens[:4] == PROMPT[-4:]:
            raise ZeroDivisionError("begin")
        return spell(tokens)

    def search(tree: Tree) -> Iterator[list[Node]]:
        try:
            yield tree.root.fork(2)
        except ZeroDivisionError:
            if not catches:
                raise

    engine = engine_on(decode=decode)
    how: dict[str, Any] = {"allowed": Broken(PROMPT)} if what == "mask" else {"stop": ("never",)}
    run = engine.run(search, [PROMPT, PROMPT[:20]], Sampling(max_tokens=9, **how))
    if catches:
        assert {i: len(tree.leaves()) for i, tree in run} == {0: 0, 1: 2}
    else:
        with pytest.raises(ZeroDivisionError, match="begin"):
            list(run)
    assert_idle(engine)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(allowed=lambda prefix: [2], stop_tokens=(2,), min_tokens=3),
        Sampling(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf)),
    ],
    ids=["mask and least length", "bias"],
)
def test_what_forbids_everything_together_is_named(sampling: Sampling) -> None:
    engine = engine_on()
    with (
        engine.tree(PROMPT) as tree,
        pytest.raises(NoTokenAllowed, match="Sampling.allowed, min_tokens and logit_bias"),
    ):
        engine.extend(tree.root.fork(), sampling)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.ones(VOCABULARY - 1, np.bool_), rf"shape \(39,\), expected \({VOCABULARY},\)"),
        ([3, VOCABULARY], rf"\[3, {VOCABULARY}\]; expected token ids in \[0, {VOCABULARY}\)"),
        ([-1], "expected token ids"),
        ([0.5], "float64"),
    ],
)
def test_an_answer_that_is_no_mask_is_named(answer: Any, message: str) -> None:
    engine = engine_on()
    with engine.tree(PROMPT) as tree:
        with pytest.raises(ValueError, match=message):
            engine.extend(tree.root.fork(), Sampling(allowed=lambda prefix: answer))
        check(engine.extend(tree.root.fork(), KINDS["plain"])[0], KINDS["plain"])


def test_a_mask_may_not_write_into_the_path() -> None:
    def writes(prefix: npt.NDArray[np.int32]) -> list[int]:
        prefix[0] = 1
        return [3]

    engine = engine_on()
    with engine.tree(PROMPT) as tree, pytest.raises(ValueError, match="read-only"):
        engine.extend(tree.root.fork(), Sampling(allowed=writes))
