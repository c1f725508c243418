"""Every Triton kernel compiles, ahead of time and without a GPU, for sm_80, sm_90 and sm_100 at its shipped tiles:
no spilled registers, shared memory within the block's limit, tensor-core instructions where there is a product.

IBTPO_AOT=full in the environment compiles every head size and type as well, in some four minutes on one core."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import triton
from triton_aot import SHARED_LIMIT, build, launches
from triton_launches import calls

PRODUCTS = {
    "forward": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"},
    "backward_keys": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"},
    "backward_queries": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"},
    "product": {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"},
    "partials": {80: "mma.sync", 90: "mma.sync", 100: "mma.sync"},
}
# float32 heads of 256: three tf32 products of 256 terms hold more operands than there are registers
# (older compilers than Triton 3.9's leave a few bytes elsewhere too)
OTHER_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 80
SPILLS = {"attention-D256-fp32": 160, "decode-D256-fp32": 112}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_the_machine(capability: int) -> None:
    seen, kernels = [], set()
    for name, call in calls(full=os.environ.get("IBTPO_AOT") == "full"):
        for launch in launches(call, capability // 10):
            kernels.add(launch.name)
            if launch.key in seen:
                continue
            seen.append(launch.key)
            built = build(launch, capability)
            where = f"{name}, {launch.name}, sm_{capability}: {built.registers} registers"
            assert built.spills <= SPILLS.get(name, OTHER_SPILLS), f"{where}, {built.spills} bytes spilled"
            assert built.shared <= SHARED_LIMIT[capability], f"{where}, {built.shared} bytes shared"
            if launch.name in PRODUCTS:
                assert built.tensor_cores, f"{where}: no tensor-core instruction"
                small = name.endswith("fp32") or "D256" in name  # tiles too low for a warp group's instruction
                if not small:
                    assert PRODUCTS[launch.name][capability] in built.tensor_cores, where
    assert len(kernels) == 21, sorted(kernels)
