"""Scores of given tokens equal the sampler's own numbers and a plain forward pass, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from engine_helpers import (
    ROUNDING,
    VOCABULARY,
    assert_idle,
    check_every_step,
    expected_tokens,
    free_pages,
    path_logits,
    prompt_of,
    same,
    tiny_model,
)

from ibtpo_engine import Engine, EngineError, Model, Node, OutOfPages, Sampling, Tree

PROMPT = prompt_of(37)
SAMPLING = Sampling(max_tokens=30, temperature=0.8, stop_tokens=(2,))


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["native", "module"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(dtype=request.param)


def plain(model: Model, prefix: list[int], suffix: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(log-prob, entropy) of each token of a suffix by one forward pass over the whole path."""
    logits = path_logits(model, [*prefix, *suffix])[len(prefix) - 1 : -1].double()
    log_p = torch.log_softmax(logits, -1)
    chosen = log_p[torch.arange(len(suffix)), torch.tensor(suffix)]
    return chosen.numpy(), -(log_p.exp() * log_p).sum(-1).numpy()


@pytest.mark.parametrize("prefill_tokens", [1, 7, 2048])
def test_scores_are_those_of_a_plain_forward_pass(model: Model, prefill_tokens: int) -> None:
    engine = Engine(model, kv_tokens=8192, prefill_tokens=prefill_tokens)
    checks = check_every_step(engine)
    suffixes = [prompt_of(n, seed=n) for n in (1, 2, 11, 12, 27, 28, 60)]
    for length in (1, 16, 37, 48):
        tree = engine.tree(PROMPT[:length] if length < 38 else prompt_of(length))
        prefix = tree.root.tokens.tolist()
        for suffix, score in zip(suffixes, engine.score(tree, suffixes), strict=True):
            logprob, entropy = plain(model, prefix, suffix)
            assert score.tokens.tolist() == suffix
            np.testing.assert_allclose(score.logprob, logprob, rtol=0, atol=ROUNDING)
            np.testing.assert_allclose(score.entropy, entropy, rtol=0, atol=ROUNDING)
            assert abs(score.total - logprob.sum()) < ROUNDING * len(suffix)
            assert score.node is None
        tree.close()
    assert len(checks) >= 4
    assert engine.stats()["sampled"] == 0
    assert_idle(engine)


