"""Every problem that is measured: the one list that the roofline command and the suites in bench/ read.

Ops, and the problems of an op, are in order of importance, so that a run that ends early has measured what matters
most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from ibtpo_kernels.roofline import heads, parity, sampling, small
from ibtpo_kernels.roofline.attention import mask_plan, tree_attention
from ibtpo_kernels.roofline.decode import plan_decode, tree_decode
from ibtpo_kernels.roofline.problem import Pass, Problem
from ibtpo_kernels.roofline.trees import DecodeTree, binary, chain, documents, fan, ib_tree

FP32, BF16 = torch.float32, torch.bfloat16
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")
_T = TypeVar("_T")

CPU_DECODE = {
    "B32 prefix1024 suffix64": (DecodeTree((1, 32), (1024, 64)), (8, 8, 64)),
    "B32 unshared1088": (DecodeTree((32,), (1088,)), (8, 8, 64)),
    "B256 prefix64 suffix32": (DecodeTree((1, 256), (64, 32)), (4, 2, 32)),
}

CPU_LOGPROB = ((512, 256, 32768), (2048, 64, 32))

GPU_DECODE = {
    "B64 prefix4096 suffix512": DecodeTree((1, 64), (4096, 512)),
    "B16 prefix1024 suffix512": DecodeTree((1, 16), (1024, 512)),
    "B64 unshared4096": DecodeTree((64,), (4096,)),
    "1-4-16-64-256 x 256": DecodeTree((1, 4, 16, 64, 256), (256,) * 5),
    "FastTree 1-4-16-64-256-1024": DecodeTree((1, 4, 16, 64, 256, 1024), (256, 16, 256, 64, 32, 256)),
    "binary 1-2-..-128-1024 x 16": DecodeTree((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9),
}
GPU_HEADS = ((16, 8, 128), (32, 8, 128), (12, 2, 128), (16, 8, 64))
GPU_TREES: dict[str, Callable[[int], Tensor]] = {
    "chain": chain,
    "prompt+16": lambda tokens: fan(tokens // 2, 16, tokens // 32),
    "IBTree(4,9,1,1)": ib_tree,
    "documents": documents,
    "binary16": binary,
}
GPU_LOGPROB = (
    (8192, 4096, 151936),
    (8192, 2048, 151936),
    (8192, 1024, 151936),
    (1937, 4096, 50257),
    (8192, 4096, 129920),
    (16384, 4096, 128256),
)


def problems(device: torch.device | str, *, quick: bool = False) -> list[Problem]:
    """The problems for a kind of device, in order of importance; `quick`: a small one of each op."""
    found = _on_gpu() if torch.device(device).type == "cuda" else _on_cpu()
    return [p for p in found if p.is_quick or not quick]


def names() -> list[str]:
    """Every op that is measured."""
    return list(dict.fromkeys(p.op for p in (*_on_cpu(), *_on_gpu())))


def _first(values: Iterable[_T]) -> Iterable[tuple[bool, _T]]:
    return ((i == 0, value) for i, value in enumerate(values))


def _on_cpu() -> list[Problem]:
    return [*_cpu_decode(), *_cpu_attention(), *_cpu_heads(), *_cpu_sampling(), *_cpu_small(), *_cpu_parity()]


def _cpu_decode() -> list[Problem]:
    found = []
    for name, (tree, shape) in CPU_DECODE.items():
        for dtype in (FP32, BF16):
            found.append(tree_decode(name, tree, shape, dtype, _CPU, is_quick=name.startswith("B256")))
    for is_first, rows in _first((32, 256)):
        tree = DecodeTree((1, rows), (1024, 64))
        found.append(plan_decode(f"B{rows} prefix1024 suffix64", tree, (4, 2, 32), _CPU, is_quick=is_first))
    return found


def _cpu_attention() -> list[Problem]:
    found = []
    for name, (end, shape) in _cpu_trees().items():
        for dtype in (FP32, BF16):
            for which in _passes("forward", "both"):
                quick = name == "prompt+32" and dtype is FP32
                found.append(tree_attention(name, end, shape, dtype, which, _CPU, is_quick=quick))
    found.append(mask_plan("prompt+16", _cpu_trees()["prompt+16"][0], _CPU))
    return found


def _cpu_trees() -> dict[str, tuple[Tensor, tuple[int, int, int]]]:
    """(subtree ends, (Hq, Hkv, D)) by name."""
    return {
        "chain": (chain(1024), (8, 8, 64)),
        "prompt+16": (fan(512, 16, 32), (8, 8, 64)),
        "IBTree(4,9,1,1)": (ib_tree(1024), (8, 8, 64)),
        "prompt+32": (fan(64, 32, 32), (4, 2, 32)),
    }


def _cpu_heads() -> list[Problem]:
    found = []
    for sizes in CPU_LOGPROB:
        is_small = sizes is CPU_LOGPROB[1]
        for dtype in (BF16, FP32):
            quick = is_small and dtype is FP32
            for which in _passes("forward", "both"):
                found.append(heads.linear_logprob(sizes, dtype, which, is_quick=quick, compiles=not is_small))
    for loss in ("policy gradient", "cross-entropy"):
        for sizes, dtype in ((CPU_LOGPROB[0], BF16), (CPU_LOGPROB[0], FP32), (CPU_LOGPROB[1], FP32)):
            if loss == "policy gradient" or dtype is FP32:
                is_small = sizes is CPU_LOGPROB[1]
                found.append(heads.policy_head(sizes, dtype, loss, is_quick=is_small, compiles=not is_small))
    return found


def _cpu_sampling() -> list[Problem]:
    return [
        sampling.sample(64, 32, FP32, _CPU, is_quick=True),
        sampling.sample(64, 32768, FP32, _CPU),
        sampling.sample(64, 32768, FP32, _CPU, top_p=0.95, top_k=50),
    ]


def _cpu_small() -> list[Problem]:
    found: list[Problem] = []
    for dtype in (FP32, BF16):
        quick = dtype is FP32
        found += [
            small.rms_norm(256, 1024, dtype, "forward", is_quick=quick),
            small.rms_norm(2048, 1024, dtype, "both"),
            small.add_rms_norm(256, 1024, dtype, "forward", is_quick=quick),
            small.add_rms_norm(2048, 1024, dtype, "both"),
            small.silu_mul(256, 3072, dtype, "forward", is_quick=quick),
            small.silu_mul(2048, 3072, dtype, "both"),
            small.rope(2048, 8, 64, dtype),
            small.rope(256, 4, 32, dtype, is_quick=quick),
            small.append_kv(256, 4, 64, dtype, is_quick=quick),
            small.rope_append(32, 8, 4, 64, dtype),
            small.rope_append(256, 8, 4, 64, dtype, is_quick=quick),
        ]
    for rows in (32, 256, 1):
        found += [small.batch_invariant_linear(rows, 1024, 4096, dtype) for dtype in (FP32, BF16)]
    found.append(small.batch_invariant_linear(256, 96, 256, FP32, is_quick=True))
    return found


def _cpu_parity() -> list[Problem]:
    found = []
    trees = _cpu_trees()
    for dtype in (FP32, BF16):
        is_wide = dtype is FP32
        for name, quick in (("prompt+16", False), ("prompt+32", is_wide)):
            found.append(parity.in_order_of_decode(name, *trees[name], dtype, _CPU, is_quick=quick))
        for sizes in CPU_LOGPROB:
            found.append(parity.of_hidden(sizes, dtype, is_quick=is_wide and sizes is CPU_LOGPROB[1]))
        found.append(parity.of_logits(64, 32768, dtype, is_quick=is_wide))
    return found


def _passes(*which: Pass) -> tuple[Pass, ...]:
    return which


def _on_gpu() -> list[Problem]:
    """In bfloat16: the shapes of the targets first, then other shapes of the same ops."""
    return [*_gpu_attention(*_HEADLINE), *_gpu_decode(GPU_HEADS[:1]), *_gpu_heads(), *_gpu_small(), *_gpu_more()]


_HEADLINE = (16384, GPU_HEADS[0])


def _gpu_attention(tokens: int, shape: tuple[int, int, int]) -> list[Problem]:
    found = []
    for which in _passes("forward", "backward"):
        for name, tree in GPU_TREES.items():
            quick = name == "prompt+16" and (tokens, shape) == _HEADLINE
            found.append(tree_attention(name, tree(tokens), shape, BF16, which, _CUDA, is_quick=quick))
    if (tokens, shape) == _HEADLINE:
        found.append(mask_plan("prompt+16", GPU_TREES["prompt+16"](tokens), _CUDA))
    return found


def _gpu_decode(shapes: Iterable[tuple[int, int, int]]) -> list[Problem]:
    found = []
    for shape in shapes:
        for name, tree in GPU_DECODE.items():
            quick = shape == GPU_HEADS[0] and name.startswith("B16")
            found.append(tree_decode(name, tree, shape, BF16, _CUDA, is_quick=quick))
    if GPU_HEADS[0] in shapes:
        for is_first, name in _first(("B64 prefix4096 suffix512", "FastTree 1-4-16-64-256-1024")):
            found.append(plan_decode(name, GPU_DECODE[name], GPU_HEADS[0], _CUDA, is_quick=is_first))
    return found


def _gpu_heads() -> list[Problem]:
    found = []
    for sizes in GPU_LOGPROB[:1]:
        found += [heads.linear_logprob(sizes, BF16, which) for which in _passes("both", "forward")]
        found += [heads.policy_head(sizes, BF16, loss) for loss in ("policy gradient", "cross-entropy")]
    for sizes in GPU_LOGPROB[1:]:
        quick = sizes[2] == 50257
        found += [heads.linear_logprob(sizes, BF16, which, is_quick=quick) for which in _passes("both", "forward")]
    found.append(heads.policy_head((1937, 4096, 50257), BF16, "policy gradient", is_quick=True))
    return found


def _gpu_small() -> list[Problem]:
    vocabulary = 151936
    return [
        sampling.sample(64, vocabulary, BF16, _CUDA, is_quick=True),
        sampling.sample(256, vocabulary, BF16, _CUDA),
        sampling.sample(64, vocabulary, BF16, _CUDA, top_p=0.95, top_k=50),
        small.rms_norm(8192, 4096, BF16, "forward", is_quick=True),
        small.rms_norm(8192, 4096, BF16, "both"),
        small.add_rms_norm(8192, 4096, BF16, "forward", is_quick=True),
        small.add_rms_norm(8192, 4096, BF16, "both"),
        small.silu_mul(8192, 12288, BF16, "forward", is_quick=True),
        small.silu_mul(8192, 12288, BF16, "both"),
        small.rope(16384, 16, 128, BF16, is_quick=True),
        small.rope_append(256, 16, 8, 128, BF16, is_quick=True),
        small.rope_append(16384, 16, 8, 128, BF16),
        small.append_kv(16384, 8, 128, BF16, is_quick=True),
        small.batch_invariant_linear(256, 4096, 4096, BF16, is_quick=True),
        small.batch_invariant_linear(8192, 4096, 4096, BF16),
        small.batch_invariant_linear(1, 4096, 4096, BF16),
        parity.in_order_of_decode("prompt+16", fan(2048, 16, 128), GPU_HEADS[0], BF16, _CUDA, is_quick=True),
        parity.of_hidden((1024, 1024, 32768), BF16, is_quick=True),
        parity.of_logits(64, vocabulary, BF16, is_quick=True),
    ]


def _gpu_more() -> list[Problem]:
    """Other lengths, heads and head sizes."""
    found: list[Problem] = []
    for tokens in (4096, 65536):
        found += _gpu_attention(tokens, GPU_HEADS[0])
    found += _gpu_decode(GPU_HEADS[1:])
    for shape in GPU_HEADS[1:]:
        found += _gpu_attention(_HEADLINE[0], shape)
    for end, shape in ((fan(512, 16, 32), (16, 8, 64)), (ib_tree(4096), (16, 8, 128))):
        found += [tree_attention("fp32 tree", end, shape, FP32, which, _CUDA) for which in _passes("forward", "both")]
    return found
