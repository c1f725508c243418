# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""Sampling: token, its log-prob under the distribution sampled from and under the plain softmax, and the entropy.

    w_v = exp((z_v - max z) / temperature)         token = first v with  sum_{v' <= v, kept} w_v'  >  u * sum_kept w

`block_sums` reads the logits once and writes four numbers for each block of 4096 columns. From these, `draw`, a program
a row, finds the block that holds the token and reads only that block. u is Philox4x32-10 of the row's key, bit for bit
that of `ibtpo_kernels.philox`; weights and their sums are in double, as in the reference, so the same logits give the
same token.

A row with top-k or top-p first finds its boundary, the smallest key c with F(c) < goal, where F(c) is the number
(top-k) or the mass (top-p) of tokens above c, by bisecting the integer order of float32: at most 32 sweeps over the row
in L2, without exponentials in blocks that have no logit in the interval under test. The row keeps the tokens above c
and the first few at c, if they also pass min-p: z - max z >= temperature log(min_p).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibtpo_kernels.gpu.launch import FUSED, is_captured, on_device
from ibtpo_kernels.reference import log_of

_BLOCK = 4096
_NONE = tl.constexpr(2147483647)


@triton.jit
def _uniform(stream, position):
    """53 random bits as a double in [0, 1): ibtpo_kernels.philox.uniform."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x0, x1, _, _ = tl.philox(stream, low, high, low * 0, low * 0)
    a = (x0 >> 5).to(tl.float64)
    b = (x1 >> 6).to(tl.float64)
    return (a * 67108864.0 + b) * 1.1102230246251565e-16


@triton.jit
def _logits(row_ptr, cols, num_cols):
    """float32 logits, -inf past the vocabulary, and no negative zero."""
    return tl.load(row_ptr + cols, mask=cols < num_cols, other=float("-inf")).to(tl.float32) + 0.0


@triton.jit
def _weights(z, top, inverse):
    """exp((z - top) / temperature) in double."""
    return tl.exp((z.to(tl.float64) - top.to(tl.float64)) * inverse)


@triton.jit
def _order(z):
    """An int32 that orders as the float32 does."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_rows"])