def test_what_was_sampled_scores_as_it_was_sampled(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT) as tree:
        nodes = engine.extend(tree.root.fork(3), SAMPLING)
        nodes += engine.extend(nodes[0].fork(2, at=len(nodes[0]) // 2), SAMPLING)
        for node in nodes:
            [score] = engine.score(node.parent, [node.tokens])
            np.testing.assert_allclose(score.logprob, node.logprob_raw, rtol=0, atol=ROUNDING)
            np.testing.assert_allclose(score.entropy, node.entropy, rtol=0, atol=ROUNDING)
            assert len(node) > 1


def test_a_tree_stands_for_its_whole_prompt_wherever_that_is_cut(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT)
    [whole] = engine.score(tree, [[5, 6, 7]])
    tree.root.fork(at=9)
    tree.root.split(4)
    [cut] = engine.score(tree, [[5, 6, 7]])
    np.testing.assert_allclose(cut.logprob, whole.logprob, rtol=0, atol=ROUNDING)
    assert tree.prompt.end == len(PROMPT) > tree.root.end


def test_a_tree_closed_while_it_is_scored_is_an_error_and_no_score(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192, prefill_tokens=4)
    tree, other = engine.tree(PROMPT), engine.tree(PROMPT[:5])
    closing = Sampling(max_tokens=30, pause=lambda tokens, new: new == 3 and tree.close() is not None)
    next(stream := engine.stream(other.root.fork(), closing))
    with pytest.raises(EngineError, match="closed while it was being scored"):
        engine.score(tree, [[5, 6, 7], [8]])
    stream.close()
    other.close()
    assert_idle(engine)


def test_forks_below_kept_suffixes_differ_with_a_seed_too(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    scores = engine.score(engine.tree(PROMPT), [[5, 6], [5, 6], [7, 8]], keep=True)
    nodes = [score.node.fork()[0] for score in scores if score.node is not None]
    engine.extend(nodes, Sampling(max_tokens=20, seed=5))
    assert len({node.stream for node in nodes}) == 3
    again = Engine(model, kv_tokens=8192, seed=9)
    [score] = again.score(again.tree(PROMPT, key=4), [[5, 6]], keep=True)
    assert score.node is not None
    [node] = again.extend(score.node.fork(), Sampling(max_tokens=20, seed=5))
    assert node.tokens.tolist() == nodes[0].tokens.tolist()


def test_the_prefix_is_computed_once_and_no_trace_is_left(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT, key=4) as tree:
        [node] = engine.extend(tree.root.fork(), SAMPLING)
        engine.score(node, [[5]])  # computes the hidden state of its last token
        before, pages = engine.stats(), engine.cache.pool.num_free
        suffixes = [prompt_of(20, seed=i) for i in range(6)]
        engine.score(node, suffixes)
        after = engine.stats()
        assert after["computed"] - before["computed"] == 6 * 19
        assert after["sampled"] == before["sampled"]
        assert engine.cache.pool.num_free == pages
        assert node.children == []
        assert tree.leaves() == [node]
        [fork] = engine.extend(node.fork(), Sampling(max_tokens=60))
    fresh = Engine(model, kv_tokens=8192)
    [again] = fresh.extend(fresh.tree(PROMPT, key=4).root.fork(), SAMPLING)
    same(fresh.extend(again.fork(), Sampling(max_tokens=60)), [fork])


def test_a_kept_suffix_is_a_node_like_any_other(model: Model) -> None:
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(PROMPT) as tree:
        suffix = prompt_of(21, seed=8)
        first, second = engine.score(tree, [suffix, suffix], keep=True)
        assert tree.leaves() == [first.node, second.node]
        assert {first.node.finish, second.node.finish} == {"scored"}
        engine.check_integrity()
        computed = engine.stats()["computed"]
        forks = [*first.node.fork(2), *second.node.fork(1), *first.node.fork(1, at=16), *second.node.fork(1, at=20)]
        engine.extend(forks, Sampling(max_tokens=40))
        assert len({tuple(fork.tokens.tolist()) for fork in forks}) == 5, "forks of equal suffixes differ too"
        for fork in forks:
            assert fork.tokens.tolist() == expected_tokens(model, fork, SAMPLING_PLAIN).tolist()
        assert engine.stats()["computed"] - computed < 5 * 30 + 8, "the suffix was not computed again"
        np.testing.assert_array_equal(tree.export().tokens[: len(PROMPT)], PROMPT)
    assert_idle(engine)


SAMPLING_PLAIN = Sampling(max_tokens=40)


def test_more_suffixes_than_pages_are_scored_one_after_the_other(model: Model) -> None:
    engine = Engine(model, kv_tokens=16 * 8)
    check_every_step(engine)
    with engine.tree(PROMPT) as tree:
        suffixes = [prompt_of(30, seed=i) for i in range(12)]
        for suffix, score in zip(suffixes, engine.score(tree, suffixes), strict=True):
            np.testing.assert_allclose(score.logprob, plain(model, PROMPT, suffix)[0], rtol=0, atol=ROUNDING)
        with pytest.raises(OutOfPages):
            engine.score(tree, [prompt_of(120)])
        assert tree.root.children == []
        assert free_pages(engine) >= 5
        engine.check_integrity()
    assert_idle(engine)


def test_scoring_beside_branches_under_way_disturbs_neither(model: Model) -> None:
    """In the body of a stream: its branches go on in the steps that score."""
    whole = Engine(model, kv_tokens=8192)
    expected = whole.extend(whole.tree(PROMPT, key=3).root.fork(5), SAMPLING)
    engine = Engine(model, kv_tokens=16 * 30)
    check_every_step(engine)
    tree, scored = engine.tree(PROMPT, key=3), 0
    nodes = tree.root.fork(5)
    for event in engine.stream(nodes, SAMPLING):
        if event.start % 7 == 0 and any(node.in_flight for node in nodes):
            [score] = engine.score(tree, [prompt_of(14, seed=event.start)])
            logprob, _ = plain(model, PROMPT, prompt_of(14, seed=event.start))
            np.testing.assert_allclose(score.logprob, logprob, rtol=0, atol=ROUNDING)
            scored += 1
    same(nodes, expected)
    assert scored > 3


def test_a_search_may_score_and_its_reward_is_not_asked(model: Model) -> None:
    totals = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        nodes = yield tree.root.fork(2)
        totals.append(engine.score(nodes[0], [[3, 4], [5]])[1].total)
        yield nodes[0].fork(1, at=2)

    graded: list[Node] = []
    engine = Engine(model, kv_tokens=8192)
    trees = dict(engine.run(search, [PROMPT, prompt_of(20)], SAMPLING, reward=lambda t, n: float(not graded.append(n))))
    assert len(totals) == 2
    assert len(graded) == sum(len(tree.leaves()) for tree in trees.values()) == 6
    assert_idle(engine)


def test_what_cannot_be_scored_is_refused(model: Model) -> None:
    engine = Engine(model, kv_tokens=1024)
    tree = engine.tree(PROMPT)
    for suffix, why in (
        ([], "at least one"),
        ([[1]], "flat"),
        ([0.5], "flat"),
        ([3, VOCABULARY], "outside the vocabulary"),
        ([-1, 3], "outside the vocabulary"),
        ([3] * 476, "context of 512"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.score(tree, [[3], suffix])
    [pending] = tree.root.fork()
    with pytest.raises(ValueError, match="no tokens yet"):
        engine.score(pending, [[3]])
    pending.drop()
    assert tree.root.children == []
    assert engine.score(tree, []) == []
    tree.close()
    with pytest.raises(ValueError, match="closed"):
        engine.score(tree, [[3]])
