"""What a search over a completions server does when an answer is late, broken, missing or not what was asked for."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from backend_runs import MODEL, PROMPTS, SAMPLING, connect, engine, forks, grown, outline
from completion_server import Handler, Server, serving
from engine_helpers import VOCABULARY, prompt_of
from shaped_sampling import Alternate

from ibtpo_engine import (
    Ahead,
    BackendEngine,
    BackendError,
    Completion,
    CompletionsServer,
    Engine,
    EngineBackend,
    EngineError,
    Node,
    NoTokenAllowed,
    Sampling,
    Tree,
    http_backend,
)


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
    with connect(gone, retries=1) as backend, pytest.raises(BackendError, match="refused.*check that the server runs"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])


def first(response: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = response["choices"][0]
    return choice


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        (lambda r: first(r).pop("token_ids"), "no token ids.*return_token_ids"),
        (lambda r: first(r).update(token_ids=["a"] * 3), "not 32-bit integers"),
        (lambda r: first(r).update(token_ids="567"), "not 32-bit integers"),
        (lambda r: first(r)["token_ids"].__setitem__(0, 6.7), "not 32-bit integers"),
        (lambda r: first(r)["token_ids"].__setitem__(0, -6), "not 32-bit integers from 0 on"),
        (lambda r: first(r)["token_ids"].__setitem__(0, 1 << 40), "not 32-bit integers from 0 on"),
        (lambda r: first(r).update(logprobs=[-1.0, -2.0]), "logprobs that are not a JSON object"),
        (lambda r: first(r).update(logprobs="none"), "logprobs that are not a JSON object"),
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
        (lambda r: first(r)["token_ids"].__setitem__(0, 2), "continued after token 2 .*supports stop_token_ids"),
        (lambda r: first(r).update(prompt_token_ids=[1, *first(r)["prompt_token_ids"]]), "BOS"),
        (lambda r: first(r).update(prompt_token_ids=5), "continued 5 tokens"),
        (lambda r: r.update(choices=[]), "0 choices for n=1"),
        (lambda r: (r.clear(), r.update(error={"message": "out of memory"})), "no list of choices.*out of memory"),
        (lambda r: r.pop("choices"), "no list of choices"),
        (lambda r: _lengthen(first(r)), "21 tokens, but 1 to 20"),
        (
            lambda r: first(r)["token_ids"].__setitem__(0, VOCABULARY),
            rf"token id {VOCABULARY}, outside the vocabulary \[0, {VOCABULARY}\); check whether the server",
        ),
        (lambda r: first(r).update(token_ids=[], finish_reason="length", logprobs={"token_logprobs": []}), "0 tokens"),
    ],
)
def test_an_answer_that_is_not_a_sampled_branch_is_refused(twist: Callable[[Any], Any], message: str) -> None:
    with serving(EngineBackend(engine()), twist) as server, connect(server) as backend:
        trees = BackendEngine(backend, vocabulary=VOCABULARY)
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


def test_an_answer_cut_off_anywhere_is_one_to_ask_for_again() -> None:
    choice = {"text": "}é{", "stop_reason": None, "token_ids": [7], "logprobs": {"token_logprobs": [-1.25e-05]}}
    answer = json.dumps({"choices": [choice]}, ensure_ascii=False).encode()
    for length in range(len(answer)):
        with pytest.raises(http.client.IncompleteRead):
            http_backend._parsed(answer[:length])
    assert http_backend._parsed(answer)["choices"] == [choice]


def test_any_number_of_tries(server: Server) -> None:
    server.faults[:] = [busy] * 1030
    with connect(server, retries=1030, backoff=0.0) as backend:
        [[found]] = backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])
    assert len(found.tokens) > 0
    assert not server.faults


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
    with pytest.raises(ValueError, match=r"Sampling\.stop: .* continues sampled tokens"):
        trees.extend(nodes[0].fork(at=1), stop)
    trees.extend(tree.root.fork(at=5), Sampling(max_tokens=20, allowed=mask))
    with pytest.raises(ValueError, match=r"Sampling\.allowed: .* continues sampled tokens"):
        trees.extend(nodes[0].fork(at=1), Sampling(max_tokens=20, allowed=mask))


def test_a_tree_closed_by_a_reward_ends_its_search_over_a_backend_too() -> None:
    trees = BackendEngine(EngineBackend(engine()))

    def reward(tree: Tree, leaf: Node) -> float:
        tree.close()
        return 1.0

    assert sorted(dict(trees.run(forks, PROMPTS[:3], SAMPLING, reward=reward))) == [0, 1, 2]


@pytest.mark.parametrize("catches", [False, True])
def test_a_branch_with_no_token_left_is_told_to_its_search_alone_as_on_an_engine(catches: bool) -> None:
    def allowed(prefix: Any) -> list[int]:
        return [] if len(prefix) == 17 and prefix[:10].tolist() == PROMPTS[1] else [4, 5, 6]

    def search(tree: Tree) -> Iterator[list[Node]]:
        try:
            yield tree.root.fork(2)
        except NoTokenAllowed:
            if not catches:
                raise
            yield tree.root.fork(at=1)

    found = []
    for trees in (engine(), BackendEngine(EngineBackend(engine()))):
        grown = dict(trees.run(search, PROMPTS[:3], Sampling(max_tokens=9, allowed=allowed), keys=range(3)))
        found.append([(type(grown[i].ended_by), outline(grown[i])) for i in range(3)])
    assert [ended_by for ended_by, _ in found[0]] == [type(None), type(None) if catches else NoTokenAllowed, type(None)]
    assert [(ended_by, len(nodes)) for ended_by, nodes in found[0]] == [(one, len(nodes)) for one, nodes in found[1]]


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


def test_a_request_that_nobody_waits_for_gives_its_place_up_between_two_tries(server: Server) -> None:
    server.faults[:] = [lambda handler, body: handler.answer(503, {}, Retry_After="30")]
    left, begin = threading.Event(), time.monotonic()
    with connect(server, max_requests=1) as backend:
        threading.Timer(0.2, left.set).start()
        with pytest.raises(BackendError, match="the call was left"):
            backend.extend_until([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]], cancelled=left)
        assert len(backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])[0]) == 1
    assert time.monotonic() - begin < 10


def test_closing_cuts_a_request_under_way_off(server: Server) -> None:
    asked, closed = threading.Event(), threading.Event()

    def silent(handler: Handler, body: dict[str, Any]) -> None:
        asked.set()
        closed.wait(30)
        handler.close_connection = True

    server.faults[:] = [silent]
    backend = connect(server)

    def close() -> None:
        asked.wait(30)
        backend.close()

    threading.Thread(target=close).start()
    begin = time.monotonic()
    with pytest.raises(BackendError, match="closed"):
        backend.extend([[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])
    assert time.monotonic() - begin < 10
    closed.set()


def test_closing_as_the_last_request_under_way_ends_is_said_to_those_that_waited(server: Server) -> None:
    backend = connect(server, max_requests=1)

    def last_one(handler: Handler, body: dict[str, Any]) -> None:
        answer = handler.complete(body)
        backend.close()
        handler.answer(200, answer)

    server.faults[:] = [last_one]
    with pytest.raises(BackendError, match="closed"):
        backend.extend([[3, 4], [5, 6]], 1, sampling=SAMPLING, seeds=[[0], [0]])


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


def test_a_run_left_sends_none_of_the_requests_that_wait_for_their_turn() -> None:
    begun, left = threading.Event(), threading.Event()

    def busy_until_left(handler: Handler, body: dict[str, Any]) -> None:
        begun.set()
        left.wait(20)
        busy(handler, body)

    def search(tree: Tree) -> Iterator[list[Node] | Ahead]:
        yield tree.root.fork()
        server.faults.append(busy_until_left)
        yield Ahead(tree.root.fork(12), [])
        begun.wait(20)
        raise ZeroDivisionError

    with serving(EngineBackend(engine())) as server, connect(server, max_requests=1) as backend:
        trees = BackendEngine(backend)
        with pytest.raises(ZeroDivisionError):
            list(trees.run(search, PROMPTS[:1], SAMPLING))
        left.set()
        with trees.tree(PROMPTS[0]) as tree:
            trees.extend(tree.root.fork(), SAMPLING)
            assert len(tree.leaves()) == 1
        assert len(server.requests) == 3, "the first, of the twelve the one under way, and the last"


def test_a_run_left_cuts_its_requests_off_and_no_others(server: Server) -> None:
    """The server sees the connection of a generation that nobody wants end, so that it can stop."""
    asked, gone, answered = threading.Event(), threading.Event(), threading.Event()

    def endless(handler: Handler, body: dict[str, Any]) -> None:
        asked.set()
        handler.connection.settimeout(30)
        if handler.connection.recv(1) == b"":  # the client has nothing more to say, so what comes is the end
            gone.set()
        handler.close_connection = True

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        answered.set()
        gone.wait(30)
        busy(handler, body)

    def search(tree: Tree) -> Iterator[list[Node] | Ahead]:
        yield Ahead(tree.root.fork(), [])
        asked.wait(30)
        raise ZeroDivisionError

    with connect(server) as backend, ThreadPoolExecutor(1) as pool:
        server.faults[:] = [slow]
        other = pool.submit(backend.extend, [[3, 4]], 1, sampling=SAMPLING, seeds=[[0]])
        answered.wait(30)
        server.faults.append(endless)
        with pytest.raises(ZeroDivisionError):
            list(BackendEngine(backend).run(search, PROMPTS[:1], SAMPLING))
        assert gone.wait(20)
        assert len(other.result(20)[0]) == 1


def test_misuse_is_an_error_that_names_the_remedy(server: Server) -> None:
    local = EngineBackend(engine())
    trees, others = BackendEngine(local, max_positions=16), BackendEngine(local)
    tree = trees.tree(PROMPTS[0])
    [node] = trees.extend(tree.root.fork(), SAMPLING)
    assert node.end == 16  # the context, though max_tokens would allow more
    for nodes, message in (
        (node.fork(), "paths end at 16; that is the model's context; fork earlier"),
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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-1, 3], r"token id -1, outside"),
        ([3, 40], r"token id 40, outside"),
        ([1.5, 3.0], "float64"),
        (["a", "b"], "flat"),
    ],
)
def test_tokens_of_a_backend_are_token_ids(tokens: list[Any], message: str) -> None:
    class Odd:
        def extend(self, prefixes: Any, n: int, *, sampling: Sampling, seeds: Any) -> list[list[Completion]]:
            known = np.zeros(2, np.float32)
            array: Any = np.array(tokens)
            given = Completion(tokens=array, logprob=known, logprob_raw=known, entropy=known, finish="length")
            return [[given] * n for _ in prefixes]

    trees = BackendEngine(Odd(), vocabulary=VOCABULARY)
    tree = trees.tree(PROMPTS[0])
    with pytest.raises(BackendError, match=message):
        trees.extend(tree.root.fork(), SAMPLING)
    assert tree.root.children == []


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
        ({"url": "http://127.0.0.1:99999/v1"}, "url: 'http://127.0.0.1:99999/v1' must look like"),
        ({"url": "http://127.0.0.1:port/v1"}, "url"),
        ({"url": "http://127.0.0.1/v 1"}, "url"),
        ({"url": "http://127.0.0.1/é"}, "url"),
        ({"url": "http://127.0.0.1/v1?version=3"}, "url"),
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
    with pytest.raises(ValueError, match=r"api_key: it holds a line end.*strip\(\)") as refused:
        CompletionsServer(url="http://127.0.0.1/v1", model="m", api_key="secret\n")  # as it is read from a file
    assert "secret" not in str(refused.value)
