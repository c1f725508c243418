"""The protocol between searches and samplers, and this engine as one of them.

A backend continues lists of token ids. `BackendEngine` grows trees over any backend, so searches, rewards and code that
reads trees run unchanged whether the tokens come from this process or from a server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy.typing as npt

from ibtpo_engine.arrays import Floats, Ints
from ibtpo_engine.engine import Engine
from ibtpo_engine.growing import Reward, Search
from ibtpo_engine.randomness import mix
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.tree import Tree


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """A sampled continuation of a prefix; a number the backend does not know is NaN, never a stand-in.

    Attributes:
        tokens: int32 [n >= 1]; a stop token is kept as the last one.
        logprob: float32 [n], log-probability under the distribution sampled from (temperature, top-p, top-k applied).
        logprob_raw: float32 [n], log-probability under the model at temperature 1, without filters.
        entropy: float32 [n], entropy in nats of the model's full distribution at temperature 1.
        finish: "stop" (a token of `Sampling.stop_tokens`, or `stopped_by`) or "length".
        stopped_by: the stop string that ended it, if one did.
    """

    tokens: Ints
    logprob: Floats
    logprob_raw: Floats
    entropy: Floats
    finish: str
    stopped_by: str | None = None


class Backend(Protocol):
    """Anything that samples. `BackendEngine` calls it from several threads at a time."""

    def extend(
        self, prefixes: Sequence[Sequence[int]], n: int, *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Continue every prefix `n` times.

        Args:
            prefixes: P lists of token ids, each a prompt and what was sampled below it.
            n: completions of each prefix.
            sampling: how; here `max_tokens` counts from the end of the prefix.
            seeds: [P][n], each in [0, 2^31); the same prefix, sampling and seed should give the same completion.

        Returns:
            [P][n] completions in the order of the seeds.

        Raises:
            BackendError: the backend failed; the message names the remedy.
            ValueError: the backend does not know one of the sampling parameters.
        """


@runtime_checkable
class CancellableBackend(Backend, Protocol):
    """A backend whose calls can be cancelled."""

    def extend_until(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        *,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        cancelled: threading.Event,
    ) -> list[list[Completion]]:
        """As `extend`; once `cancelled` is set it begins nothing more, and whatever it raises is ignored."""


class TreeEngine(Protocol):
    """Something that grows trees: an `Engine` or a `BackendEngine`.

    Attributes:
        seconds_waiting: time spent waiting for rewards with nothing to sample.
    """

    seconds_waiting: float

    def run(
        self,
        search: Search,
        prompts: Iterable[npt.ArrayLike],
        sampling: Sampling,
        *,
        reward: Reward | None = None,
        keys: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, Tree]]:
        """Grow a tree on every prompt; as `Engine.run`."""

    def weights_changed(self) -> None:
        """Tokens sampled from here on come from other weights."""


class EngineBackend:
    """An engine of this process as a backend: for code written against the protocol, and to serve it to others.

    Args:
        engine: samples, one call at a time.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()  # an engine belongs to one thread at a time

    def extend(
        self, prefixes: Sequence[Sequence[int]], n: int, *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Continue every prefix `n` times, all in one batch; a seed is the key of a tree. As `Backend.extend`.

        Raises:
            ValueError: also if `sampling` has a pause, since a completion cannot pause.
        """
        if sampling.pause is not None:
            raise ValueError("Sampling.pause: a backend's completion cannot pause; use Engine.extend")
        if sampling.seed is not None:  # of a whole call: its completions differ by their own seeds
            seeds = [[mix(sampling.seed, seed) for seed in row] for row in seeds]
            sampling = replace(sampling, seed=None)
        with self._lock, ExitStack() as trees:
            nodes = []
            for prefix, row in zip(prefixes, seeds, strict=True):
                if len(row) != n:
                    raise ValueError(f"extend: {len(row)} seeds for n={n} completions; give one per completion")
                for seed in row:
                    nodes += trees.enter_context(self.engine.tree(prefix, key=seed)).root.fork()
            completions = [
                Completion(
                    tokens=node.tokens,
                    logprob=node.logprob,
                    logprob_raw=node.logprob_raw,
                    entropy=node.entropy,
                    finish=str(node.finish),
                    stopped_by=node.stopped_by if isinstance(node.stopped_by, str) else None,
                )
                for node in self.engine.extend(nodes, sampling)
            ]
        return [completions[i * n : (i + 1) * n] for i in range(len(prefixes))]
