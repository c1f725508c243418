"""Imported by tests of Triton kernels: where there is neither CUDA nor Triton's interpreter it skips them."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'ibtpo[gpu]'")
