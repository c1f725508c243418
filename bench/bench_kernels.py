"""Every op and its peers on the CPU, one group a problem: `make bench`, or pytest bench/bench_kernels.py.

The problems are those of the roofline command (`ibtpo_kernels.roofline.catalog`), which takes the contenders in turns,
compares them with the machine's limits and writes bench/results; use this suite to compare two commits of one op:

make bench SUITES=bench/bench_kernels.py ARGS="-k tree_decode --benchmark-autosave"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ibtpo_kernels.roofline.catalog import problems
from ibtpo_kernels.roofline.problem import Contender, Problem, Unavailable, verify

CPU = torch.device("cpu")
SLOW_TO_START = ("torch.compile", "FlexAttention")  # compiled at the first call; measured by the roofline command
SLOW = ("TRL", "Liger")  # a second a call; once is enough, on linear_logprob
CASES = [
    pytest.param(problem, contender, id=f"{problem}-{contender.who}")
    for problem in problems(CPU)
    for contender in problem.contenders
    if not contender.who.startswith(SLOW_TO_START)
    and not (problem.op == "policy_head" and contender.who.startswith(SLOW))
]


@pytest.mark.parametrize(("problem", "contender"), CASES)
def test_kernel(benchmark: Any, problem: Problem, contender: Contender) -> None:
    """Time a contender, after checking that it computes the same as ours."""
    inputs = problem.draw(CPU, torch.Generator().manual_seed(0))
    try:
        prepare = contender.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    own = next((c for c in problem.contenders if c.kind == "ours"), None)
    with problem.context():
        run = prepare(inputs)
        if own is not None and problem.which != "plan":
            verify(problem, contender, run, own.load(), inputs)
        benchmark.group = str(problem)
        benchmark.extra_info |= {"flops": problem.work.flops, "bytes": problem.work.bytes, "kind": contender.kind}
        benchmark(run)
