"""A search grows the same kind of tree whoever samples: this engine, or a completions server across HTTP."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from completion_server import Handler, Server, serving
from engine_helpers import assert_idle, path_logits, prompt_of, tiny_model
from shaped_sampling import Alternate

from ibtpo.config import IBConfig, SearchConfig
from ibtpo.search import make_search
from ibtpo.steps import StepSplitter
from ibtpo_engine import (
    BackendEngine,
    BackendError,
    Completion,
    CompletionsServer,
    Engine,
    EngineBackend,
    EngineError,
    HttpBackend,
    Node,
    Sampling,
    Tree,
    backend_engine,
    http_backend,
)

PROMPTS = [prompt_of(9 + i, seed=i) for i in range(5)]
SAMPLING = Sampling(max_tokens=20, stop_tokens=(2,))
MODEL = tiny_model()


def engine() -> Engine:
    return Engine(MODEL, kv_tokens=8192, max_branches=64)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    backend = EngineBackend(engine())
    with serving(backend) as served:
        yield served
    assert_idle(backend.engine)


def connect(server: Server, **options: Any) -> HttpBackend:
    return HttpBackend(
        CompletionsServer(**({"url": server.url, "model": "tiny", "timeout": 20, "backoff": 0} | options))
    )


def forks(tree: Tree) -> Iterator[list[Node]]:
    """Forks of several widths, at the root, inside a node and at its end, so that a round becomes several calls."""
    first, second, third = yield tree.root.fork(3)
    yield [*first.fork(2, at=len(first) // 2), *second.fork(2, at=len(second) - 1), *third.fork(1, at=1)]


def grown(engine: Engine | BackendEngine, sampling: Sampling = SAMPLING) -> list[Tree]:
    trees = dict(engine.run(forks, PROMPTS, sampling, keys=range(10, 15)))
    assert sorted(trees) == list(range(5))
    return [trees[i] for i in range(5)]


def outline(tree: Tree) -> list[tuple[Any, ...]]:
    return [(node.start, node.tokens.tolist(), node.finish, len(node.children)) for node in tree.nodes()]


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
    local, waits, wait = EngineBackend(engine()), [], backend_engine.wait

    class SlowOnes:
        def extend(self, prefixes: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Completion]]:
            time.sleep(0.2 * (n == 1))
            return local.extend(prefixes, n, **options)

    def reward(tree: Tree, leaf: Node) -> Future[float]:
        graded: Future[float] = Future()
        graded.set_result(1.0)
        return graded

    def counted(*args: Any, **options: Any) -> Any:
        waits.append(args)
        return wait(*args, **options)

    monkeypatch.setattr(backend_engine, "wait", counted)
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


def test_a_score_that_would_rest_on_nan_is_refused(server: Server) -> None:
    search = make_search(SearchConfig(), IBConfig(), StepSplitter(_Words(), step_tokens=5), SAMPLING.max_tokens)
    with connect(server) as backend, pytest.raises(ValueError, match="step_probability.*temperature 1"):
        list(BackendEngine(backend).run(search, PROMPTS, replace(SAMPLING, top_p=0.5), reward=lambda tree, leaf: 1.0))


# ---- what goes wrong -----------------------------------------------------------------------------------------


def busy(handler: Handler, body: dict[str, Any]) -> None:
    handler.answer(503, {"error": {"message": "busy"}}, Retry_After="0")


def reset(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.close()


def cut_off(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_off_without_a_length(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0}')
    handler.close_connection = True


def hang(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(0.6)
    handler.close_connection = True


@pytest.mark.parametrize("fault", [busy, reset, cut_off, cut_off_without_a_length, hang])
def test_a_request_that_fails_for_a_while_is_sent_again_with_the_same_seed(
    server: Server, fault: Callable[[Handler, dict[str, Any]], None]
) -> None:
    options = {"timeout": 0.3} if fault is hang else {}
    with connect(server) as untroubled, connect(server, retries=2, **options) as backend:
        outlines = []
        for one in (untroubled, backend):
            seen = len(server.requests)
            server.faults[:] = [fault, fault] if one is backend else []
            trees = BackendEngine(one)
            with trees.tree(PROMPTS[0], key=0) as tree:
                trees.extend(tree.root.fork(), Sampling(max_tokens=3))
            outlines.append(outline(tree))
        assert len(server.requests) - seen == 3
        assert server.requests[-1] == server.requests[-2] == server.requests[-3]
        assert outlines[0] == outlines[1]


def test_a_server_that_keeps_failing_is_given_up_and_the_nodes_leave_their_tree(server: Server) -> None:
    with connect(server, retries=1, max_requests=1) as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            [kept] = trees.extend(tree.root.fork(), SAMPLING)
            server.faults[:] = [busy, busy]
            nodes = tree.root.fork(1)
            with pytest.raises(BackendError, match=r"HTTP 503: busy, 2 times in a row.*timeout"):
                trees.extend(nodes, SAMPLING)
            assert tree.root.children == [kept]
            assert all(node.dropped and not node.in_flight for node in nodes)
            assert not server.faults
            trees.extend(tree.root.fork(2), SAMPLING)
            assert len(tree.leaves()) == 3


def test_a_refusal_is_not_repeated(server: Server) -> None:
    seen = len(server.requests)
    server.faults[:] = [lambda handler, body: handler.answer(400, {"error": {"message": "prompt too long"}})]
    backend = connect(server, retries=9, siblings="together")
    with backend, pytest.raises(BackendError, match="HTTP 400: prompt too long"):
        list(BackendEngine(backend, max_calls=1).run(forks, PROMPTS[:1], SAMPLING))
    assert len(server.requests) - seen == 1


def test_nobody_there_is_an_error_that_says_so() -> None:
    with serving(EngineBackend(engine())) as gone:
        pass
    with connect(gone, retries=1) as backend, pytest.raises(BackendError, match="refused.*is the server up"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])


def first(response: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = response["choices"][0]
    return choice


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        (lambda r: first(r).pop("token_ids"), "no token ids.*return_token_ids"),
        (lambda r: first(r).update(token_ids=["a"] * 3), "no integers"),
        (lambda r: first(r).update(token_ids="567"), "no integers"),
        (lambda r: first(r)["token_ids"].__setitem__(0, 6.7), "no integers"),
        (lambda r: first(r)["token_ids"].__setitem__(0, -6), "no integers from 0 on"),
        (lambda r: first(r)["token_ids"].__setitem__(0, 1 << 40), "no integers from 0 on"),
        (lambda r: first(r).update(logprobs=[-1.0, -2.0]), "logprobs that are no object"),
        (lambda r: first(r).update(logprobs="none"), "logprobs that are no object"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].__setitem__(0, math.nan), "outside"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].__setitem__(0, -math.inf), "outside"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].__setitem__(0, 3.5), "outside"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].__setitem__(0, -(10**400)), "outside"),
        (lambda r: first(r).update(logprobs=None), "no log-prob.*logprobs=1"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].__setitem__(0, None), "no log-prob"),
        (lambda r: first(r)["logprobs"]["token_logprobs"].append(-1.0), "log-probs for"),
        (lambda r: first(r).update(finish_reason="abort"), "finish_reason='abort'"),
        (
            lambda r: first(r).update(finish_reason="stop", token_ids=[5] * len(first(r)["token_ids"])),
            "not in stop_tokens",
        ),
        (lambda r: first(r)["token_ids"].__setitem__(0, 2), "went on after token 2 .*honours stop_token_ids"),
        (lambda r: first(r).update(prompt_token_ids=[1, *first(r)["prompt_token_ids"]]), "BOS"),
        (lambda r: r.update(choices=[]), "0 choices for n=1"),
        (lambda r: r.pop("choices"), "no list of choices"),
        (lambda r: _lengthen(first(r)), "21 tokens where 1 to 20"),
        (lambda r: first(r).update(token_ids=[], finish_reason="length", logprobs={"token_logprobs": []}), "0 tokens"),
    ],
)
def test_an_answer_that_is_not_a_sampled_branch_is_refused(twist: Callable[[Any], Any], message: str) -> None:
    with serving(EngineBackend(engine()), twist) as server, connect(server) as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree:
            with pytest.raises(BackendError, match=message):
                trees.extend(tree.root.fork(), SAMPLING)
            assert tree.root.children == []


@pytest.mark.parametrize("indices", [[None, None], [0, 0], [0, 2], ["0", "1"], [0, True]])
def test_choices_that_are_not_told_apart_are_refused(indices: list[Any]) -> None:
    def twist(response: dict[str, Any]) -> None:
        for choice, index in zip(response["choices"], indices, strict=True):
            choice["index"] = index

    with serving(EngineBackend(engine()), twist) as server, connect(server, siblings="together") as backend:
        trees = BackendEngine(backend)
        with trees.tree(PROMPTS[0]) as tree, pytest.raises(BackendError, match="numbered its 2 choices"):
            trees.extend(tree.root.fork(2), SAMPLING)


def test_an_answer_nested_too_deep_is_no_json() -> None:
    with pytest.raises(BackendError, match="is not JSON"):
        http_backend._parsed(b"[" * 200_000)


def test_seeds_least_lengths_and_pauses_over_a_backend() -> None:
    """`Sampling.seed` names the numbers of a whole call, siblings still differ; `min_tokens` counts from the prompt."""
    sampling = Sampling(max_tokens=20, min_tokens=12, stop_tokens=tuple(range(2, 30)), seed=5)
    grown = []
    for seed in (0, 1):
        trees = BackendEngine(EngineBackend(Engine(MODEL, kv_tokens=8192, seed=7)), seed=seed)
        with trees.tree(PROMPTS[0], key=seed) as tree:
            nodes = trees.extend(tree.root.fork(3), sampling)
            below = trees.extend([*nodes[0].fork(2, at=6), *nodes[1].fork(2, at=11)], sampling)
            grown.append([node.tokens.tolist() for node in [*nodes, *below]])
            assert all(12 <= leaf.end - tree.prompt_len <= 20 for leaf in tree.leaves())
            with pytest.raises(ValueError, match=r"Sampling\.pause"):
                trees.extend(tree.root.fork(), Sampling(pause=lambda tokens, new: True))
    assert grown[0] == grown[1] and len(set(map(tuple, grown[0]))) == 7
    local = EngineBackend(engine())
    [row] = local.extend([PROMPTS[0]], 3, sampling=Sampling(max_tokens=9, seed=5), seeds=[[1, 2, 3]])
    assert len({tuple(completion.tokens) for completion in row}) == 3
    with pytest.raises(ValueError, match=r"Sampling\.pause"):
        local.extend([PROMPTS[0]], 1, sampling=Sampling(pause=lambda tokens, new: True), seeds=[[1]])


def test_stop_strings_and_grammars_over_a_backend_begin_at_the_prompt_or_are_refused() -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(chr(97 + token % 5) for token in tokens)

    trees = BackendEngine(EngineBackend(Engine(MODEL, kv_tokens=8192, decode=decode)))
    stop, mask = Sampling(max_tokens=20, stop=("ab", "cd")), Alternate()
    tree = trees.tree(PROMPTS[0])
    nodes = trees.extend(tree.root.fork(6), stop)
    assert {node.stopped_by for node in nodes if node.finish == "stop"} == {"ab", "cd"}
    for node in nodes:
        assert node.finish == "length" or decode(node.tokens.tolist()).endswith(str(node.stopped_by))
    with pytest.raises(ValueError, match=r"Sampling\.stop: .* goes on from sampled tokens"):
        trees.extend(nodes[0].fork(at=1), stop)
    trees.extend(tree.root.fork(at=5), Sampling(max_tokens=20, allowed=mask))
    with pytest.raises(ValueError, match=r"Sampling\.allowed: .* goes on from sampled tokens"):
        trees.extend(nodes[0].fork(at=1), Sampling(max_tokens=20, allowed=mask))


def test_a_tree_closed_by_a_reward_ends_its_search_over_a_backend_too() -> None:
    trees = BackendEngine(EngineBackend(engine()))

    def reward(tree: Tree, leaf: Node) -> float:
        tree.close()
        return 1.0

    assert sorted(dict(trees.run(forks, PROMPTS[:3], SAMPLING, reward=reward))) == [0, 1, 2]


def _stop_at(choice: dict[str, Any], token: int) -> None:
    choice.update(finish_reason="stop", token_ids=[token] * len(choice["token_ids"]))


def _lengthen(choice: dict[str, Any]) -> None:
    choice.update(token_ids=[5] * 21, finish_reason="length", logprobs={"token_logprobs": [-1.0] * 21})


def test_an_answer_that_is_not_json_is_refused(server: Server) -> None:
    server.faults[:] = [lambda handler, body: handler.answer(200, b"<html>")]
    with connect(server) as backend, pytest.raises(BackendError, match="not JSON: b'<html>'"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])


def test_a_stop_token_on_the_last_place_is_a_stop_whatever_the_server_calls_it() -> None:
    def call_it_length(response: dict[str, Any]) -> None:
        for choice in response["choices"]:
            choice["finish_reason"] = "length"

    local = EngineBackend(engine())
    with serving(local, call_it_length) as server, connect(server) as backend:
        ours, theirs = grown(BackendEngine(local)), grown(BackendEngine(backend))
    assert list(map(outline, ours)) == list(map(outline, theirs))
    assert {leaf.finish for tree in ours for leaf in tree.leaves()} == {"stop", "length"}


def test_with_nothing_to_stop_at_the_models_end_token_does_not_stop_either(server: Server) -> None:
    with connect(server) as backend:
        backend.extend([[3, 4]], 1, sampling=Sampling(max_tokens=3), seeds=[[0]])
    assert server.requests[-1]["ignore_eos"] is True
    assert server.requests[-1]["stop_token_ids"] == []


def test_ids_spelled_as_tokens_are_read_too() -> None:
    def spell(response: dict[str, Any]) -> None:
        for choice in response["choices"]:
            choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in choice.pop("token_ids")]

    local = EngineBackend(engine())
    with serving(local, spell) as server, connect(server) as backend:
        [[theirs]] = backend.extend([PROMPTS[0]], 1, sampling=SAMPLING, seeds=[[7]])
    [[ours]] = local.extend([PROMPTS[0]], 1, sampling=SAMPLING, seeds=[[7]])
    assert ours.tokens.tolist() == theirs.tokens.tolist()


def test_closing_ends_the_wait_between_two_tries(server: Server) -> None:
    server.faults[:] = [lambda handler, body: handler.answer(503, {}, Retry_After="30")]
    backend, begin = connect(server), time.monotonic()
    threading.Timer(0.2, backend.close).start()
    with pytest.raises(BackendError, match="closed"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])
    assert time.monotonic() - begin < 10
    with pytest.raises(BackendError, match="closed; make a new one"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])


def test_a_run_left_early_or_by_an_error_closes_searches_and_trees(server: Server) -> None:
    closed: list[Tree] = []

    def search(tree: Tree) -> Iterator[list[Node]]:
        try:
            yield from forks(tree)
        finally:
            closed.append(tree)

    def reward(tree: Tree, leaf: Node) -> float:
        raise RuntimeError("grader broke")

    with connect(server) as backend:
        trees = BackendEngine(backend)
        next(run := trees.run(search, PROMPTS, SAMPLING))
        run.close()
        assert len(closed) == 5
        with pytest.raises(RuntimeError, match="grader broke"):
            list(trees.run(search, PROMPTS, SAMPLING, reward=reward))
        assert len(closed) == 10
        assert all(tree.closed for tree in closed)
        assert not trees._trees
        assert not any(node.in_flight for tree in closed for node in tree.root.children)


def test_misuse_is_an_error_that_names_the_remedy(server: Server) -> None:
    local = EngineBackend(engine())
    trees, others = BackendEngine(local, max_positions=16), BackendEngine(local)
    tree = trees.tree(PROMPTS[0])
    [node] = trees.extend(tree.root.fork(), SAMPLING)
    assert node.end == 16  # the context, though max_tokens would allow more
    for nodes, message in (
        (node.fork(), "paths end at 16"),
        ([node], "not pending"),
        (tree.root.fork() * 2, "given twice"),
        (others.tree(PROMPTS[0]).root.fork(), "another engine"),
    ):
        with pytest.raises(ValueError, match=message):
            trees.extend(nodes, SAMPLING)
    with pytest.raises(ValueError, match="no room in the context of 16"):
        trees.tree(prompt_of(16))
    with pytest.raises(ValueError, match="no key is left for prompt 1"):
        list(others.run(forks, PROMPTS, SAMPLING, keys=[1]))
    with pytest.raises(ValueError, match="max_calls=0"):
        BackendEngine(local, max_calls=0)
    with pytest.raises(ValueError, match="1 seeds for n=2"):
        local.extend([[3]], 2, sampling=SAMPLING, seeds=[[0]])


def test_a_backend_that_miscounts_or_a_tree_closed_under_way_is_an_error() -> None:
    local = EngineBackend(engine())

    class TooFew:
        def extend(self, *args: Any, **options: Any) -> list[list[Completion]]:
            return [row[:-1] for row in local.extend(*args, **options)]

    class Closes:
        def extend(self, *args: Any, **options: Any) -> list[list[Completion]]:
            tree.close()
            return local.extend(*args, **options)

    trees = BackendEngine(TooFew())
    with pytest.raises(BackendError, match=r"\[1\] completions for \[2\]"):
        trees.extend(trees.tree(PROMPTS[0]).root.fork(2), SAMPLING)
    trees = BackendEngine(Closes())
    tree = trees.tree(PROMPTS[0])
    with pytest.raises(EngineError, match="closed while"):
        trees.extend(tree.root.fork(2), SAMPLING)
    assert tree.root.children == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url: 'localhost:8000' must look like"),
        ({"logprobs": "exact"}, "logprobs: 'exact' is not one of"),
        ({"siblings": "both"}, "siblings"),
        ({"timeout": 0}, "timeout: 0 must be above 0"),
        ({"timeout": math.nan}, "timeout"),
        ({"retries": -1}, "retries: -1 must be at least 0"),
        ({"backoff": -1.0}, "backoff"),
        ({"max_requests": 0}, "max_requests: 0 must be at least 1"),
    ],
)
def test_a_wrong_option_names_itself_and_its_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompletionsServer(**({"url": "http://127.0.0.1/v1", "model": "m"} | options))


def test_a_key_is_not_printed() -> None:
    assert "secret" not in repr(CompletionsServer(url="http://127.0.0.1/v1", model="m", api_key="secret"))
    with pytest.raises(ValueError, match=r"api_key: holds a line end.*strip\(\)") as refused:
        CompletionsServer(url="http://127.0.0.1/v1", model="m", api_key="secret\n")  # as it is read from a file
    assert "secret" not in str(refused.value)
