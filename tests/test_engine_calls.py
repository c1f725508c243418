"""Calls that an engine refuses: the message names the remedy, and nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
from engine_helpers import VOCABULARY, assert_idle, prompt_of, tiny_model

from ibtpo_engine import Engine, OutOfPages, Sampling
from ibtpo_engine.tree import Tree as BareTree

PROMPT = prompt_of(70)
GREEDY = Sampling(max_tokens=30, temperature=0)


def test_bad_calls_of_extend_name_the_remedy_and_change_nothing() -> None:
    model = tiny_model()
    engine, other = Engine(model, kv_tokens=1024), Engine(model, kv_tokens=1024)
    tree, closed, foreign = engine.tree(PROMPT), engine.tree(PROMPT), other.tree(PROMPT)
    [leaf] = engine.extend(tree.root.fork(), GREEDY)
    [lost] = engine.extend(tree.root.fork(), GREEDY)
    orphan = lost.fork()[0]
    lost.drop()
    of_closed = closed.root.fork()[0]
    closed.close()
    twice, good = tree.root.fork(2)
    for message, node in {
        "not pending; use node.fork": leaf,
        "closed tree or to another engine": of_closed,
        "closed tree or to another": foreign.root.fork()[0],
        "to another engine": BareTree(PROMPT).root.fork()[0],
        "raise max_tokens": leaf.fork()[0],
        "was dropped": orphan,
    }.items():
        for nodes in ([node], [good, node]):
            with pytest.raises(ValueError, match=message):
                engine.extend(nodes, GREEDY)
            assert good.is_pending
            assert not good.in_flight
    with pytest.raises(ValueError, match="given twice"):
        engine.extend([twice, good, twice], GREEDY)
    assert [len(node) for node in engine.extend([twice, good], GREEDY)] == [30, 30]
    assert engine.extend([], GREEDY) == []
    tree.close()
    assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([3, VOCABULARY], "40 lies outside the vocabulary"),
        ([3, -1], "-1 lies outside the vocabulary"),
        (np.array([3, 2**32]), "32-bit"),
        ([0.5], "token ids"),
        ([3] * 50, "50 tokens leaves no room in the model's context of 50"),
    ],
)
def test_bad_prompts_are_named(prompt: list[int], message: str) -> None:
    engine = Engine(tiny_model(positions=50), kv_tokens=1024)
    with pytest.raises(ValueError, match=message):
        engine.tree(prompt)
    with pytest.raises(ValueError, match=message):
        list(engine.run(lambda tree: iter([]), [prompt], GREEDY))
    assert_idle(engine)


def test_a_prompt_larger_than_the_pool_is_named() -> None:
    engine = Engine(tiny_model(), kv_tokens=50)
    with pytest.raises(
        OutOfPages, match=r"prompt of 70 tokens needs 5 pages, the pool has 4; raise kv_tokens \(now 64\)"
    ):
        engine.tree(PROMPT)
    assert_idle(engine)


@pytest.mark.parametrize("field", ["kv_tokens", "max_branches", "prefill_tokens"])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"Engine: {field}=0 must be at least 1"):
        Engine(tiny_model(), **{field: 0})
    with pytest.raises(ValueError, match=rf"Engine: {field}=1000\.0 must be an integer"):
        Engine(tiny_model(), **{field: 1e3})


def test_what_names_random_numbers_is_an_integer() -> None:
    """Cut to one, two fractions would name the same numbers."""
    engine = Engine(tiny_model(), kv_tokens=1024)
    for key in (0.3, "a"):
        with pytest.raises(ValueError, match=f"key={key!r}"):
            engine.tree(PROMPT, key=key)
        with pytest.raises(ValueError, match=r"Sampling\.seed"):
            Sampling(seed=key)
    engine.tree(PROMPT, key=np.int64(3)).close()
    assert_idle(engine)
