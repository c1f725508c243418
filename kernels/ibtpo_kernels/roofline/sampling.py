"""Problems of sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ibtpo_kernels import ops
from ibtpo_kernels.roofline import formulas
from ibtpo_kernels.roofline.peers import flashinfer
from ibtpo_kernels.roofline.peers.find import compiled
from ibtpo_kernels.roofline.problem import Contender, Inputs, Outputs, Prepare, Problem, in_pass

# Outputs: token [B], log-prob of it under the full softmax [B], entropy [B].


def _ours(top_p: float, top_k: int) -> Prepare:
    def function(inputs: Inputs) -> Outputs:
        token, _, raw, entropy = ops.sample(inputs.leaves[0], inputs.rest[0], top_p=top_p, top_k=top_k)
        return token, raw, entropy

    return in_pass(function, "forward")


def _torch_sample(top_p: float, top_k: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Softmax, a sort if there are filters, and multinomial."""

    def draw(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        kept = p
        if top_p < 1.0 or top_k:
            sorted_p, order = p.topk(top_k or p.shape[-1], -1)
            sorted_p = sorted_p / sorted_p.sum(-1, keepdim=True)
            before = sorted_p.cumsum(-1) - sorted_p
            kept = torch.zeros_like(p).scatter_(-1, order, sorted_p.masked_fill(before >= top_p, 0.0))
        token = torch.multinomial(kept, 1)
        return token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).sum(-1)

    return draw


def _by_torch(top_p: float, top_k: int, *, compiles: bool) -> Prepare:
    draw = _torch_sample(top_p, top_k)
    fast = compiled(draw) if compiles else draw
    return in_pass(lambda inputs: fast(inputs.leaves[0]), "forward")


_SIGMAS = 6.0  # a mean of log-probs may be so many standard errors off


def _comparable(top_p: float, top_k: int) -> Callable[[Inputs, Outputs], Outputs]:
    """Comparable outputs, as tokens differ from draw to draw: entropy plus the log-prob's error, entropy, a score.

    The score is 1 if every token is among the kept ones and, without filters, their mean log-prob is as expected up to
    chance; it grows with the deviation.
    """

    def comparable(inputs: Inputs, outputs: Outputs) -> Outputs:
        token, raw, entropy = outputs
        assert token is not None
        log_p = inputs.leaves[0].float().log_softmax(-1)
        p, of_token = log_p.exp(), log_p.gather(1, token.long()[:, None])
        exact = -(p * log_p).sum(-1)
        off = _share_dropped(log_p, of_token, top_p, top_k)
        if top_p == 1.0 and top_k == 0:
            variance = (p * (log_p + exact[:, None]).square()).sum(-1)
            error = (of_token[:, 0] + exact).sum().abs() / variance.sum().sqrt().clamp_min(1e-6)
            off = off + (error / _SIGMAS - 1).clamp_min(0)
        return None if raw is None else exact + raw - of_token[:, 0], entropy, 1 + off

    return comparable


def _share_dropped(log_p: Tensor, of_token: Tensor, top_p: float, top_k: int) -> Tensor:
    """The share of rows whose token top-k, or top-p of what that leaves, would have dropped."""
    more_likely = log_p > of_token + 1e-5  # [B, V]; tolerates rounding
    dropped = torch.zeros(len(log_p), dtype=torch.bool, device=log_p.device)
    total = torch.ones(len(log_p), device=log_p.device)
    if top_k:
        dropped |= more_likely.sum(-1) >= top_k
        total = log_p.topk(top_k, -1).values.exp().sum(-1)
    if top_p < 1.0:
        dropped |= (log_p.exp() * more_likely).sum(-1) >= (top_p + 1e-4) * total
    return dropped.float().mean()


def sample(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    is_quick: bool = False,
) -> Problem:
    """One token a row, with its log-prob and the entropy."""

    def draw(where: torch.device, generator: torch.Generator) -> Inputs:
        logits = torch.randn(rows, vocabulary, device=where, generator=generator).to(dtype)
        keys = torch.randint(2**62, (rows, 2), device=where, generator=generator)
        return Inputs((logits,), (keys,))

    same = _comparable(top_p, top_k)
    contenders = [
        Contender("ibtpo", lambda: _ours(top_p, top_k), kind="ours", comparable=same),
        Contender("eager", lambda: _by_torch(top_p, top_k, compiles=False), comparable=same),
        Contender("torch.compile", lambda: _by_torch(top_p, top_k, compiles=True), comparable=same),
    ]
    if device.type == "cuda":
        contenders.append(
            Contender(
                "FlashInfer sampling",
                lambda: flashinfer.sampling(top_p, top_k),
                note="token only; float32 logits",
                comparable=same,
            )
        )
    kept = (f" top-k {top_k}" if top_k else "") + (f" top-p {top_p}" if top_p < 1 else "")
    work = formulas.sample(rows, vocabulary, dtype.itemsize)
    return Problem(
        op="sample",
        shape=f"B{rows} V{vocabulary}{kept}",
        dtype=dtype,
        which="forward",
        work=work,
        draw=draw,
        contenders=tuple(contenders),
        working_set=work.bytes,
        is_quick=is_quick,
    )
