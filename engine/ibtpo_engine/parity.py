"""Log-probs with the same bits wherever they are computed: `parity="bitwise"`.

A row goes through the model in many batches: alone in a decode step, with siblings, in a prefilled chunk, again after a
preemption, and packed with whole trees for training. With "fast", each of these uses the fastest order of sums, and the
results differ by rounding. With "bitwise", every sum has one order and only the row's own terms:

    products       `batch_invariant_linear`, the head included
    attention      page by page in the order of depth: `tree_decode`, in training `tree_attention_by_depth`
    log-prob       of one row of logits, by the arithmetic of `sample`

The rest (norms, rotation, gate, sums of two) goes row by row anyway. The trainer then computes exactly the log-probs
that the engine sampled with, so their ratio is 1. docs/engine.md says what this costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeGuard, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ibtpo_kernels import (
    active_backend,
    batch_invariant_linear,
    fastest_linear,
    linear_sampled_logprob,
    ours_is_faster,
    plan_by_depth,
    tree_attention_by_depth,
)

Parity = Literal["fast", "bitwise"]
PackedAttend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v of a packed forest -> out
Project = Callable[[nn.Module, Tensor], Tensor]

SERVED = (torch.float32, torch.bfloat16)


def check_parity(
    parity: str, *, dtype: torch.dtype, device: torch.device, projections: Iterable[nn.Module] = ()
) -> None:
    """Raise unless this promise can be kept here.

    Args:
        parity: "fast" promises nothing.
        dtype, device: of the model.
        projections: its linear layers, as far as known.

    Raises:
        ValueError: `parity` is unknown, or equal bits are not guaranteed on this device, type or backend, or in one of
            the layers.
    """
    if parity == "fast":
        return
    if parity != "bitwise":
        raise ValueError(f"parity: {parity!r} is not one of {', '.join(map(repr, get_args(Parity)))}")
    chosen = active_backend(device)
    if chosen not in ("cpu", "triton"):
        raise ValueError(
            f"parity='bitwise' needs the compiled CPU kernels or the Triton kernels; here ops run on {chosen!r} "
            f"({device}), whose sums depend on the batch. Use one of those, or parity='fast'"
        )
    if dtype not in SERVED:
        raise ValueError(
            f"parity='bitwise' supports {' and '.join(map(str, SERVED))}, not {dtype}; use one of them, or 'fast'"
        )
    for layer in projections:
        _checked(layer)


def plain_project(layer: nn.Module, x: Tensor) -> Tensor:
    """A projection by the module itself, or by our product if that is faster."""
    if _is_plain(layer) and ours_is_faster(x, layer.weight):
        return fastest_linear(x, layer.weight, layer.bias)
    out: Tensor = layer(x)
    return out


def exact_project(layer: nn.Module, x: Tensor) -> Tensor:
    """A projection each row of which has the same bits in any batch.

    Raises:
        ValueError: the module is not a plain linear layer, so the order of its sums is unknown.
    """
    linear = _checked(layer)
    return batch_invariant_linear(x, linear.weight, linear.bias)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def _checked(layer: nn.Module) -> nn.Linear:
    if not _is_plain(layer):
        raise ValueError(
            f"parity='bitwise' runs plain linear layers, not {type(layer).__name__} or one with a hook; merge what was "
            "added into the weights, or use parity='fast'"
        )
    return layer


def project_for(parity: Parity) -> Project:
    """How the projections of a model run."""
    return exact_project if parity == "bitwise" else plain_project


def by_depth(end: Tensor, *, page_size: int) -> PackedAttend:
    """Attention over a packed forest in the order of the engine's pages; the layout is made once, for all layers."""
    layout = plan_by_depth(end, page_size=page_size)
    return lambda q, k, v: tree_attention_by_depth(q, k, v, layout)


def sampler_logprob(
    hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probs that a `parity="bitwise"` engine reports of these tokens, without filters; no autograd.

    Args:
        hidden: [T, H], from `Model.packed(..., parity="bitwise")`.
        head: [V, H].
        rows, targets: int64 [E], as in `linear_logprob`.
        temperature: above 0.

    Returns:
        float32 [E] as `Node.logprob` and as `Node.logprob_raw`.
    """
    kept = float(np.float32(temperature))  # as the engine keeps it
    return linear_sampled_logprob(hidden, head, rows, targets, temperature=kept)
