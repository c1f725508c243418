"""Every Triton kernel compiles, ahead of time and without a GPU, for sm_80, sm_90, sm_100 and sm_120 at its shipped
tiles: no spilled registers (few on sm_120, and in float32 on sm_80), shared memory within the block's limit, that of
GeForce cards for sm_80 and sm_120, tensor-core instructions where there is a product.

By default what has come closest to a limit is compiled, sm_120 left out, in one process a core. IBTPO_AOT=full in the
environment compiles every head size and type for all; so should whoever changes a kernel or its tiles."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import starmap

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import torch
import triton
from triton_aot import SHARED_LIMIT, Built, compiled, launches
from triton_launches import advance, attention, behind, calls, draw, given, logprob, product, small

FULL = os.environ.get("IBTPO_AOT") == "full"
CAPABILITIES = (100, 90, 80, 120) if FULL else (100, 90, 80)  # those that take longest first
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Bytes a thread that the compilers of other versions of Triton spill at tiles of which 3.9's spills nothing; smaller
# tiles would make it nothing there too, and everything slower. 3.8 was seen at the default selection only.
OLDER_SPILLS = {
    ("forward", 80): 80,
    ("forward", 100): 80,
    ("backward_keys", 80): 16,
    ("backward_keys", 90): 24,
    ("backward_queries", 80): 56,
    ("backward_queries", 100): 112,
    ("partials", 80): 16,
    ("partials", 100): 8,
    ("row_stats", 90): 8,
}
SPILLS_38 = OLDER_SPILLS | {
    ("forward", 100): 176,
    ("backward_keys", 90): 200,
    ("backward_keys", 100): 72,
    ("backward_queries", 90): 48,
    ("backward_queries", 100): 264,
}
ALLOWED_SPILLS = {} if VERSION >= (3, 9) else SPILLS_38 if VERSION == (3, 8) else OLDER_SPILLS
# Of any compiler, on sm_80 in float32: smaller tiles would spill nothing, and read operands more often.
SPILLS_FP32 = {("backward_keys", "attention-D64-fp32"): 8, ("backward_queries", "attention-D64-fp32"): 8}
SPILLS_FP32 |= {("backward_queries", f"attention-D{head}-fp32"): 24 for head in (80, 96, 128)}
SPILLS_120 = 128  # bytes a thread, of any compiler: the tiles are those of sm_80, where registers are enough
PRODUCTS = {
    "forward": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"},
    "backward_keys": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"},
    "backward_queries": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"},
    "product": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"},
    "partials": {80: "mma.sync", 90: "mma.sync", 100: "mma.sync", 120: "mma.sync"},
}


def complaint(name: str, capability: int, kernel: str, built: Built) -> str | None:
    """What is wrong with a binary."""
    wrong = []
    allowed = SPILLS_120 if capability == 120 else ALLOWED_SPILLS.get((kernel, capability), 0)
    if capability == 80:
        allowed = max(allowed, SPILLS_FP32.get((kernel, name), 0))
    if built.spills > allowed:
        wrong.append(f"{built.spills} bytes spilled")
    if built.shared > SHARED_LIMIT[capability]:
        wrong.append(f"{built.shared} bytes shared")
    if kernel in PRODUCTS and not built.tensor_cores:
        wrong.append("no tensor-core instruction")
    too_low = "fp32" in name or "D256" in name  # tiles that a warp group's instruction does not fit
    if kernel in PRODUCTS and not too_low and PRODUCTS[kernel][capability] not in built.tensor_cores:
        wrong.append(f"{sorted(built.tensor_cores)} instead of {PRODUCTS[kernel][capability]}")
    return f"{name}, {kernel}, sm_{capability}, {built.registers} registers: {', '.join(wrong)}" if wrong else None


def test_kernels_fit_the_machine() -> None:
    jobs = [(capability, FULL, name) for capability in CAPABILITIES for name, _ in calls(capability, full=FULL)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [launch for job in pool.map(compiled, *zip(*jobs, strict=True)) for launch in job]
    kernels = {(capability, kernel) for _, capability, kernel, _ in found}
    assert len(kernels) == 23 * len(CAPABILITIES), sorted(kernels)
    complaints = list(filter(None, starmap(complaint, (launch for launch in found if launch[3] is not None))))
    assert not complaints, "\n".join(complaints)


def test_any_number_of_rows_takes_the_same_binaries() -> None:
    """Or a run, whose batches are of all sizes, would compile each kernel several times."""
    half = torch.bfloat16
    for call in (
        partial(attention, 64, half),
        partial(logprob, half, None),
        partial(product, half),
        partial(draw, half, 0.9),
        partial(given, half),
        partial(small, half),
        advance,
    ):
        found = [[launch.key for launch in launches(partial(call, rows=rows), 9)] for rows in (64, 1, 67)]
        assert found[0] == found[1] == found[2], call
    for few, many in ((1, 16), (64, 67)):  # a path of one split has no partial results
        first, second = ([launch.key for launch in launches(partial(behind, n, half), 9)] for n in (few, many))
        assert first == second, (few, many)


def test_products_and_sums_are_fused_whatever_triton_does_by_default() -> None:
    """Or results would change with Triton 3.10, whose default is another, and 3.9 would warn of that in every run."""
    made = [launch for _, call in calls(90, full=False) for launch in launches(call, 9)]
    assert len({launch.name for launch in made}) == 23
    assert {launch.name for launch in made if launch.options.get("enable_fp_fusion") is not True} == set()
