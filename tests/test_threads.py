"""Small steps run on one thread, larger ones on all; torch's setting is as before afterwards."""

import pytest
import torch

from ibtpo_engine.threads import SMALL_STEP, threads_for


@pytest.mark.parametrize(("flops", "threads"), [(SMALL_STEP - 1, 1), (SMALL_STEP, 2)])
def test_threads_of_a_step(flops, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), threads_for(flops):
            assert torch.get_num_threads() == threads
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
