"""Runs `emulated_cuda_cases.py` in a process of its own: its plugin patches torch, and the suite must not see that.

So do runs on several emulated devices, in processes that end with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from adder_runs import difference, rows, saved, train, write_adder
from processes import run, time_limit

from ibtpo_kernels import dispatch

HERE = Path(__file__).parent


def test_the_cuda_branches_on_an_emulated_device() -> None:
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    plugins = ["-p", "emulated_cuda", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", *plugins, str(HERE / "emulated_cuda_cases.py")]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout


def _train_on_gpus(collective: str, *arguments: object) -> int:
    import emulated_gpus  # where Triton is missing it cannot be imported

    emulated_gpus.install()
    dispatch.triton_kernels = lambda: None  # type: ignore[assignment]
    code = train(*arguments, "--device", "cuda")
    assert collective in emulated_gpus.collectives
    return code


def test_two_processes_on_emulated_devices(tmp_path: Path) -> None:
    """Each on a device of its own, first in shares, then with copies: logged and saved is what one on a CPU does."""
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    here, there = tmp_path / "here", tmp_path / "there"
    begin = [*write_adder(tmp_path), "--loss.kl-coef", 0.1, "--gradient-checkpointing", "--engine.release", "always"]
    assert train(*begin, "--out", here, "--sampled-tokens", 250) == 0
    with time_limit(180):
        how = [*begin, "--out", there, "--sampled-tokens", 190, "--distributed", "fsdp"]
        run(2, _train_on_gpus, "c10d._reduce_scatter_base_.default", *how, logs=tmp_path / "fsdp")
        how = ["--resume", there, "--sampled-tokens", 250, "--distributed", "ddp"]
        run(2, _train_on_gpus, "c10d.allreduce_.default", *how, logs=tmp_path / "ddp")
    ours, theirs = rows(there), rows(here)
    assert [row["optimizer_steps"] for row in ours] == [0, 0, 2, 2]
    for name in ("loss", "reward", "grad_norm", "entropy", "kl_ref_k3", "tokens_sampled", "eff_rate"):
        found, expected = ([row.get(name) for row in logged] for logged in (ours, theirs))
        assert found[:2] == expected[:2] and found[2:] == pytest.approx(expected[2:], rel=5e-3, abs=1e-4), name
    assert difference(saved(there), saved(here)) < 1e-3
