"""What a GPU is told, where there is none: that tensors lie beside each other, and how graphs share their memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ibtpo_engine import Sampling
from ibtpo_engine import slots as slots_module
from ibtpo_engine.capture import CudaCapture, capture_for
from ibtpo_engine.slots import Slots
from ibtpo_kernels import dispatch, reference


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_sampling_is_told_lies_where_the_logits_do(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(2, 4)
    for start in (3, 5):
        slots.begin(slots.take([0]), start=start, before=1, limit=9, stream=start, sampling=Sampling(top_p=0.5))
    seen: list[Tensor] = []

    def sample_shaped(logits: Tensor, keys: Tensor, shapes: Any, **settings: Tensor) -> tuple[Tensor, ...]:
        seen.extend([keys, *settings.values()])
        return tuple(torch.zeros(len(logits)) for _ in range(4))

    monkeypatch.setattr(slots_module, "sample_shaped", sample_shaped)
    list(slots.draw(np.arange(2), torch.empty(2, 7, device=device)))
    assert [tensor.device.type for tensor in seen] == [device] * 5


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 6), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_before_ampere_runs_plain_torch(
    capability: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, device = ModuleType("triton"), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(dispatch, "_too_old", dispatch._too_old.__wrapped__)
    dispatch._say_missing.cache_clear()
    assert dispatch.active_backend(device) == ("triton" if serves else "reference")
    x: Any = SimpleNamespace(device=device, is_cuda=True, is_cpu=False, dtype=torch.float32)
    with nullcontext() if serves else pytest.warns(RuntimeWarning, match="GPU before sm_80"):
        assert dispatch.implementation(x) is (kernels if serves else reference)
    if not serves:
        monkeypatch.setattr("ibtpo_engine.capture.find_spec", lambda name: name)
        model: Any = SimpleNamespace(device=device)
        with pytest.raises(ValueError, match="sm_80"):
            capture_for(model)


def test_a_graph_keeps_the_settings_that_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the next call may be given up before a graph that would read it is replayed."""
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    module, logits = import_module("ibtpo_kernels.gpu.sample"), torch.zeros(1, 4)
    kept, _ = module._parameter(0.7, torch.float64, logits)
    assert module._parameter(0.7, torch.float64, logits)[0] is kept
    monkeypatch.setattr(module, "is_captured", lambda x: True)
    first, again = (module._parameter(0.7, torch.float64, logits)[0] for _ in range(2))
    assert first is not kept and again is not first and torch.equal(first, kept)


def test_heads_that_lie_too_far_apart_for_32_bits_are_brought_together() -> None:
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    rows_dense = import_module("ibtpo_kernels.gpu.launch").rows_dense
    fused = torch.empty(1 << 20, 3, 32, 128, device="meta")[:, 1]
    assert rows_dense(fused) is fused
    by_head = torch.empty(32, 1 << 20, 128, device="meta").transpose(0, 1)
    assert rows_dense(by_head).is_contiguous()


class Graphs:
    """`torch.cuda` as far as a capture sees it. A pool of memory lives as long as one of its graphs."""

    def __init__(self) -> None:
        self.alive: Counter[int] = Counter()
        self.ended: set[int] = set()
        self.handles = 0
        self.streams: list[Any] = []  # that work was put on, captured or not
        self.modes: set[bool] = set()  # of inference, where captures begin and end

    def graph_pool_handle(self) -> int:
        self.handles += 1
        return self.handles

    def stream(self, stream: Any) -> Any:
        self.streams.append(stream)
        return nullcontext()

    def graph(self, graph: Any, pool: int, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local", "rewards in other threads may use the GPU"
        assert pool not in self.ended, "nothing can be captured into a pool that has ended"
        self.streams.append(stream)
        self.alive[pool] += 1
        graph.ends = lambda: self.leave(pool)
        return self.capture()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """As torch does, which makes tensors at both ends."""
        self.modes.add(torch.is_inference_mode_enabled())
        yield
        self.modes.add(torch.is_inference_mode_enabled())

    def leave(self, pool: int) -> None:
        self.alive[pool] -= 1
        if not self.alive[pool]:
            self.ended.add(pool)


class Graph:
    replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1

    def __del__(self) -> None:
        self.ends()


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@torch.inference_mode()
def test_graphs_share_a_stream_and_memory_as_long_as_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Graphs()
    for name, value in {
        "graph_pool_handle": cuda.graph_pool_handle,
        "graph": cuda.graph,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": cuda.stream,
        "device": lambda device: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture, steps = CudaCapture(torch.device("cuda")), []

    def step() -> None:
        assert torch.is_inference_mode_enabled()
        steps.append(1)

    for kept in (1, 3):
        replays = [capture(step) for _ in range(kept)]
        replays += [capture(step)]
        del replays[0]  # one is forgotten, the others keep the pool
        replays += [capture(step)]
        replays[0]()
        del replays
        gc.collect()
    assert cuda.handles == 2 and cuda.ended == {1, 2}
    assert len(set(cuda.streams)) == 1, "one workspace of the matrix libraries"
    assert cuda.modes == {False}, "graphs of others, captured and replayed outside of it, share tensors with these"
    assert len(steps) == 2 * (3 + 5) and Graph.replayed == 2
