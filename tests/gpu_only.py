"""Imported by tests that need a CUDA device, which `emulated_cuda` may emulate: where there is none it skips them."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the emulated device
LARGE = (
    not INTERPRETED and os.environ.get("IBTPO_SMALL") != "1"
)  # small shapes only: under a checker that takes its time

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'ibtpo[gpu]'")
