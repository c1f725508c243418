"""No argument gets through that an op cannot serve: a ValueError names the op and the argument; what is empty is not
wrong, and what is merely strided gives the same result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS
from torch import Tensor

import ibtpo_kernels as K

Arguments = dict[str, Any]


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _pages() -> Arguments:
    return {"k_pages": torch.randn(5, 16, 2, 8), "v_pages": torch.randn(5, 16, 2, 8)}


def _plan() -> K.DecodePlan:
    table = torch.tensor([[0, 2, -1], [0, 1, 3]], dtype=torch.int32)
    return K.plan_decode(table, _ints(0, 1), _ints(20, 40))


def _loss(logprob: Tensor, entropy: Tensor, edges: Any, rows: Any) -> Tensor:
    return logprob.sum() + entropy.sum()


def _head() -> Arguments:
    return {
        "hidden": torch.randn(5, 8),
        "weight": torch.randn(7, 8),
        "rows": torch.tensor([0, 4, 4]),
        "targets": torch.tensor([6, 0, 1]),
        "temperature": 0.7,
        "softcap": 3.0,
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """An op, arguments that it takes, and which dimensions of which of them may have any size."""

    make: Callable[[], Arguments]
    any_size: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    strided: bool = True  # whether every tensor may be

    def call(self, name: str, arguments: Arguments) -> Any:
        return getattr(K, name)(**arguments)


OPS = {
    "tree_attention": Case(
        lambda: {
            "q": torch.randn(6, 4, 8),
            "k": torch.randn(6, 2, 8),
            "v": torch.randn(6, 2, 8),
            "end": _ints(6, 3, 3, 6, 6, 6),
            "scale": 0.3,
        }
    ),
    "plan_decode": Case(
        lambda: {
            "page_table": torch.tensor([[0, 2, -1], [0, 1, 3]], dtype=torch.int32),
            "rows": _ints(0, 1),
            "lengths": _ints(20, 40),
            "page_size": 16,
        },
        {"page_table": (0, 1)},
        strided=False,
    ),
    "tree_decode": Case(lambda: {"q": torch.randn(2, 4, 8), **_pages(), "plan": _plan(), "scale": 0.3}, strided=False),
    "append_kv": Case(
        lambda: {
            "k": torch.randn(3, 2, 8),
            "v": torch.randn(3, 2, 8),
            **_pages(),
            "slots": torch.tensor([35, -1, 0]),
        },
        strided=False,
    ),
    "rms_norm": Case(lambda: {"x": torch.randn(3, 5, 8), "weight": torch.randn(8), "eps": 1e-6}, {"x": (0, 1)}),
    "add_rms_norm": Case(
        lambda: {"x": torch.randn(3, 8), "residual": torch.randn(3, 8), "weight": torch.randn(8), "eps": 1e-6}
    ),
    "rope": Case(lambda: {"x": torch.randn(3, 2, 8), "cos": torch.rand(3, 4), "sin": torch.rand(3, 4)}, {"x": (1,)}),
    "rope_append": Case(
        lambda: {
            "q": torch.randn(3, 4, 8),
            "k": torch.randn(3, 2, 8),
            "v": torch.randn(3, 2, 8),
            "cos": torch.rand(3, 4),
            "sin": torch.rand(3, 4),
            **_pages(),
            "slots": torch.tensor([35, -1, 0]),
            "q_weight": torch.randn(8),
            "k_weight": torch.randn(8),
            "eps": 1e-6,
        },
        {"q": (1,)},
        strided=False,
    ),
    "silu_mul": Case(lambda: {"gate": torch.randn(3, 8), "up": torch.randn(3, 8)}),
    "batch_invariant_linear": Case(
        lambda: {"x": torch.randn(2, 3, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}, {"x": (0, 1)}
    ),
    "linear_logprob": Case(_head, {"hidden": (0,), "weight": (0,)}),
    "policy_head": Case(lambda: {**_head(), "loss": _loss}, {"hidden": (0,), "weight": (0,)}),
    "sample": Case(
        lambda: {
            "logits": torch.randn(3, 9),
            "keys": torch.arange(6).view(3, 2),
            "temperature": torch.rand(3) + 0.1,
            "top_p": torch.tensor([0.5, 1.0, 0.9]),
            "top_k": torch.tensor([0, 3, 1]),
            "min_p": torch.tensor([0.0, 0.1, 1.0]),
        },
        {"logits": (1,)},
    ),
}
DECODING = ("plan_decode", "tree_decode", "append_kv", "rope_append", "sample")  # without a gradient
GRADS = ("q", "k", "v", "x", "residual", "weight", "gate", "up", "bias", "hidden")
ANY_DTYPE = {("sample", "temperature"), ("sample", "top_p"), ("sample", "min_p")}  # any real one


def tensors(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    return ((name, x) for name, x in arguments.items() if isinstance(x, Tensor))


def _longer(x: Tensor, dim: int) -> Tensor:
    return torch.cat((x, x.narrow(dim, 0, 1)), dim)


def wrong_tensors(op: str) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(argument, what is done to it, how)."""
    for name, x in tensors(OPS[op].make()):
        yield name, "meta", lambda x: x.to("meta")
        yield name, "rank", lambda x: x[None]
        if (op, name) not in ANY_DTYPE:
            if x.is_floating_point():
                yield name, "int", lambda x: x.long()
            else:
                yield name, "other-int", lambda x: x.to(torch.int16)
                yield name, "float", lambda x: x.float()
            alone = name in ("logits", "cos", "sin") or (op, name) == ("rope", "x")  # of any type
            if x.is_floating_point() and not alone:
                yield name, "double", lambda x: x.double()
        else:
            yield name, "complex", lambda x: x.to(torch.complex64)
        for dim in range(x.dim()):
            if dim not in OPS[op].any_size.get(name, ()):
                yield name, f"longer{dim}", lambda x, dim=dim: _longer(x, dim)


