"""A search grows the same kind of tree whoever samples: this engine, or a completions server across HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from backend_runs import MODEL, PROMPTS, SAMPLING, connect, engine, forks, grown, outline
from completion_server import Server
from engine_helpers import path_logits

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.search import make_search
from ibtpo.steps import StepSplitter
from ibtpo_engine import (
    BackendEngine,
    Completion,
    EngineBackend,
    Node,
    Sampling,
    Tree,
)
from ibtpo_engine.growing import Searches

# ---- the same trees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("siblings", ["apart", "together"])
def test_a_greedy_tree_from_a_server_is_the_tree_of_the_engine(server: Server, siblings: str) -> None:
    """Without randomness nothing may tell the two apart: tokens, endings, cuts and the model's log-probs."""
    greedy = replace(SAMPLING, temperature=0)
    expected = grown(engine(), greedy)
    with connect(server, siblings=siblings) as backend:
        for ours, theirs in zip(expected, grown(BackendEngine(backend), greedy), strict=True):
            assert outline(ours) == outline(theirs)
            for a, b in zip(ours.nodes(), theirs.nodes(), strict=True):
                np.testing.assert_allclose(a.logprob_raw, b.logprob_raw, rtol=0, atol=2e-5)
                np.testing.assert_array_equal(b.logprob, 0 * b.logprob_raw)
    assert sum(len(tree.leaves()) for tree in expected) == 40


@pytest.mark.parametrize("local", [True, False])
def test_every_log_prob_is_the_models_own_for_its_path(server: Server, local: bool) -> None:
    """A prefix sent, sampled from, cut and forked again is still the path that the numbers belong to."""
    backend: Any = EngineBackend(engine()) if local else connect(server)
    checked = 0
    for tree in grown(BackendEngine(backend)):
        for leaf in tree.leaves():
            expected = path_logits(MODEL, leaf.prefix()).log_softmax(-1)
            for node in leaf.path()[1:]:
                rows = expected[node.start - 1 : node.end - 1].numpy()
                np.testing.assert_allclose(node.logprob_raw, rows[range(len(node)), node.tokens], rtol=0, atol=2e-5)
                np.testing.assert_array_equal(node.logprob, node.logprob_raw)
                entropy = -(np.exp(rows) * rows).sum(-1) if local else np.full(len(node), np.nan)
                np.testing.assert_allclose(node.entropy, entropy, rtol=0, atol=2e-5)
                checked += len(node)
    assert checked > 500


def test_a_replay_is_exact_whatever_runs_beside_it(server: Server) -> None:
    with connect(server) as many, connect(server, max_requests=1) as one:
        trees = grown(BackendEngine(many, seed=4))
        assert [outline(tree) for tree in trees] == [outline(t) for t in grown(BackendEngine(one, seed=4, max_calls=1))]
        alone = dict(BackendEngine(many, seed=4).run(forks, PROMPTS[3:4], SAMPLING, keys=[13]))[0]
        assert outline(alone) == outline(trees[3])
        assert outline(alone) != outline(grown(BackendEngine(many, seed=5))[3])


@pytest.mark.parametrize("siblings", ["apart", "together"])
def test_siblings_differ(server: Server, siblings: str) -> None:
    with connect(server, siblings=siblings) as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            seen = len(server.requests)
            nodes = trees.extend(tree.root.fork(8), replace(SAMPLING, stop_tokens=()))
            assert len({node.tokens.tobytes() for node in nodes}) == 8
            sent = server.requests[seen:]
    assert sorted(body["n"] for body in sent) == ([8] if siblings == "together" else [1] * 8)
    assert len({body["seed"] for body in sent}) == len(sent)


def test_siblings_asked_for_together_come_in_the_order_of_their_index(server: Server) -> None:
    """The server lists its choices backwards; the i-th of them was drawn with seed + i."""
    with connect(server, siblings="together") as backend:
        [theirs] = backend.extend([PROMPTS[0]], 4, sampling=SAMPLING, seeds=[[9, 0, 0, 0]])
    [ours] = EngineBackend(engine()).extend([PROMPTS[0]], 4, sampling=SAMPLING, seeds=[[9, 10, 11, 12]])
    assert [one.tokens.tolist() for one in ours] == [one.tokens.tolist() for one in theirs]
    assert len({one.tokens.tobytes() for one in ours}) == 4


@pytest.mark.parametrize("method", ["ibtree", "random-tree", "independent"])
def test_the_searches_of_the_method_run_unchanged(server: Server, method: str) -> None:
    """IBTree and its controls, with rewards in futures, spend the same budget here and across HTTP."""
    config = SearchConfig(method=method, initial_branches=3, rounds=3, nodes_per_round=2, branches_per_node=2)
    search = make_search(config, IBConfig(), StepSplitter(_Words(), step_tokens=5), SAMPLING.max_tokens)
    with ThreadPoolExecutor(2) as graders, connect(server) as backend:

        def reward(tree: Tree, leaf: Node) -> Future[float]:
            return graders.submit(lambda: float(int(leaf.tokens[-1]) % 2))

        leaves = []
        for engine_ in (engine(), BackendEngine(backend)):
            trees = [tree for _, tree in engine_.run(search, PROMPTS, SAMPLING, reward=reward)]
            assert {leaf.reward for tree in trees for leaf in tree.leaves()} == {0.0, 1.0}
            assert all(tree.notes["ib"].value(tree.root) >= 0 for tree in trees)
            leaves.append(sorted(len(tree.leaves()) for tree in trees))
    assert leaves[0] == leaves[1]


class _Words:
    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        return "w" * len(token_ids)


