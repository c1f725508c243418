"""What every test gets: one thread (results never depend on it, times do), a fixed seed, and no wall-clock deadline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("ibtpo", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ibtpo")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
