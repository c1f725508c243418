"""sample: the right distribution, the right kept set, the right log-probs, and the same tokens on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels.philox import philox4x32, uniform

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"temperature": 1e-3},
    {"top_p": 0.8},
    {"top_k": 5},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.6},
    {"top_k": 10**6, "top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.0, "min_p": 0.5},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
]


def keys(count: int, stream: int = 7) -> Tensor:
    return torch.stack((torch.full((count,), stream), torch.arange(count)), -1)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_known_answers(word: int, expected: list[int]) -> None:
    """The vectors published with Random123."""
    assert philox4x32(torch.full((1, 4), word), torch.full((1, 2), word)).tolist() == [expected]


def test_uniform_is_53_bits_of_philox() -> None:
    assert uniform(torch.zeros(1, 2, dtype=torch.int64)).item() == (
        ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    )
    u = uniform(keys(100_000, stream=-3))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean().item() - 0.5) < 4 / math.sqrt(12 * 100_000)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 11, 256, 1000, 5003])
def test_backends_draw_the_same_tokens(vocabulary: int, parameters: dict[str, Any]) -> None:
    logits = 3 * torch.randn(64, vocabulary)
    logits[:, ::3] = logits[:, ::3].round()  # ties
    results = []
    for backend in BACKENDS:
        with K.backend(backend):
            results.append(K.sample(logits, torch.randint(-(2**62), 2**62, (64, 2), generator=_fixed()), **parameters))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for x, y in zip(other[1:], results[0][1:], strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "parameters", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str
)
def test_frequencies_follow_the_distribution(backend: str, parameters: dict[str, Any]) -> None:
    """Chi-square with 40,000 draws at fixed keys; the bound is 6 standard deviations above the mean."""
    logits, draws = torch.linspace(-2, 2, 9), 40_000
    p = (logits.double() / parameters.get("temperature", 1.0)).softmax(-1)
    by_weight = p.flip(0)  # logits ascend
    if "top_k" in parameters:
        by_weight[parameters["top_k"] :] = 0
    if "top_p" in parameters:
        by_weight[1:][by_weight.cumsum(-1)[:-1] >= parameters["top_p"]] = 0
    by_weight[by_weight < parameters.get("min_p", 0) * by_weight[0]] = 0
    p = by_weight.flip(0) / by_weight.sum()
    with K.backend(backend):
        tokens, logprob, *_ = K.sample(logits.expand(draws, -1), keys(draws), **parameters)
    counts = torch.bincount(tokens, minlength=9)
    kept = p > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - draws * p).square()[kept] / (draws * p[kept])).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 6 * math.sqrt(2 * degrees)
    torch.testing.assert_close(logprob.double(), p.log()[tokens], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_logprob_and_entropy_ignore_the_parameters(backend: str) -> None:
    logits = 2 * torch.randn(50, 33)
    log_p = logits.double().log_softmax(-1)
    with K.backend(backend):
        token, _, raw, entropy = K.sample(logits, keys(50), temperature=0.6, top_p=0.5, top_k=7)
    torch.testing.assert_close(raw.double(), log_p.gather(1, token[:, None])[:, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_keeps_the_shortest_prefix_that_reaches_the_mass(backend: str) -> None:
    """Four equal tokens: mass 0.5 takes exactly the two of lowest index, any more takes a third."""
    logits = torch.zeros(2000, 4)
    with K.backend(backend):
        assert set(K.sample(logits, keys(2000), top_p=0.5)[0].tolist()) == {0, 1}
        assert set(K.sample(logits, keys(2000), top_p=0.51)[0].tolist()) == {0, 1, 2}
        assert set(K.sample(logits, keys(2000), top_p=1e-9)[0].tolist()) == {0}
        assert set(K.sample(logits, keys(2000), top_k=3, top_p=0.4)[0].tolist()) == {0, 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(backend: str) -> None:
    """Weights 1, 1/2, 1/4, 1/8 at temperature 1, their squares at temperature 1/2; top-k and top-p cut further."""
    logits = -math.log(2) * torch.arange(4.0).expand(2000, -1)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"min_p": 0.2}, 3),
        ({"min_p": 0.3}, 2),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.1, "temperature": 0.5}, 2),
        ({"min_p": 0.2, "top_k": 2}, 2),
        ({"min_p": 0.2, "top_k": 4}, 3),
        ({"min_p": 0.2, "top_p": 0.5}, 1),
        ({"min_p": 0.3, "top_p": 0.9}, 2),  # top-p alone: 3
    ]
    with K.backend(backend):
        for parameters, kept in cases:
            token, logprob, *_ = K.sample(logits, keys(2000), **parameters)
            assert set(token.tolist()) == set(range(kept)), parameters
            w = 0.5 ** (torch.arange(float(kept)) / parameters.get("temperature", 1.0))
            torch.testing.assert_close(logprob, (w / w.sum()).log()[token], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_p_at_the_very_limit(backend: str) -> None:
    """z - max z == temperature log(min_p) is kept: by every backend, whatever its exp rounds to."""
    logits = torch.tensor([0.0, -1.0, -2.0, -3.0]).expand(60, -1) / 2
    for row in (math.exp(-1.0), torch.full((60,), math.exp(-1.0), dtype=torch.float64)):
        with K.backend(backend):
            token, *_ = K.sample(logits, keys(60), min_p=row)
        assert set(token.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_high_temperature_draws_no_impossible_token(backend: str) -> None:
    logits = torch.full((2000, 300), -torch.inf)
    logits[:, 5], logits[:, 7] = 0.0, -3e4
    with K.backend(backend):
        assert set(K.sample(logits, keys(2000), temperature=1e3)[0].tolist()) == {5}
        assert set(K.sample(logits, keys(2000), temperature=1e5)[0].tolist()) == {5, 7}


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_first_of_equals_with_logprob_zero(backend: str) -> None:
    with K.backend(backend):
        token, logprob, raw, _ = K.sample(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), keys(1), temperature=0)
    assert token.item() == 1
    assert logprob.item() == 0
    assert raw.item() < 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_per_row_equal_parameters_per_call(backend: str) -> None:
    logits = torch.randn(3, 40)
    temperature, top_p, top_k = torch.tensor([0.0, 0.5, 1.5]), torch.tensor([1.0, 0.7, 0.9]), torch.tensor([0, 9, 0])
    min_p = torch.tensor([0.5, 0.0, 0.25])
    with K.backend(backend):
        together = K.sample(logits, keys(3), temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        for b in range(3):
            row = slice(b, b + 1)
            alone = K.sample(
                logits[row],
                keys(3)[row],
                temperature=temperature[b].item(),
                top_p=top_p[b].item(),
                top_k=int(top_k[b]),
                min_p=min_p[b].item(),
            )
            assert all(torch.equal(x[row], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_notice_its_batch(backend: str) -> None:
    logits = torch.randn(33, 500)
    with K.backend(backend):
        together = K.sample(logits, keys(33), top_p=0.9)
        torch.set_num_threads(2)
        alone = K.sample(logits[20:21], keys(33)[20:21], top_p=0.9)
    assert all(torch.equal(x[20:21], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens_are_never_drawn(backend: str) -> None:
    logits = torch.full((3000, 40), -torch.inf)
    logits[:, 17], logits[:, 23] = 0.0, 1.0
    with K.backend(backend):
        token, logprob, raw, entropy = K.sample(logits, keys(3000))
    assert set(token.tolist()) == {17, 23}
    for x in (logprob, raw, entropy):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_is_named(backend: str, bad: float) -> None:
    logits = torch.randn(5, 30)
    logits[3, 29] = bad
    with K.backend(backend):
        with pytest.raises(ValueError, match="sample: row 3 has no distribution"):
            K.sample(logits, keys(5))
        logits[3] = -torch.inf
        with pytest.raises(ValueError, match="sample: row 3 has no distribution"):
            K.sample(logits, keys(5))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be in \[0, inf\)"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"min_p": torch.tensor([0.5, math.inf])}, r"min_p has a row that is not in \[0, 1\]"),
        ({"top_p": torch.tensor([0.5, 2.0])}, "top_p has a row"),
        ({"temperature": torch.ones(3)}, r"temperature is .* or \[2\]"),
    ],
)
def test_errors_name_the_parameter(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K.sample(torch.randn(2, 9), keys(2), **parameters)


def test_an_empty_batch() -> None:
    assert [len(x) for x in K.sample(torch.randn(0, 9), keys(0))] == [0, 0, 0, 0]