def block_sums(
    logits_ptr, tops_ptr, sums_ptr, temperature_ptr, stride_row, stride_parameter, num_cols, num_blocks, num_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """max (NaN if any logit is NaN or inf), and the sums of e, of e (z - max) and of w over one block of one row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z = _logits(logits_ptr + row * stride_row, block * BLOCK + tl.arange(0, BLOCK), num_cols)
    top = tl.max(z, 0)
    bad = tl.max(((z != z) | (z == float("inf"))).to(tl.int32), 0)
    base = tl.where((top == float("-inf")) | (bad != 0), 0.0, top)
    x = z - base
    e = tl.exp(x)
    at = row * num_blocks + block
    tl.store(tops_ptr + at, tl.where(bad != 0, float("nan"), top))
    size = num_rows * num_blocks
    tl.store(sums_ptr + at, tl.sum(e.to(tl.float64), 0))
    tl.store(sums_ptr + size + at, tl.sum(tl.where(e > 0.0, e * x, 0.0).to(tl.float64), 0))
    temperature = tl.load(temperature_ptr + row * stride_parameter)
    if temperature > 0:
        tl.store(sums_ptr + 2 * size + at, tl.sum(_weights(z, base, 1.0 / temperature), 0))


@triton.jit
def _boundary(row_ptr, num_cols, top, inverse, low, high, goal, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(c, F(c)) for the smallest c in (low, high] with F(c) < goal; F(high) = 0 is known, F(low) >= goal assumed."""
    above = goal * 0.0
    while high - low > 1:
        middle = low + (high - low) // 2
        found = tl.zeros([BLOCK], tl.float64)
        for start in range(0, num_cols, BLOCK):
            z = _logits(row_ptr, start + tl.arange(0, BLOCK), num_cols)
            key = _order(z).to(tl.int64)
            between = (key > middle) & (key <= high)
            if BY_MASS:
                if tl.max(between.to(tl.int32), 0) > 0:
                    found += tl.where(between, _weights(z, top, inverse), 0.0)
            else:
                found += between.to(tl.float64)
        inside = tl.sum(found, 0)
        fits = above + inside < goal
        above = tl.where(fits, above + inside, above)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    return high, above


@triton.jit
def _kept(row_ptr, start, num_cols, top, floor, cut, ties, seen, BLOCK: tl.constexpr):
    """(logits of a block, whether each is kept, tokens at the boundary seen up to the block's end)."""
    cols = start + tl.arange(0, BLOCK)
    z = _logits(row_ptr, cols, num_cols)
    key = _order(z).to(tl.int64)
    at_cut = ((key == cut) & (cols < num_cols)).to(tl.int32)
    rank = seen + tl.cumsum(at_cut, 0) - at_cut
    kept = (key > cut) | ((at_cut != 0) & (rank < ties))
    kept &= (z.to(tl.float64) - top.to(tl.float64)) >= floor
    return z, kept & (cols < num_cols), seen + tl.sum(at_cut, 0)


@triton.jit
def _kept_mass(row_ptr, num_cols, top, inverse, floor, cut, ties, BLOCK: tl.constexpr):
    total = tl.zeros([1], tl.float64)
    seen = 0
    for start in range(0, num_cols, BLOCK):
        z, kept, seen = _kept(row_ptr, start, num_cols, top, floor, cut, ties, seen, BLOCK)
        if tl.max(kept.to(tl.int32), 0) > 0:
            total += tl.sum(tl.where(kept, _weights(z, top, inverse), 0.0), 0)
    return tl.sum(total, 0)


@triton.jit
def _find_kept(row_ptr, num_cols, top, inverse, floor, cut, ties, goal, BLOCK: tl.constexpr):
    """The first kept column whose cumulative weight exceeds `goal`; the last kept one if by rounding none does."""
    before = tl.zeros([1], tl.float64)
    token, last, seen = _NONE, 0, 0
    for start in range(0, num_cols, BLOCK):
        z, kept, seen = _kept(row_ptr, start, num_cols, top, floor, cut, ties, seen, BLOCK)
        if (token == _NONE) & (tl.max(kept.to(tl.int32), 0) > 0):
            cols = start + tl.arange(0, BLOCK)
            w = tl.where(kept, _weights(z, top, inverse), 0.0)
            sums = before + tl.cumsum(w, 0)
            token = tl.min(tl.where(kept & (w > 0.0) & (sums > goal), cols, _NONE), 0)
            last = tl.maximum(last, tl.max(tl.where(w > 0.0, cols, 0), 0))
            before += tl.sum(w, 0)
    return tl.where(token == _NONE, last, token)


@triton.jit
def _filter(row_ptr, num_cols, top, inverse, mass, top_k, top_p, BLOCK: tl.constexpr):
    """(cut, ties): the tokens whose key is above cut are kept, and the first `ties` at it."""
    cut, ties = tl.cast(-2147483648, tl.int64), num_cols
    high = _order(top).to(tl.int64)
    low = tl.cast(-2147483649, tl.int64)
    if (top_k > 0) & (top_k < num_cols):
        cut, above = _boundary(row_ptr, num_cols, top, inverse, low, high, top_k.to(tl.float64), False, BLOCK)
        ties = (top_k - above.to(tl.int64)).to(tl.int32)
        low = cut - 1
        mass = _kept_mass(row_ptr, num_cols, top, inverse, float("-inf"), cut, ties, BLOCK)
    if top_p < 1:
        goal = top_p * mass
        edge, above = _boundary(row_ptr, num_cols, top, inverse, low, high, goal, True, BLOCK)
        # of the tokens at the edge, all of weight w, the j-th is kept while above + j w < goal
        w = _weights(((edge ^ ((edge >> 63) & 0x7FFFFFFF)).to(tl.int32)).to(tl.float32, bitcast=True), top, inverse)
        count = tl.minimum(tl.ceil((goal - above) / w), 2147483647.0).to(tl.int32)
        ties = tl.where(edge == cut, tl.minimum(ties, count), count)
        cut = edge
    return cut, ties


@triton.jit
def _find(row_ptr, tops, masses, num_cols, top, inverse, goal, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """As `_find_kept` if all tokens are kept: the block from the blocks' masses, then the column within it."""
    blocks = tl.arange(0, BLOCKS)
    sums = tl.cumsum(masses, 0)
    last_block = tl.max(tl.where(masses > 0.0, blocks, 0), 0)
    block = tl.minimum(tl.min(tl.where((sums > goal) & (masses > 0.0), blocks, _NONE), 0), last_block)
    before = tl.sum(tl.where(blocks < block, masses, 0.0), 0)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    w = _weights(_logits(row_ptr, cols, num_cols), top, inverse)
    token = tl.min(tl.where((before + tl.cumsum(w, 0) > goal) & (w > 0.0), cols, _NONE), 0)
    return tl.where(token == _NONE, tl.max(tl.where(w > 0.0, cols, 0), 0), token)


@triton.jit
def _tops(tops_ptr, at, inside):
    """The blocks' maxima, the row's, and whether the row has a distribution."""
    tops = tl.load(tops_ptr + at, mask=inside, other=float("-inf"))
    top = tl.max(tl.where(tops == tops, tops, float("-inf")), 0)
    return tops, top, (tl.max((tops != tops).to(tl.int32), 0) == 0) & (top > float("-inf"))


@triton.jit
def _shares(tops, top):
    """(log, value) of the factor of a block's sums in those of the row, at temperature 1."""
    shift = tl.where(tops == float("-inf"), 0.0, tops.to(tl.float64) - top)
    return shift, tl.where(tops == float("-inf"), 0.0, tl.exp(shift))


@triton.jit
def _masses(tops, shift, inverse, masses_ptr, at, inside):
    """The blocks' weights, relative to the row's maximum."""
    masses = tl.load(masses_ptr + at, mask=inside, other=0.0)
    return tl.where(tops == float("-inf"), 0.0, masses * tl.exp(shift * inverse))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["logprob_ptr", "raw_ptr", "entropy_ptr"])
def draw(
    logits_ptr, keys_ptr, tops_ptr, sums_ptr, temperature_ptr, top_p_ptr, top_k_ptr, log_min_p_ptr, token_ptr,
    logprob_ptr, raw_ptr, entropy_ptr, stride_row, stride_temperature, stride_top_p, stride_top_k, stride_min_p,
    num_cols, num_blocks, num_rows, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """All four outputs of one row; token -1 and NaN if the row has no distribution."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    blocks = tl.arange(0, BLOCKS)
    inside, at, size = blocks < num_blocks, row * num_blocks + blocks, num_rows * num_blocks
    tops, top, fine = _tops(tops_ptr, at, inside)
    if not fine:
        tl.store(token_ptr + row, tl.cast(-1, tl.int64))
        tl.store(logprob_ptr + row, float("nan"))
        tl.store(raw_ptr + row, float("nan"))
        tl.store(entropy_ptr + row, float("nan"))
    else:
        shift, share = _shares(tops, top)
        sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
        means = tl.load(sums_ptr + size + at, mask=inside, other=0.0)
        total = tl.sum(sums * share, 0)
        mean = tl.sum((means + shift * sums) * share, 0) / total
        temperature = tl.load(temperature_ptr + row * stride_temperature)
        if temperature > 0:
            inverse = 1.0 / temperature
            masses = _masses(tops, shift, inverse, sums_ptr + 2 * size, at, inside)
            mass = tl.sum(masses, 0)
            u = _uniform(tl.load(keys_ptr + row * 2), tl.load(keys_ptr + row * 2 + 1))
            top_p, top_k = tl.load(top_p_ptr + row * stride_top_p), tl.load(top_k_ptr + row * stride_top_k)
            floor = temperature * tl.load(log_min_p_ptr + row * stride_min_p)
            if FILTERED and ((top_p < 1) | ((top_k > 0) & (top_k < num_cols)) | (floor > float("-inf"))):
                cut, ties = _filter(row_ptr, num_cols, top, inverse, mass, top_k, top_p, BLOCK)
                mass = _kept_mass(row_ptr, num_cols, top, inverse, floor, cut, ties, BLOCK)
                token = _find_kept(row_ptr, num_cols, top, inverse, floor, cut, ties, u * mass, BLOCK)
            else:
                token = _find(row_ptr, tops, masses, num_cols, top, inverse, u * mass, BLOCK, BLOCKS)
            z = tl.load(row_ptr + token).to(tl.float64)
            logprob = (z - top) * inverse - tl.log(mass)
        else:
            first = tl.min(tl.where(tops == top, blocks, _NONE), 0)
            cols = first * BLOCK + tl.arange(0, BLOCK)
            token = tl.min(tl.where(_logits(row_ptr, cols, num_cols) == top, cols, _NONE), 0)
            z = tl.load(row_ptr + token).to(tl.float64)
            logprob = z * 0.0
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(logprob_ptr + row, logprob.to(tl.float32))
        tl.store(raw_ptr + row, ((z - top) - tl.log(total)).to(tl.float32))
        tl.store(entropy_ptr + row, (tl.log(total) - mean).to(tl.float32))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["logprob_ptr", "raw_ptr"])
def score(
    logits_ptr, rows_ptr, targets_ptr, tops_ptr, sums_ptr, temperature_ptr, logprob_ptr, raw_ptr, stride_row,
    num_blocks, num_rows, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The log-probs of `draw`, without filters, for one given token of one row; NaN if the row has no distribution."""
    edge = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + edge)
    blocks = tl.arange(0, BLOCKS)
    inside, at, size = blocks < num_blocks, row * num_blocks + blocks, num_rows * num_blocks
    tops, top, fine = _tops(tops_ptr, at, inside)
    if fine:
        shift, share = _shares(tops, top)
        total = tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0) * share, 0)
        inverse = 1.0 / tl.load(temperature_ptr)
        mass = tl.sum(_masses(tops, shift, inverse, sums_ptr + 2 * size, at, inside), 0)
        z = tl.load(logits_ptr + row * stride_row + tl.load(targets_ptr + edge)).to(tl.float64)
        tl.store(logprob_ptr + edge, ((z - top) * inverse - tl.log(mass)).to(tl.float32))
        tl.store(raw_ptr + edge, ((z - top) - tl.log(total)).to(tl.float32))
    else:
        tl.store(logprob_ptr + edge, float("nan"))
        tl.store(raw_ptr + edge, float("nan"))


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


