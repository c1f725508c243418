"""Capturing steps on a GPU, to repeat each at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch

from ibtpo_engine.model import Model

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Runs a step, any number of times, and returns a function that repeats it."""


def capture_for(model: Model) -> Capture:
    """The `Capture` for this model.

    Raises:
        ValueError: they cannot be captured.
    """
    if model.device.type != "cuda":
        raise ValueError(f"cuda_graphs: the model is on {model.device}; move it to a GPU, or turn cuda_graphs off")
    if find_spec("triton") is None:
        raise ValueError("cuda_graphs: Triton is missing; install ibtpo[gpu] (Linux), or turn cuda_graphs off")
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        raise ValueError("cuda_graphs: the Triton kernels need a GPU of sm_80 (Ampere) or later; turn cuda_graphs off")
    return CudaCapture(model.device)


class CudaCapture:
    """Captures steps as CUDA graphs, which share one memory pool, since only one is replayed at a time.

    A pool ends with its last graph, and nothing more can be captured into it: then a new one is begun.

    All steps are captured on one stream of our own: matrix libraries keep a workspace for each stream they have seen,
    and torch's default capture stream lies on the first GPU that anything was captured on. Other threads, such as a
    reward's, may use the GPU meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._memory: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # of this pool, while they are in use

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # compiles kernels and initializes libraries outside of the capture
                step()
            current.wait_stream(self._stream)
            if not self._graphs:
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Outside of inference mode: the first capture makes the tensors that torch's generator of the GPU keeps for
            # all graphs, and torch 2.10 fills them at each later capture and replay, the caller's own included.
            captured = torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            )
            with torch.inference_mode(False), captured, torch.inference_mode():
                step()
            self._graphs.add(graph)
        return graph.replay