WRONG = [(op, *change) for op in OPS for change in wrong_tensors(op)]
FREE_RANK = {("rms_norm", "x"), ("batch_invariant_linear", "x")}  # [..., H]
OF_NUMBER = {  # longer in a dimension that only their fellow fixes
    ("tree_decode", "k_pages", "longer0"),
    ("tree_decode", "v_pages", "longer0"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "name", "kind", "change"),
    [w for w in WRONG if not (w[2] == "rank" and (w[0], w[1]) in FREE_RANK)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_tensor_is_named(
    op: str, name: str, kind: str, change: Callable[[Tensor], Tensor], backend: str
) -> None:
    arguments = OPS[op].make()
    arguments[name] = change(arguments[name])
    with K.backend(backend), pytest.raises(ValueError, match=rf"^{op}: (.*\b)?{name}\b"):
        OPS[op].call(op, arguments)


NOT_NUMBERS = (math.nan, math.inf, -math.inf, -1.0)
SCALARS = [
    *(("tree_attention", "scale", x) for x in NOT_NUMBERS[:3]),
    *(("tree_decode", "scale", x) for x in NOT_NUMBERS[:3]),
    *((op, "eps", x) for op in ("rms_norm", "add_rms_norm", "rope_append") for x in NOT_NUMBERS),
    *((op, name, x) for op in ("linear_logprob", "policy_head") for name in ("temperature", "softcap")
      for x in (*NOT_NUMBERS, 0.0)),
    *(("sample", "temperature", x) for x in NOT_NUMBERS),
    *(("sample", "top_p", x) for x in (*NOT_NUMBERS, 0.0, 1.5)),
    *(("sample", "min_p", x) for x in (*NOT_NUMBERS, 1.5)),
    *(("sample", "top_k", x) for x in (-1, 2.5, torch.tensor([0.7, 0.2, 0.5]))),
    *(("sample", name, torch.tensor([0.5, x, 0.5])) for name in ("temperature", "top_p", "min_p")
      for x in NOT_NUMBERS),
    ("sample", "top_k", torch.tensor([1, -1, 1])),
    *(("plan_decode", "page_size", x) for x in (0, -16)),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name", "value"), SCALARS, ids=str)
def test_a_number_out_of_range_is_named(op: str, name: str, value: Any, backend: str) -> None:
    arguments = {**OPS[op].make(), name: value}
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            K.backend(backend),
            pytest.raises(ValueError, match=rf"^{op}: (.*\b)?{name}\b"),
        ):
            OPS[op].call(op, arguments)


INDICES = [
    *(("tree_attention", "end", _ints(*end)) for end in ((6, 1, 3, 6, 6, 6), (6, 3, 3, 6, 6, 7), (-1, 3, 3, 6, 6, 6))),
    *(("plan_decode", "rows", _ints(*rows)) for rows in ((0, 2), (-1, 0))),
    *(("plan_decode", "lengths", _ints(*lengths)) for lengths in ((20, 49), (-1, 40))),
    *((op, "slots", torch.tensor(slots)) for op in ("append_kv", "rope_append") for slots in ([0, 1, 80], [-2, 1, 0])),
    *((op, "rows", torch.tensor(rows)) for op in ("linear_logprob", "policy_head") for rows in ([0, 1, 5], [-1, 0, 0])),
    *((op, "targets", torch.tensor(x)) for op in ("linear_logprob", "policy_head") for x in ([0, 1, 7], [-1, 0, 0])),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name", "value"), INDICES, ids=str)
def test_an_index_out_of_range_is_named(op: str, name: str, value: Tensor, backend: str) -> None:
    arguments = {**OPS[op].make(), name: value}
    before = {name: x.clone() for name, x in tensors(arguments)}
    word = {"rows": "row", "lengths": "length"}.get(name, name)
    with K.backend(backend), pytest.raises(ValueError, match=rf"^(append_kv|{op}): .*{word}"):
        OPS[op].call(op, arguments)
    assert all(torch.equal(x, before[name]) for name, x in tensors(arguments)), "nothing is written"


def _strided(x: Tensor) -> Tensor:
    """The same numbers, two elements apart."""
    return torch.stack((x, x.roll(1, 0) if x.numel() else x), -1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name, _ in tensors(OPS[op].make())], ids=str)
def test_a_strided_tensor_gives_the_same_or_is_named(op: str, name: str, backend: str) -> None:
    torch.manual_seed(1)
    arguments = OPS[op].make()
    torch.manual_seed(1)
    changed = OPS[op].make()
    changed[name] = _strided(changed[name])
    with K.backend(backend):
        expected = OPS[op].call(op, arguments)
        refused = (op == "plan_decode") or name in ("k_pages", "v_pages")
        if refused:
            with pytest.raises(ValueError, match=rf"^{op}: .*{name}.* contiguous"):
                OPS[op].call(op, changed)
            return
        actual = OPS[op].call(op, changed)
    for x, y in zip(outputs(actual), outputs(expected), strict=True):
        torch.testing.assert_close(x, y)
    for (_, x), (_, y) in zip(tensors(changed), tensors(arguments), strict=True):
        torch.testing.assert_close(x, y)  # what is written in place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_defaults_of_torch_do_not_matter(op: str, backend: str) -> None:
    arguments = OPS[op].make()
    results = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float64)):
        copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), K.backend(backend):
                leaves = [x.requires_grad_() for name, x in tensors(copies) if op not in DECODING and name in GRADS]
                out = outputs(OPS[op].call(op, copies))
                total = [x.float().sum() for x in out if x.requires_grad]
                grads = torch.autograd.grad(total, leaves) if leaves else ()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([*out, *grads, *(x for _, x in tensors(copies))])
    for x, y in zip(*results, strict=True):
        assert x.dtype is y.dtype and torch.equal(x, y)


