"""What the roofline measures: formulas against counts, trees, and contenders against each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import forest, path_of
from test_kernels_flashinfer import emulated  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode

import ibtpo_kernels as K
from ibtpo_kernels import flashinfer_backend
from ibtpo_kernels.roofline import (
    attention,
    catalog,
    decode,
    formulas,
    heads,
    parity,
    sampling,
    small,
    trees,
)
from ibtpo_kernels.roofline.formulas import Work
from ibtpo_kernels.roofline.peers import find, flashinfer
from ibtpo_kernels.roofline.peers.attention import Unpacked
from ibtpo_kernels.roofline.problem import Contender, Inputs, Outputs, Problem, Unavailable, in_pass, verify
from ibtpo_kernels.roofline.trees import PAGE, DecodeTree

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
SLOW = ("torch.compile", "FlexAttention")  # need a compiler at run time, and many seconds


# Formulas


@pytest.mark.parametrize("tokens", [0, 1, 37, 200])
def test_visible_pairs_are_those_of_the_mask(tokens: int) -> None:
    end = forest(tokens)
    index = torch.arange(tokens)
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    assert formulas.visible_pairs(end) == int(seen.sum())


def test_attention_counts_two_products_forward_and_five_backward() -> None:
    """Against torch's own counter of a dense attention, scaled by the share of pairs that are visible."""
    tokens, heads_, dim = 48, 2, 16
    end = forest(tokens)
    q, k, v = (torch.randn(heads_, tokens, dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        out = (q @ k.transpose(1, 2)).softmax(-1) @ v
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs = formulas.visible_pairs(end)
    sizes = (pairs, tokens, heads_, heads_, dim, 4)
    assert formulas.tree_attention_forward(*sizes).flops * tokens**2 == forward.get_total_flops() * pairs
    recomputed = forward.get_total_flops() // 2  # the scores, which a kernel that keeps none makes again
    expected = backward.get_total_flops() + recomputed
    assert formulas.tree_attention_backward(*sizes).flops * tokens**2 == expected * pairs


def test_attention_moves_each_tensor_once() -> None:
    tokens, num_heads, kv_heads, dim = 10, 4, 2, 8
    q, k = torch.empty(tokens, num_heads, dim), torch.empty(tokens, kv_heads, dim)
    lse = torch.empty(num_heads, tokens)
    sizes = (1, tokens, num_heads, kv_heads, dim, 4)
    assert formulas.tree_attention_forward(*sizes).bytes == 2 * q.nbytes + 2 * k.nbytes + lse.nbytes
    assert formulas.tree_attention_backward(*sizes).bytes == 4 * q.nbytes + 4 * k.nbytes + 2 * lse.nbytes


@pytest.mark.parametrize("which", ["forward", "both"])
def test_logprob_counts_the_products_it_cannot_do_without(which: Any) -> None:
    problem = heads.linear_logprob((24, 16, 40), FP32, which)
    bare = next(c for c in problem.contenders if c.kind == "bound")
    run = bare.load()(problem.draw(CPU, torch.Generator()))
    with problem.context(), FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == problem.work.flops
    assert formulas.policy_head(24, 16, 40, 4).flops * 4 == formulas.linear_logprob_forward(24, 16, 40, 4).flops * 12


def test_logprob_reads_the_weight_once_for_each_pass_of_rows() -> None:
    one, two = (formulas.linear_logprob_forward(t, 8, 100, 2).bytes for t in (4096, 4097))
    assert one == 2 * (4096 * 8 + 100 * 8)
    assert two - one == 2 * (8 + 100 * 8)


@pytest.mark.parametrize("name", [*catalog.GPU_DECODE, *catalog.CPU_DECODE])
def test_decode_slots_are_those_of_the_page_table(name: str) -> None:
    """Unique pages by counting them, and what the planner would have the kernel read: each shared page once."""
    tree = catalog.GPU_DECODE.get(name) or catalog.CPU_DECODE[name][0]
    table = tree.page_table()
    assert table.shape == (tree.branches, tree.length // PAGE)
    assert len(table.unique()) * PAGE == tree.unique_slots == (int(table.max()) + 1) * PAGE
    all_rows = torch.arange(tree.branches, dtype=torch.int32)
    plan = K.plan_decode(table, all_rows, torch.full_like(all_rows, tree.length), page_size=PAGE)
    assert int((plan.items[:, 3] - plan.items[:, 2]).sum()) * PAGE == tree.unique_slots


def test_decode_work() -> None:
    tree = DecodeTree((1, 4), (32, 16))
    problem = decode.tree_decode("tree", tree, (4, 2, 8), FP32, CPU)
    q, k_pages, v_pages = problem.draw(CPU, torch.Generator()).leaves
    assert problem.work == Work(4 * 4 * 8 * (4 * 48), 2 * q.nbytes + k_pages.nbytes + v_pages.nbytes)


@pytest.mark.parametrize(
    ("problem", "tensors"),
    [
        (small.rms_norm(4, 8, FP32, "forward"), 2),
        (small.rms_norm(4, 8, FP32, "both"), 5),
        (small.add_rms_norm(4, 8, FP32, "both"), 8),
        (small.silu_mul(4, 8, FP32, "both"), 8),
        (small.append_kv(4, 1, 8, FP32), 4),
    ],
    ids=str,
)
def test_small_ops_move_their_inputs_and_outputs_once(problem: Problem, tensors: int) -> None:
    assert problem.work.bytes == tensors * 4 * 8 * 4


# Trees


@pytest.mark.parametrize("name", catalog.GPU_TREES)
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_training_trees_are_valid_and_of_the_size_asked_for(name: str, tokens: int) -> None:
    end = catalog.GPU_TREES[name](tokens)
    ahead = end - torch.arange(tokens, dtype=torch.int32)
    assert len(end) == tokens and int(ahead.min()) >= 1 and int(end.max()) == tokens
    paths = trees.trajectories(end)
    assert torch.equal(torch.cat(paths).unique(), torch.arange(tokens))
    assert sum(len(path) for path in trees.trajectories(end[:0])) == 0
    if name == "IBTree(4,9,1,1)":
        assert len(paths) == 12 and len({len(path) for path in paths}) == 1
    if name == "binary16":
        assert max(map(len, paths)) == 16


def test_trajectories_are_root_to_leaf_paths() -> None:
    end = forest(60)
    leaves = [i for i in range(60) if int(end[i]) == i + 1]
    assert [path.tolist() for path in trees.trajectories(end)] == [path_of(end, i) for i in leaves]


def test_what_is_unpacked_packs_again() -> None:
    end = forest(50)
    unpacked, x = Unpacked(end), torch.randn(50, 2, 3)
    assert torch.equal(unpacked.pack(unpacked.unpack(x)), x)
    assert torch.equal(unpacked.pack_sum(unpacked.unpack_once(x)), x)
    counts = unpacked.pack_sum(torch.ones(len(unpacked.index), 2, unpacked.index.shape[1], 3))[:, 0, 0]
    assert counts.tolist() == [sum(i in path_of(end, j) for j in range(50) if int(end[j]) == j + 1) for i in range(50)]


def test_a_decode_tree_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="must each divide the next"):
        DecodeTree((2, 3), (16, 16))
    with pytest.raises(ValueError, match="multiples of the page size 16"):
        DecodeTree((1, 3), (8, 16))


# Problems: every kind of problem, small, all of whose contenders must agree with ours

SMALL = [
    *(
        attention.tree_attention(name, tree, (4, 2, 16), dtype, which, CPU)
        for name, tree in (("chain", trees.chain(40)), ("fan", trees.fan(20, 4, 5)), ("IBTree", trees.ib_tree(60)))
        for dtype in (FP32, BF16)
        for which in ("forward", "backward", "both")
    ),
    *(
        decode.tree_decode(str(tree), tree, (4, 2, 32), dtype, CPU)
        for tree in (DecodeTree((1, 6), (32, 16)), DecodeTree((5,), (48,)), DecodeTree((1, 2, 4, 8), (16,) * 4))
        for dtype in (FP32, BF16)
    ),
    decode.plan_decode("tree", DecodeTree((1, 6), (32, 16)), (4, 2, 32), CPU),
    *(heads.linear_logprob((50, 24, 131), dtype, which) for dtype in (FP32, BF16) for which in ("forward", "both")),
    *(heads.policy_head((50, 24, 131), FP32, loss) for loss in ("policy gradient", "cross-entropy")),
    heads.policy_head((50, 24, 131), BF16, "policy gradient"),
    sampling.sample(64, 50, FP32, CPU),
    sampling.sample(64, 500, FP32, CPU, top_p=0.8, top_k=20),
    sampling.sample(16, 500, BF16, CPU, top_p=0.8),
    *(
        op(9, 40, dtype, which)
        for op in (small.rms_norm, small.add_rms_norm, small.silu_mul)
        for dtype in (FP32, BF16)
        for which in ("forward", "both")
    ),
    *(small.rope(9, 3, 16, dtype) for dtype in (FP32, BF16)),
    *(small.append_kv(9, 3, 16, dtype) for dtype in (FP32, BF16)),
    *(small.rope_append(9, 4, 2, 16, dtype) for dtype in (FP32, BF16)),
    small.batch_invariant_linear(9, 40, 30, FP32),
    *(parity.in_order_of_decode("forest", forest(50), (4, 2, 16), dtype, CPU, is_quick=True) for dtype in (FP32, BF16)),
    *(parity.of_hidden((9, 24, 50), dtype, is_quick=True) for dtype in (FP32, BF16)),
    *(parity.of_logits(5, 60, dtype, is_quick=True) for dtype in (FP32, BF16)),
]


def contenders_agree(problem: Problem) -> set[str]:
    """Who was checked against ours."""
    reference = next(c for c in problem.contenders if c.kind == "ours").load()
    inputs, checked = problem.draw(CPU, torch.Generator().manual_seed(1)), set()
    with problem.context():
        for contender in problem.contenders:
            if contender.who.startswith(SLOW):
                continue
            try:
                run = contender.load()(inputs)
            except Unavailable:
                continue
            if problem.which == "plan":
                assert run() == ()
            else:
                verify(problem, contender, run, reference, inputs)
            checked.add(contender.who)
    return checked


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_contenders_compute_what_ours_does(problem: Problem) -> None:
    assert len(contenders_agree(problem)) >= 2, "nobody to compare with"


@pytest.mark.parametrize("problem", catalog.problems(CPU, quick=True), ids=str)
def test_the_quick_problems_of_the_cpu(problem: Problem) -> None:
    assert len(contenders_agree(problem)) >= 2


def test_every_kind_of_problem_is_in_the_small_ones() -> None:
    assert {p.op for p in SMALL} == set(catalog.names())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_problems_have_one_name_each_and_work_to_do(device: str) -> None:
    found = catalog.problems(device)
    assert len({p.key for p in found}) == len(found)
    assert {p.op for p in found} == set(catalog.names())
    assert {p.op for p in catalog.problems(device, quick=True)} == set(catalog.names())
    for problem in found:
        assert (problem.work.bytes > 0) == (problem.which != "plan"), problem
        assert (problem.work.flops > 0) == (problem.which != "plan" and problem.op != "append_kv"), problem
        names = [c.who for c in problem.contenders]
        assert len(set(names)) == len(names), problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are there")
def test_gpu_contenders_are_there_or_say_why_not() -> None:
    """All that the GPU's problems name can be looked for; where there is no GPU it is a reason, not a crash."""
    seen = set()
    for problem in catalog.problems(CUDA, quick=True):
        for contender in problem.contenders:
            seen.add(contender.who)
            try:
                contender.load()
            except Unavailable as reason:
                assert str(reason)
    assert {"FlashInfer cascade", "FlashInfer sampling", "verl kernel", "Liger", "FlexAttention (mask kept)"} <= seen


def test_a_wrong_contender_is_told_from_a_right_one() -> None:
    problem = small.silu_mul(9, 40, FP32, "both")
    reference, inputs = problem.contenders[0].load(), problem.draw(CPU, torch.Generator())
    wrong: dict[str, Callable[[Inputs], Outputs]] = {
        "swapped": lambda x: (torch.nn.functional.silu(x.leaves[1]) * x.leaves[0],),
        "NaN": lambda x: (x.leaves[0] * x.leaves[1] * float("nan"),),
        "shape": lambda x: (torch.nn.functional.silu(x.leaves[0])[:1] * x.leaves[1][:1],),
    }
    for name, function in wrong.items():
        contender = Contender(name, lambda f=function: in_pass(f, "both"))  # type: ignore[misc]
        with pytest.raises((ValueError, RuntimeError)):
            verify(problem, contender, contender.load()(inputs), reference, inputs)


@pytest.mark.parametrize("filtered", [False, True])
def test_sampling_from_another_distribution_is_noticed(filtered: bool) -> None:
    problem = sampling.sample(64, 200, FP32, CPU, top_k=5 if filtered else 0)
    own = problem.contenders[0]
    inputs = problem.draw(CPU, torch.Generator().manual_seed(3))

    def uniform(x: Inputs) -> Outputs:
        return torch.randint(200, (64,)), None, None

    contender = replace(own, who="uniform", kind="peer", load=lambda: in_pass(uniform, "forward"))
    with pytest.raises(ValueError, match="differs from ours"):
        verify(problem, contender, contender.load()(inputs), own.load(), inputs)


def test_outputs_that_a_contender_lacks_get_no_gradient() -> None:
    """A cross-entropy without entropy is compared with ours without a gradient at the entropy."""
    problem = heads.linear_logprob((20, 8, 30), FP32, "both")
    reference, inputs = problem.contenders[0].load(), problem.draw(CPU, torch.Generator())

    def logprob(x: Inputs) -> Outputs:
        hidden, weight = x.leaves
        return -torch.nn.functional.cross_entropy(hidden @ weight.t(), x.rest[1], reduction="none"), None

    contender = Contender("cross-entropy", lambda: in_pass(logprob, "both"))
    verify(problem, contender, contender.load()(inputs), reference, inputs)


@pytest.mark.parametrize(
    "tree", [DecodeTree((1, 6), (32, 16)), DecodeTree((5,), (48,)), DecodeTree((1, 2, 4), (16,) * 3)]
)
def test_flashinfer_is_called_as_it_asks_to_be(
    tree: DecodeTree,
    emulated: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the emulation that the tests of the backend are written against."""
    monkeypatch.setattr(flashinfer, "module", lambda *_: flashinfer_backend.import_module("flashinfer"))
    monkeypatch.setattr(flashinfer, "needs_cuda", lambda *_: None)
    problem = decode.tree_decode("tree", tree, (4, 2, 32), FP32, CUDA)
    peers = [c for c in problem.contenders if c.who.startswith("FlashInfer")]
    assert len(peers) == 1 + (len(tree.nodes) > 1)
    reference, inputs = problem.contenders[0].load(), problem.draw(CPU, torch.Generator())
    for contender in peers:
        verify(problem, contender, contender.load()(inputs), reference, inputs)
    planned = decode.plan_decode("tree", tree, (4, 2, 32), CUDA).contenders[-1].load()
    assert planned(inputs)() == ()


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(Unavailable, match="Nonesuch is not installed"):
        find.module("no_such_module_anywhere.inside", "Nonesuch")


def test_packages_are_made_importable_without_their_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "fussy_package" / "kernels"
    inner.mkdir(parents=True)
    (tmp_path / "fussy_package" / "__init__.py").write_text("raise ImportError('wants Ray')\n")
    (inner / "__init__.py").write_text("raise ImportError('wants more')\n")
    (inner / "fast.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match="wants Ray"):
        find.module("fussy_package.kernels.fast", "fussy")
    for _ in range(2):  # the second time it is there already
        find.bare_packages("fussy_package", "fussy_package.kernels", distribution="fussy")
        assert find.module("fussy_package.kernels.fast", "fussy").answer == 42
    for name in [n for n in sys.modules if n.startswith("fussy_package")]:
        del sys.modules[name]


TRL_WITHOUT_TRAINERS = """
import sys
for name in ("accelerate", "datasets"):
    sys.modules[name] = None
import torch
from ibtpo_kernels.roofline.peers.heads import trl
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
logprob, entropy = trl()(x, w, torch.arange(5))
(logprob.sum() + entropy.sum()).backward()
assert w.grad.abs().sum() > 0
"""


def test_trl_works_without_what_its_trainers_need() -> None:
    pytest.importorskip("trl")
    done = subprocess.run([sys.executable, "-c", TRL_WITHOUT_TRAINERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_ops_do_not_import_what_measures_them() -> None:
    code = "import sys, ibtpo_kernels; assert not {'matplotlib', 'rich', 'ibtpo_kernels.roofline'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
