"""Small steps run on one thread, larger ones on all; torch's setting is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import prompt_of, tiny_model

from ibtpo_engine import Engine, Sampling, threads
from ibtpo_engine.runner import Runner
from ibtpo_engine.threads import SMALL_STEP, threads_for


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("flops", "count"), [(SMALL_STEP - 1, 1), (SMALL_STEP, 2)])
def test_threads_of_a_step(flops: int, count: int) -> None:
    with pytest.raises(KeyError), threads_for(flops):
        assert torch.get_num_threads() == count
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_rows_of_a_step_decide_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of prompts that begin in this very step, too: most prompts take no more than one step."""
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    forward = Runner.forward

    def spy(self: Runner, rows: Any, planner: Any) -> Any:
        seen.append((len(rows.tokens), torch.get_num_threads()))
        return forward(self, rows, planner)

    monkeypatch.setattr(Runner, "forward", spy)
    monkeypatch.setattr(Runner, "is_native", False)
    monkeypatch.setattr(threads, "SMALL_STEP", 2 * 32 * sum(p.numel() for p in model.parameters()))
    engine = Engine(model, kv_tokens=1024, prefill_tokens=64)
    with engine.tree(prompt_of(100)) as tree, engine.tree(prompt_of(5)) as short:
        engine.extend(tree.root.fork(3), Sampling(max_tokens=4))
        assert seen == [(64, 2), (36, 2), (3, 1), (3, 1), (3, 1)]
        seen.clear()
        engine.extend(short.root.fork(), Sampling(max_tokens=1))
        assert seen == [(5, 1)]
        seen.clear()
        engine.score(tree.root, [np.arange(40) % 7])
        assert seen == [(39, 2)]  # of the last token only the log-prob is wanted
    assert torch.get_num_threads() == 2
