"""parity="bitwise" on Triton kernels: a token's numbers are the same to the last bit, however its row was computed.

On a GPU as it is. In the interpreter (see `test_gpu`) `dot` is numpy's, whose rows know their place in a tile; here it
is replaced by one whose rows do not, as a matrix instruction's. What is shown there is that nothing else of a row's
result hangs on the batch, and that sampler and trainer run the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import grow, prompt_of, tiny_model
from gpu_only import DEVICE, INTERPRETED, LARGE
from kernel_cases import paged
from test_parity import equal, trained_logprobs

import ibtpo_kernels as K
from ibtpo_engine import Engine, Model, Node, Sampling, Tree

pytestmark = pytest.mark.gpu
NEW = 40 if LARGE else 5
PROMPT = prompt_of(70 if LARGE else 18)
SAMPLING = Sampling(max_tokens=NEW, temperature=0.7)
DTYPES = [torch.float32, *([] if INTERPRETED else [torch.bfloat16])]


def rows_apart(builder: Any, a: Any, b: Any, d: Any, precision: Any, exact: Any) -> Any:
    """`create_dot` of the interpreter, each element summed by itself with k ascending."""
    from triton.runtime.interpreter import TensorHandle

    products = a.data.astype(d.data.dtype)[:, :, None] * b.data.astype(d.data.dtype)[None]
    return TensorHandle(np.add.reduce(products, axis=1) + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", rows_apart)
    with K.backend("triton"):
        yield


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(hidden=104 if LARGE else 24, dtype=request.param).to(DEVICE)


def bitwise(model: Model, kv_tokens: int = 4096, **options: Any) -> Engine:
    engine = Engine(model, kv_tokens=kv_tokens, parity="bitwise", **options)
    assert not engine.scheduler.runner.is_native
    return engine


def nodes_of(engine: Engine) -> list[Node]:
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        return tree.nodes()


def test_cold_is_warm_is_chunked(model: Model) -> None:
    engine = bitwise(model)
    cold = nodes_of(engine)
    equal(nodes_of(engine), cold)
    assert engine.stats()["reused"] > 0
    equal(nodes_of(bitwise(model, prefill_tokens=7)), cold)


def test_alone_is_batched_and_preempted(model: Model) -> None:
    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(3 if LARGE else 2)

    prompts, new = [prompt_of(14, seed=i) for i in range(2)], 40 if LARGE else 4  # a second page from the third on
    grown, preemptions = [], []
    for pages, branches in ((200, 64), (17 if LARGE else 5, 64), (200, 1)):
        engine = bitwise(model, 16 * pages, max_branches=branches)
        trees = dict(engine.run(search, prompts, Sampling(max_tokens=new)))
        grown.append([node for i in range(2) for node in trees[i].nodes()])
        preemptions.append(engine.stats()["preemptions"])
    equal(grown[1], grown[0])
    equal(grown[2], grown[0])
    assert preemptions[0] == 0 < preemptions[1]


def test_captured_steps_are_plain_ones(model: Model) -> None:
    def branches(engine: Engine) -> list[Node]:
        with engine.tree(PROMPT, key=3) as tree:
            return engine.extend(tree.root.fork(2), SAMPLING)

    engine = bitwise(model, cuda_graphs=True)
    equal(branches(engine), branches(bitwise(model)))
    graphs = engine.scheduler.runner.graphs
    assert graphs is not None
    assert graphs.replayed >= NEW - 1


@pytest.mark.parametrize("temperature", [0.7, *([1.0] if LARGE else [])])
def test_the_trainer_finds_the_samplers_log_probs(model: Model, temperature: float) -> None:
    engine = bitwise(model)
    sampling = Sampling(max_tokens=NEW, temperature=temperature)
    trees = [grow(engine, prompt_of(n, seed=n), sampling, key=n) for n in (5, 18)]
    with torch.device(DEVICE):
        sampled, trained = trained_logprobs(model, trees, temperature, "bitwise")
    assert sampled.shape[1] >= 6 * NEW
    assert torch.equal(sampled, trained.cpu())


@pytest.mark.parametrize("vocabulary", [50, 5000, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_given_token_has_the_numbers_it_was_drawn_with(vocabulary: int, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    keys = torch.arange(12, device=DEVICE).view(6, 2)
    for temperature in (1.0, 0.7, 1.3):
        temperatures = torch.full((6,), temperature, dtype=torch.float64, device=DEVICE)  # as the engine gives them
        token, logprob, raw, _ = K.sample(logits, keys, temperature=temperatures)
        rows = torch.tensor([3, 0, 5, 1, 2, 4, 3], device=DEVICE)
        found, found_raw = K.sampled_logprob(logits, rows, token[rows], temperature=temperature)
        assert torch.equal(found, logprob[rows])
        assert torch.equal(found_raw, raw[rows])


def test_a_given_token_of_a_row_without_a_distribution_is_refused() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 4999] = float("nan")
    index = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="row 1 has no distribution"):
        K.sampled_logprob(logits, index, index)
    fine = K.sampled_logprob(logits, index[:1], index[:1])
    expected = torch.full((1,), -float(np.log(5000)), device=DEVICE)
    torch.testing.assert_close(fine, (expected, expected))


@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
def test_a_uniform_plan_has_one_tile_for_all(dtype: torch.dtype) -> None:
    """A query among 40 that share its pages, and alone; the plain plan gives it another tile there."""
    from ibtpo_kernels.gpu import configs
    from ibtpo_kernels.gpu.work import host_work

    table, rows, lengths, num_pages = paged([300] * 40, [17] * 40, 16)  # more than a split is shared
    q = torch.randn(40, 4, 16).to(DEVICE, dtype)
    k, v = (torch.randn(num_pages, 16, 2, 16).to(DEVICE, dtype) for _ in range(2))
    table, rows, lengths = (x.to(DEVICE) for x in (table, rows, lengths))
    for uniform in (False, True):
        plan = K.plan_decode(table, rows, lengths, uniform=uniform)
        tiles = configs.decode_rows(2, 16, 2, uniform=plan.uniform)
        assert host_work(plan, 2, *tiles).has_wide is not uniform
    whole = K.tree_decode(q, k, v, plan)
    for i in (0, 17, 39):
        alone = K.plan_decode(table, rows[i : i + 1], lengths[i : i + 1], uniform=True)
        assert torch.equal(K.tree_decode(q[i : i + 1], k, v, alone), whole[i : i + 1])
