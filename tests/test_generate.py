"""`Engine.generate`: n trajectories a prompt, as a stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_helpers import assert_idle, prompt_of, same
from shaped_sampling import KINDS, PROMPT, check, engine_on

from ibtpo_engine import Sampling


def test_generate_gives_n_trajectories_a_prompt_in_order_and_as_a_stream() -> None:
    """Prompts are taken as there is room, results come before the last prompt was read, keys make them come again."""
    taken = []

    def prompts() -> Iterator[list[int]]:
        for i in range(12):
            taken.append(i)
            yield prompt_of(5 + 4 * (i % 3), seed=i)

    engine = engine_on(max_branches=6)
    sampling = Sampling(max_tokens=25, stop_tokens=(2, 7))
    results, read = [], []
    for nodes in engine.generate(prompts(), sampling, n=3, keys=range(100, 112)):
        results.append(nodes)
        read.append(len(taken))
    assert [len(nodes) for nodes in results] == [3] * 12
    assert read[0] < 12
    for i, nodes in enumerate(results):
        assert nodes[0].tree.root.tokens.tolist() == prompt_of(5 + 4 * (i % 3), seed=i)
        for node in nodes:
            check(node, sampling)
        again = next(engine.generate([prompt_of(5 + 4 * (i % 3), seed=i)], sampling, n=3, keys=[100 + i]))
        same(again, nodes)
    assert_idle(engine)


def test_generate_gives_paused_trajectories_too() -> None:
    sampling = Sampling(max_tokens=25, pause=lambda tokens, new: new == 5)
    [nodes] = engine_on().generate([PROMPT], sampling, n=3)
    assert [(len(node), node.finish) for node in nodes] == [(5, None)] * 3


def test_generate_without_keys_samples_anew_each_time() -> None:
    engine = engine_on()
    [one], [two] = (list(engine.generate([PROMPT], Sampling(max_tokens=12), n=2)) for _ in range(2))
    assert len({tuple(node.tokens) for node in [*one, *two]}) == 4


def test_generate_left_early_gives_everything_back() -> None:
    engine = engine_on()
    stream = engine.generate([PROMPT] * 8, KINDS["all"], n=2)
    next(stream)
    stream.close()
    assert_idle(engine)
    with pytest.raises(ValueError, match="n=0"):
        engine.generate([PROMPT], KINDS["plain"], n=0)
