"""An engine behind a completions server, and the trees that searches grow over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from completion_server import Server, serving
from engine_helpers import assert_idle, prompt_of, tiny_model

from ibtpo_engine import (
    BackendEngine,
    CompletionsServer,
    Engine,
    EngineBackend,
    HttpBackend,
    Node,
    Sampling,
    Tree,
)

PROMPTS = [prompt_of(9 + i, seed=i) for i in range(5)]
SAMPLING = Sampling(max_tokens=20, stop_tokens=(2,))
MODEL = tiny_model()


def engine() -> Engine:
    return Engine(MODEL, kv_tokens=8192, max_branches=64)


@contextmanager
def serving_engine() -> Iterator[Server]:
    """A completions server over an engine, which is idle when it is left."""
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
