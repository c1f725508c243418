"""The short way of a call on the CPU, tensors straight into C++: it does what the long way does, or declines."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_kernels import cpu, dispatch

direct: Any = cpu.direct
pytestmark = pytest.mark.skipif(direct is None, reason="the compiled module, or torch's C interface, is missing")
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(call: Call) -> Any:
    name, args, kwargs = call
    return getattr(K, name)(*args, **kwargs)


def long_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "direct", None)
        assert dispatch.direct() is None
        return run(call)


def decode_problem() -> dict[str, Any]:
    table = torch.tensor([[0, 2, -1], [0, 1, 3]], dtype=torch.int32)
    lengths = torch.tensor([20, 40], dtype=torch.int32)
    fused = torch.randn(2, 8, 12)
    return {
        "q": fused[:, :4],
        "k": fused[:, 4:6],
        "v": fused[:, 6:],
        "cos": torch.rand(2, 6),
        "sin": torch.rand(2, 6),
        "pages": torch.randn(2, 5, 16, 2, 12),
        "slots": torch.tensor([35, -1]),
        "plan": K.plan_decode(table, torch.arange(2, dtype=torch.int32), lengths),
        "weight": torch.nn.Parameter(torch.randn(12)),
    }


def append(p: dict[str, Any], **changes: Any) -> Call:
    p = {**p, **changes}
    return "append_kv", (p["k"], p["v"], *p["pages"], p["slots"]), {}


def rotate(p: dict[str, Any], **changes: Any) -> Call:
    p = {**p, "q_weight": p["weight"], "k_weight": None, **changes}
    args = (p["q"], p["k"], p["v"], p["cos"], p["sin"], *p["pages"], p["slots"])
    return "rope_append", args, {"q_weight": p["q_weight"], "k_weight": p["k_weight"], "eps": 1e-5}


def decode(p: dict[str, Any], **changes: Any) -> Call:
    p = {**p, "q": p["q"].contiguous(), "scale": None, **changes}
    return "tree_decode", (p["q"], *p["pages"], p["plan"]), {"scale": p["scale"]}


def draw(**parameters: Any) -> Call:
    logits = parameters.pop("logits", torch.randn(3, 50))
    return "sample", (logits, parameters.pop("keys", torch.arange(6).view(3, 2))), parameters


def half(problem: dict[str, Any]) -> dict[str, Any]:
    """What the kernels store in bf16."""
    stored = {name: problem[name].bfloat16() for name in ("q", "k", "v", "pages")}
    return {**problem, **stored, "weight": problem["weight"].detach().bfloat16()}


P = decode_problem()
H = half(P)
X = torch.randn(3, 5, 24)
W = torch.randn(24)
SERVED: list[Call] = [
    append(P),
    rotate(P),
    rotate(P, k_weight=P["weight"], slots=torch.tensor([-1, 79])),
    rotate(P, q_weight=None, q=P["q"].contiguous(), k=P["k"].contiguous()),
    rotate(P, **{name: P[name][:0] for name in ("q", "k", "v", "cos", "sin", "slots")}),
    decode(P),
    decode(P, scale=0.25),
    ("rms_norm", (X, torch.nn.Parameter(torch.randn(24))), {"eps": 1e-5}),
    ("rms_norm", (X[:0], torch.randn(24)), {"eps": 1e-5}),
    ("add_rms_norm", (X, X + 1, W), {"eps": 1e-5}),
    ("rope", (X, torch.rand(3, 12), torch.rand(3, 12)), {}),
    ("silu_mul", (X, X + 1), {}),
    append(H),
    decode(H),
    rotate(H, k_weight=H["weight"]),
    ("rms_norm", (X.bfloat16(), W.bfloat16()), {"eps": 1e-5}),
    ("add_rms_norm", (X.bfloat16(), X.bfloat16(), W.bfloat16()), {"eps": 1e-5}),
    ("rope", (X.bfloat16(), torch.rand(3, 12), torch.rand(3, 12)), {}),
    ("silu_mul", (X.bfloat16(), X.bfloat16()), {}),
    draw(logits=torch.randn(3, 50).bfloat16(), top_p=0.8),
    ("silu_mul", (X[0, :, :7], X[1, :, 9:16]), {}),
    ("silu_mul", (torch.tensor(2.0), torch.tensor(3.0)), {}),
    draw(),
    draw(temperature=0, top_p=0.5, top_k=4, min_p=1),
    draw(
        temperature=torch.tensor([0.0, 1.0, 2.0]),
        top_p=torch.rand(3).double().clamp(1e-3),
        top_k=torch.tensor([0, 9, 4]),
    ),
    draw(min_p=torch.rand(3), top_k=torch.arange(3, dtype=torch.int32)),
]
NOT_SERVED: list[Call] = [  # layouts and types that only the long way knows
    append(P, k=P["k"].transpose(1, 2).contiguous().transpose(1, 2)),
    rotate(P, cos=P["cos"].double(), sin=P["sin"].double()),
    rotate(P, slots=torch.tensor([[35, 0], [-1, 0]])[:, 0]),
    decode(P, q=P["q"]),
    ("rms_norm", (X.transpose(0, 1), torch.randn(24)), {"eps": 1e-5}),
    ("rms_norm", (X.double(), torch.randn(24).double()), {"eps": 1e-5}),
    ("add_rms_norm", (X, X.transpose(0, 1).contiguous().transpose(0, 1), W), {"eps": 1e-5}),
    ("rms_norm", (X.half(), W.half()), {"eps": 1e-5}),
    ("rope", (X, torch.rand(12, 3).t(), torch.rand(3, 12)), {}),
    ("silu_mul", (X, X.transpose(0, 1).contiguous().transpose(0, 1)), {}),
    draw(logits=torch.randn(50, 3).t()),
    draw(logits=torch.randn(3, 50).double()),
]
WRONG: list[Call] = [
    append(P, slots=torch.tensor([80, 0])),
    append(P, slots=torch.tensor([-2, 0])),
    append(P, slots=torch.tensor([0, 1], dtype=torch.int32)),
    append(P, v=P["v"][:1]),
    append(P, pages=torch.randn(2, 5, 16, 2, 10)),
    append(P, pages=torch.randn(2, 5, 16, 2, 24)[..., ::2]),
    rotate(P, slots=torch.tensor([0, 80])),
    rotate(P, sin=P["sin"][:1]),
    rotate(P, k=P["k"][:, :1]),
    rotate(P, k=P["k"].to(torch.float64)),
    rotate(P, q_weight=torch.randn(11)),
    rotate(P, pages=(P["pages"][0], P["pages"][1][:3])),
    decode(P, q=torch.randn(3, 4, 12)),
    decode(P, q=torch.randn(2, 3, 12)),
    decode(P, q=torch.randn(2, 4, 10)),
    decode(P, pages=torch.randn(2, 5, 8, 2, 12)),
    decode(P, pages=torch.randn(2, 3, 16, 2, 12)),  # the plan needs page 3
    ("rms_norm", (X, torch.randn(23)), {"eps": 1e-5}),
    ("rms_norm", (X.long(), torch.randn(24)), {"eps": 1e-5}),
    ("rms_norm", (X.bfloat16(), W), {"eps": 1e-5}),
    ("add_rms_norm", (X, X[:2], W), {"eps": 1e-5}),
    ("add_rms_norm", (X, X.bfloat16(), W), {"eps": 1e-5}),
    append(P, pages=H["pages"]),
    rotate(H, q_weight=P["weight"]),
    ("rope", (X[..., :23], torch.rand(3, 11), torch.rand(3, 11)), {}),
    ("rope", (X, torch.rand(2, 12), torch.rand(3, 12)), {}),
    ("silu_mul", (X, X[:, :, :23]), {}),
    ("silu_mul", (X, X.to("meta")), {}),
    draw(logits=torch.full((3, 50), torch.nan)),
    draw(logits=torch.randn(3, 0)),
    draw(keys=torch.arange(3)),
    draw(temperature=-1.0),
    draw(temperature=torch.tensor([1.0, torch.nan, 1.0])),
    draw(top_p=0),
    draw(top_p=torch.rand(2)),
    draw(top_k=torch.tensor([1, -1, 1])),
    draw(min_p=1.5),
]


def served(call: Call) -> bool:
    """Whether the short way alone does it."""
    done: list[object] = []

    class Watch:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def note(*args: Any) -> Any:
                done.append(getattr(direct, name)(*args))
                return done[-1]

            return note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "direct", Watch())
        try:
            run(call)
        except ValueError:
            assert done == [None]
    return done != [None]


def flat(result: Any) -> list[Tensor]:
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("call", SERVED, ids=lambda call: call[0])
def test_it_serves_what_the_long_way_does(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(call)
    pages = [P["pages"], H["pages"]]
    before = [x.clone() for x in pages]
    theirs, written = flat(long_way(call, monkeypatch)), [x.clone() for x in pages]
    for x, y in zip(pages, before, strict=True):
        x.copy_(y)
    ours = flat(run(call))
    assert all(torch.equal(x, y) for x, y in zip(pages, written, strict=True))
    for x, y in zip(ours, theirs, strict=True):
        assert (x.dtype, x.shape, x.stride(), x.device) == (y.dtype, y.shape, y.stride(), y.device)
        assert torch.equal(x, y)


@pytest.mark.parametrize("call", NOT_SERVED, ids=lambda call: call[0])
def test_it_leaves_what_it_does_not_know_to_the_long_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not served(call)
    for x, y in zip(flat(run(call)), flat(long_way(call, monkeypatch)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("call", WRONG, ids=lambda call: call[0])
def test_what_is_wrong_is_said_by_the_long_way_and_nothing_is_written(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = P["pages"].clone()
    assert not served(call)
    with pytest.raises((ValueError, TypeError)) as expected:
        long_way(call, monkeypatch)
    with pytest.raises(type(expected.value)) as found:
        run(call)
    assert str(found.value) == str(expected.value)
    assert torch.equal(P["pages"], before)


def test_only_plain_tensors_are_read() -> None:
    class Other(Tensor):
        pass

    weight = torch.randn(24)
    assert direct.rms_norm(X.as_subclass(Other), weight, 1e-5) is None
    assert direct.rms_norm(X.numpy(), weight, 1e-5) is None
    assert direct.rms_norm(None, weight, 1e-5) is None
    assert direct.rms_norm(X.to_sparse(), weight, 1e-5) is None
    inside: list[object] = []
    for transform in (torch.func.vmap, torch.func.functionalize):
        transform(lambda x: inside.append(direct.rms_norm(x, weight, 1e-5)) or x)(X)
    assert inside == [None, None]


def test_gradients_take_the_long_way() -> None:
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        K.rms_norm(x, torch.randn(24), eps=1e-5).sum().backward()
    assert x.grad is not None


def test_results_are_tensors_like_any_other_and_are_freed() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    x = torch.randn(2**18)  # 1 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for _ in range(400):
        x = K.silu_mul(x, x).add_(1.0).clamp_(-1.0, 1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 100 * 2**20
    with torch.inference_mode():
        assert K.silu_mul(x, x).is_inference()
    assert not K.silu_mul(x, x).requires_grad
    assert K.silu_mul(x, x).data_ptr() % 64 == 0