def outputs(result: Any) -> list[Tensor]:
    if isinstance(result, K.DecodePlan):
        return [result.items]
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def _nothing(op: str) -> Iterator[tuple[str, Arguments]]:
    """(which size is zero, arguments)."""
    make = OPS[op].make
    sizes: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
        "tree_attention": {
            "N": {"q": (0, 4, 8), "k": (0, 2, 8), "v": (0, 2, 8), "end": (0,)},
            "Hq": {"q": (6, 0, 8)},
            "D": {"q": (6, 4, 0), "k": (6, 2, 0), "v": (6, 2, 0)},
        },
        "plan_decode": {
            "B": {"rows": (0,), "lengths": (0,)},
            "R": {"page_table": (0, 3), "rows": (0,), "lengths": (0,)},
        },
        "tree_decode": {
            "Hq": {"q": (2, 0, 8)},
            "D": {"q": (2, 4, 0), "k_pages": (5, 16, 2, 0), "v_pages": (5, 16, 2, 0)},
        },
        "append_kv": {
            "T": {"k": (0, 2, 8), "v": (0, 2, 8), "slots": (0,)},
            "D": {"k": (3, 2, 0), "v": (3, 2, 0), "k_pages": (5, 16, 2, 0), "v_pages": (5, 16, 2, 0)},
            "H": {"k": (3, 0, 8), "v": (3, 0, 8), "k_pages": (5, 16, 0, 8), "v_pages": (5, 16, 0, 8)},
            "P": {"k": (0, 2, 8), "v": (0, 2, 8), "slots": (0,), "k_pages": (0, 16, 2, 8), "v_pages": (0, 16, 2, 8)},
        },
        "rms_norm": {"T": {"x": (0, 5, 8)}, "H": {"x": (3, 5, 0), "weight": (0,)}},
        "add_rms_norm": {
            "T": {"x": (0, 8), "residual": (0, 8)},
            "H": {"x": (3, 0), "residual": (3, 0), "weight": (0,)},
        },
        "rope": {
            "N": {"x": (0, 2, 8), "cos": (0, 4), "sin": (0, 4)},
            "H": {"x": (3, 0, 8)},
            "D": {"x": (3, 2, 0), "cos": (3, 0), "sin": (3, 0)},
        },
        "rope_append": {
            "T": {
                "q": (0, 4, 8),
                "k": (0, 2, 8),
                "v": (0, 2, 8),
                "cos": (0, 4),
                "sin": (0, 4),
                "slots": (0,),
            },
            "Hq": {"q": (3, 0, 8)},
        },
        "silu_mul": {"T": {"gate": (0, 8), "up": (0, 8)}, "H": {"gate": (3, 0), "up": (3, 0)}},
        "batch_invariant_linear": {
            "T": {"x": (0, 3, 8)},
            "N": {"weight": (0, 8), "bias": (0,)},
            "K": {"x": (2, 3, 0), "weight": (5, 0)},
        },
        "sample": {
            "B": dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), (0,)) | {"logits": (0, 9), "keys": (0, 2)},
        },
    }
    head = {
        "E": {"rows": (0,), "targets": (0,)},
        "T": {"hidden": (0, 8), "rows": (0,), "targets": (0,)},
        "H": {"hidden": (5, 0), "weight": (7, 0)},
    }
    sizes["linear_logprob"] = sizes["policy_head"] = head
    for which, changes in sizes[op].items():
        arguments = make()
        yield which, arguments | {name: arguments[name].new_zeros(shape) for name, shape in changes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "arguments"),
    [pytest.param(op, arguments, id=f"{op}-{which}") for op in OPS for which, arguments in _nothing(op)],
)
@pytest.mark.filterwarnings("error")
def test_nothing_in_nothing_out(op: str, arguments: Arguments, backend: str, dtype: torch.dtype) -> None:
    """The shapes and, where there are numbers, the numbers of the reference; gradients of the inputs' shapes."""
    whole = ("temperature", "top_p", "min_p", "cos", "sin")
    arguments = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in whole else x
        for name, x in arguments.items()
    }
    results = []
    for which in (backend, "reference"):
        with K.backend(which), torch.no_grad():
            results.append(outputs(OPS[op].call(op, arguments)))
    near = 1e-5 if dtype is torch.float32 else 2e-2
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=near, rtol=near)
        assert not x.is_floating_point() or bool(x.isfinite().all())
    if op in DECODING:
        return
    leaves = {name: x.clone().requires_grad_() for name, x in tensors(arguments) if x.is_floating_point()}
    leaves = {name: x for name, x in leaves.items() if name not in ("cos", "sin")}
    with K.backend(backend):
        out = outputs(OPS[op].call(op, arguments | leaves))
    grads = torch.autograd.grad(sum(x.sum() for x in out if x.requires_grad), list(leaves.values()), allow_unused=True)
    for grad, x in zip(grads, leaves.values(), strict=True):
        assert grad is None or (grad.shape == x.shape and bool(grad.isfinite().all()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_of_no_pages_and_a_decode_of_no_queries(backend: str) -> None:
    with K.backend(backend):
        plan = K.plan_decode(torch.zeros(3, 0, dtype=torch.int32), _ints(0, 2), _ints(0, 0))
        assert torch.equal(K.tree_decode(torch.randn(2, 4, 8), **_pages(), plan=plan), torch.zeros(2, 4, 8))
        none = K.plan_decode(torch.zeros(0, 3, dtype=torch.int32), _ints(), _ints())
        assert K.tree_decode(torch.randn(0, 4, 8), **_pages(), plan=none).shape == (0, 4, 8)
        planner = K.DecodePlanner(torch.zeros(3, 0, dtype=torch.int32))
        assert len(planner.plan(_ints(), _ints()).items) == 0


@pytest.mark.parametrize("field", ["page_table", "rows", "lengths", "items"])
def test_a_plan_holds_what_kernels_may_read(field: str) -> None:
    """Whoever makes one by hand is told as well: kernels take a plan's tensors as they lie."""
    plan = _plan()
    for wrong in (lambda x: x.long(), lambda x: x.to("meta"), _strided, lambda x: x[None]):
        with pytest.raises(ValueError, match=rf"^DecodePlan: ({field}|rows) is"):
            dataclasses.replace(plan, **{field: wrong(getattr(plan, field))})


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_planner_names_what_is_wrong(backend: str) -> None:
    table = torch.zeros(3, 4, dtype=torch.int32)
    with K.backend(backend):
        for wrong in (table.long(), table[0], table.T, table.float()):
            with pytest.raises(ValueError, match="page_table is"):
                K.DecodePlanner(wrong)
        planner = K.DecodePlanner(table)
        for rows, lengths, message in (
            (_ints(0, 1).long(), _ints(1, 1), "rows is"),
            (_ints(0, 1), _ints(1), "lengths is"),
            (_ints(0, 1).to("meta"), _ints(1, 1), "rows is"),
            (_ints(0, 9, 1, 9)[::2], _ints(1, 1), "rows and lengths must be contiguous"),
            (_ints(0, 3), _ints(1, 1), "row"),
            (_ints(0, -1), _ints(1, 1), "row"),
            (_ints(0, 1), _ints(1, 65), "length"),
            (_ints(0, 1), _ints(1, -1), "length"),
        ):
            with pytest.raises(ValueError, match=f"plan_decode: .*{message}"):
                planner.plan(rows, lengths)
