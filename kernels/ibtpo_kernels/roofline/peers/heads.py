"""Log-prob and entropy of a linear head, by peers: (hidden, weight, targets) -> (logprob [T], entropy [T] or None).

A peer has one target a row, and so have the problems. Peers that return a loss return minus the log-prob.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ibtpo_kernels.roofline.peers.find import bare_packages, compiled, module, needs_cuda
from ibtpo_kernels.roofline.problem import Unavailable

LogProb = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

TRL_CHUNK = 16384  # vocabulary columns a tile, in the range of TRL's trainers


def eager() -> LogProb:
    """The textbook way: logits in the inputs' dtype, softmax in float32."""
    return _eager


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def torch_compile() -> LogProb:
    """The same, fused by torch.compile."""
    return compiled(_eager)


def trl() -> LogProb:
    """TRL's chunked log-prob: library products a tile, and one pass over it, in Triton on a GPU, in torch elsewhere.

    Its backward gets a context that gathers sharded heads from `trl.trainer.utils`. If that module cannot be imported,
    because dependencies of trainers are missing, it is replaced by a stand-in that gathers nothing.
    """
    function = module("trl.kernels.chunked_logprob", "TRL >= 1.15 (trl)").ChunkedLogProbFunction
    if "trl.trainer.utils" not in sys.modules:
        try:
            __import__("trl.trainer.utils")
        except Exception:  # whatever a trainer's imports raise
            stand_in = ModuleType("trl.trainer.utils")
            stand_in.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
            bare_packages("trl", "trl.trainer", distribution="trl")
            sys.modules[stand_in.__name__] = stand_in

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        chunk = min(TRL_CHUNK, len(weight))
        out = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))
        return out[0], out[1]

    return logprob


def liger_scaled() -> LogProb:
    """Liger's fused linear scaled cross-entropy, with the kernels it chooses on this device."""
    front = module("liger_kernel.ops.fused_linear_scaled_cross_entropy", "Liger-Kernel (liger-kernel)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if front._resolve_implementation(device) is front._FusedLinearPPOFallbackFunction:
        raise Unavailable("has no kernel of its own here; its torch loop is measured")
    return _scaled(front.LigerFusedLinearScaledCrossEntropyFunction.apply, front=True)


def liger_scaled_fallback() -> LogProb:
    """The same, by its loop over 512 rows in torch, which runs without its CUTLASS extra, or off sm_90."""
    front = module("liger_kernel.ops.fused_linear_scaled_cross_entropy", "Liger-Kernel (liger-kernel)")
    return _scaled(front._FusedLinearPPOFallbackFunction.apply, front=False)


def _scaled(apply: Callable[..., tuple[Tensor, Tensor]], *, front: bool) -> LogProb:
    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        tiles = (1,) if front else ()  # m_tiles_per_cluster
        nll, entropy = apply(hidden, weight, targets, 1.0, -100, *tiles, True)
        return -nll, entropy

    return logprob


def liger_cross_entropy() -> LogProb:
    """Liger's fused linear cross-entropy, a loss a token."""
    needs_cuda("Liger's fused linear cross-entropy")
    ops = module("liger_kernel.ops.fused_linear_cross_entropy", "Liger-Kernel (liger-kernel)")
    apply = ops.LigerFusedLinearCrossEntropyFunction.apply

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        loss = apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0]
        return -loss, None

    return logprob


def liger_sum() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's fused linear cross-entropy, summed: its gradients are made in the forward, in 6 T H V."""
    needs_cuda("Liger's fused linear cross-entropy")
    ops = module("liger_kernel.ops.fused_linear_cross_entropy", "Liger-Kernel (liger-kernel)")
    apply = ops.LigerFusedLinearCrossEntropyFunction.apply

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total: Tensor = apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]
        return total

    return loss


def cut_cross_entropy() -> LogProb:
    """Apple's cut cross-entropy, a loss a token; its default filter leaves out gradients below 16-bit precision."""
    needs_cuda("cut-cross-entropy")
    linear_cross_entropy = module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none"), None

    return logprob


def verl() -> LogProb:
    """verl's Triton kernel, loaded without its parent packages, which import Ray and much else."""
    needs_cuda("verl's kernel")
    bare_packages("verl", "verl.utils", "verl.utils.kernel", distribution="verl")
    function = module("verl.utils.kernel.linear_cross_entropy", "verl").linear_cross_entropy
    kernels = module("verl.utils.kernel.kernels", "verl")
    if not kernels.HAVE_TRITON:
        raise RuntimeError("verl found no Triton")

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        found, entropy = function(hidden, weight, targets, 1.0, "none", None)
        return found, entropy

    return logprob


def products(hidden: Tensor, weight: Tensor) -> Tensor:
    """The matrix product of the forward alone."""
    return hidden @ weight.t()


def gradient_products(hidden: Tensor, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two products of the backward alone; `logits` stand for their gradient, which has their shape and dtype."""
    return logits @ weight, torch.mm(logits.t(), hidden)