def _parameter(value: float | Tensor, dtype: torch.dtype, logits: Tensor) -> tuple[Tensor, int]:
    """A sampling parameter on the device, and its stride between rows; a kernel argument would not keep its double.

    A graph under capture gets a tensor of its own, which it fills, since a cached one may be gone at replay.
    """
    if isinstance(value, Tensor):
        return value.to(dtype).contiguous(), 1
    make = _constant.__wrapped__ if is_captured(logits) else _constant
    return make(value, dtype, logits.device), 0


def _log(min_p: float | Tensor) -> float | Tensor:
    """log(min_p), on the device if min_p is a tensor."""
    return min_p.double().log() if isinstance(min_p, Tensor) else log_of(min_p)


def _plain(top_p: float | Tensor, top_k: int | Tensor, min_p: float | Tensor) -> bool:
    """Whether it is known on the host that no row is filtered."""
    if any(isinstance(x, Tensor) for x in (top_p, top_k, min_p)):
        return False
    return bool(top_p >= 1 and top_k == 0 and min_p == 0)


def _block_sums(logits: Tensor, temperatures: Tensor, stride_temperature: int) -> tuple[Tensor, Tensor]:
    """(maxima [T, blocks], sums [3, T, blocks]), see `block_sums`."""
    num_rows, num_cols = logits.shape
    num_blocks = triton.cdiv(num_cols, _BLOCK)
    tops = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    sums = torch.empty(3, num_rows, num_blocks, dtype=torch.float64, device=logits.device)
    block_sums[(num_rows, num_blocks)](
        logits, tops, sums, temperatures, logits.stride(0), stride_temperature, num_cols, num_blocks, num_rows,
        BLOCK=_BLOCK, **FUSED, num_warps=8,
    )  # fmt: skip
    return tops, sums