def test_trees_do_not_wait_for_one_another() -> None:
    """While one tree's call hangs, the others go through all their rounds."""
    released, inner = threading.Event(), EngineBackend(engine())

    class OneHangs:
        def extend(self, prefixes: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Completion]]:
            if list(prefixes[0]) == PROMPTS[2]:
                assert released.wait(20)
            return inner.extend(prefixes, n, **options)

    order = []
    for index, _ in BackendEngine(OneHangs()).run(forks, PROMPTS, SAMPLING):
        order.append(index)
        if len(order) == 4:
            released.set()
    assert sorted(order[:4]) == [0, 1, 3, 4]
    assert order[4] == 2


def test_a_grade_that_has_come_keeps_no_processor_busy_while_branches_are_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two answers there is nothing to do: one look a call, however long the last one takes."""
    local, waits, wait = EngineBackend(engine()), [], Searches.wait

    class SlowOnes:
        def extend(self, prefixes: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Completion]]:
            time.sleep(0.2 * (n == 1))
            return local.extend(prefixes, n, **options)

    def reward(tree: Tree, leaf: Node) -> Future[float]:
        graded: Future[float] = Future()
        graded.set_result(1.0)
        return graded

    def counted(searches: Searches) -> None:
        waits.append(searches)
        wait(searches)

    monkeypatch.setattr(Searches, "wait", counted)
    [(_, tree)] = BackendEngine(SlowOnes()).run(forks, PROMPTS[:1], SAMPLING, reward=reward)
    assert [leaf.reward for leaf in tree.leaves()] == [1.0] * 8
    assert len(waits) <= 4


def test_requests_overlap_up_to_their_limit(server: Server) -> None:
    for limit, seen in ((1, {1}), (8, set(range(2, 9)))):
        server.most_under_way = 0
        with connect(server, max_requests=limit) as backend:
            grown(BackendEngine(backend))
        assert server.most_under_way in seen


def test_tokens_carry_the_version_of_the_weights(server: Server) -> None:
    with connect(server) as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            [old] = trees.extend(tree.root.fork(), SAMPLING)
            trees.weights_changed()
            [new] = trees.extend(tree.root.fork(), SAMPLING)
            assert (old.version, new.version) == (0, 1)
            assert set(tree.export().version.tolist()) == {0, 1}


def test_tokens_asked_for_before_the_weights_changed_carry_the_version_of_then() -> None:
    local = EngineBackend(engine())

    class Updated:
        def extend(self, *args: Any, **options: Any) -> list[list[Completion]]:
            sampled = local.extend(*args, **options)
            trees.weights_changed()  # by a trainer, before the answer is here
            return sampled

    trees = BackendEngine(Updated())
    with trees.tree(PROMPTS[0]) as tree:
        [node] = trees.extend(tree.root.fork(), SAMPLING)
        assert (node.version, trees.version) == (0, 1)


# ---- what is sent --------------------------------------------------------------------------------------------


def test_a_request_leaves_nothing_to_the_servers_defaults(server: Server) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, max_tokens=11, stop_tokens=(2, 3))
    with connect(server, api_key="key") as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            [node] = trees.extend(tree.root.fork(), sampling)
            [below] = trees.extend(node.fork(at=1), sampling)
    first, second = server.requests[-2:]
    assert server.headers[-1]["Authorization"] == "Bearer key"
    assert first["prompt"] == PROMPTS[0]
    assert second["prompt"] == [*PROMPTS[0], int(below.path()[1].tokens[0])]
    assert (first["max_tokens"], second["max_tokens"]) == (11, 10)
    assert {key: first[key] for key in first.keys() - {"prompt", "seed"}} == {
        "model": "tiny", "n": 1, "max_tokens": 11, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01,
        "logprobs": 1, "return_token_ids": True, "ignore_eos": False, "stop_token_ids": [2, 3],
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert 0 <= first["seed"] < 2**31


@pytest.mark.parametrize(
    ("kind", "sampling", "known"),
    [
        ("raw", {}, (True, True)),
        ("raw", {"temperature": 0.5}, (False, True)),
        ("raw", {"top_p": 0.9}, (False, True)),
        ("raw", {"temperature": 0}, (True, True)),
        ("scaled", {}, (True, True)),
        ("scaled", {"temperature": 0.5}, (True, False)),
        ("scaled", {"top_k": 5}, (False, True)),
        ("scaled", {"temperature": 0.5, "min_p": 0.1}, (False, False)),
        ("scaled", {"temperature": 0}, (True, False)),
        ("sampled", {}, (True, True)),
        ("sampled", {"temperature": 0.5, "top_p": 0.9}, (True, False)),
        ("sampled", {"temperature": 0}, (True, False)),
    ],
)
def test_a_log_prob_has_the_name_it_deserves_or_is_nan(
    server: Server, kind: Any, sampling: dict[str, Any], known: tuple[bool, bool]
) -> None:
    with connect(server, logprobs=kind) as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            [node] = trees.extend(tree.root.fork(), replace(SAMPLING, **sampling))
    assert (not np.isnan(node.logprob).any(), not np.isnan(node.logprob_raw).any()) == known
    assert np.isnan(node.logprob).all() != known[0]
    assert np.isnan(node.logprob_raw).all() != known[1]


@pytest.mark.parametrize(("method", "score"), [("ibtree", "step_probability"), ("eptree", "surprisal")])
def test_a_score_that_would_rest_on_nan_is_refused(server: Server, method: str, score: str) -> None:
    config = SearchConfig(method=method)
    search = make_search(config, IBConfig(), StepSplitter(_Words(), step_tokens=5), SAMPLING.max_tokens)
    with connect(server) as backend, pytest.raises(ValueError, match=f"^{score}: .*temperature 1"):
        list(BackendEngine(backend).run(search, PROMPTS, replace(SAMPLING, top_p=0.5), reward=lambda tree, leaf: 1.0))