def sampled_logprob(logits: Tensor, rows: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As `ibtpo_kernels.sampled_logprob`, by the kernels of `sample`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    logprob, logprob_raw = torch.empty(2, len(rows), dtype=torch.float32, device=logits.device).unbind()
    if not len(rows):
        return logprob, logprob_raw
    temperatures, _ = _parameter(temperature, torch.float64, logits)
    with on_device(logits):
        tops, sums = _block_sums(logits, temperatures, 0)
        score[(len(rows),)](
            logits, rows.contiguous(), targets.contiguous(), tops, sums, temperatures, logprob, logprob_raw,
            logits.stride(0), tops.shape[1], len(logits), BLOCKS=triton.next_power_of_2(tops.shape[1]), **FUSED,
            num_warps=8,
        )  # fmt: skip
    bad = logprob_raw.isnan()
    if bool(bad.any()):
        row = int(rows[bad.nonzero()[0, 0]])
        raise ValueError(f"sampled_logprob: row {row} has no distribution (NaN or inf logits)")
    return logprob, logprob_raw


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor,
    min_p: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ibtpo_kernels.sample`. Checking rows waits for the device; under graph capture a bad row gives token -1."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, num_cols = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprob, logprob_raw, entropy = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device).unbind()
    if not num_rows:
        return token, logprob, logprob_raw, entropy
    num_blocks = triton.cdiv(num_cols, _BLOCK)
    temperatures, stride_temperature = _parameter(temperature, torch.float64, logits)
    top_ps, stride_top_p = _parameter(top_p, torch.float64, logits)
    top_ks, stride_top_k = _parameter(top_k, torch.int64, logits)
    log_min_ps, stride_min_p = _parameter(_log(min_p), torch.float64, logits)
    with on_device(logits):
        tops, sums = _block_sums(logits, temperatures, stride_temperature)
        draw[(num_rows,)](
            logits, keys.contiguous(), tops, sums, temperatures, top_ps, top_ks, log_min_ps, token, logprob,
            logprob_raw, entropy, logits.stride(0), stride_temperature, stride_top_p, stride_top_k, stride_min_p,
            num_cols, num_blocks, num_rows, BLOCK=_BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
            FILTERED=not _plain(top_p, top_k, min_p), **FUSED, num_warps=8, maxnreg=255,
        )  # fmt: skip
    if not is_captured(logits):
        _raise_bad_row(token)
    return token, logprob, logprob_raw, entropy


def _raise_bad_row(token: Tensor) -> None:
    if int(token.min()) < 0:
        raise ValueError(f"sample: row {int((token < 0).nonzero()[0])} has no distribution (NaN or inf logits)")
