"""parity="bitwise": a token's numbers are the same to the last bit, however its row came to be computed.

Everything here is compared with `torch.equal` or its like, never within a tolerance. That "fast" does differ there is
asserted too, so that no equality holds because there was nothing to see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_helpers import assert_idle, grow, prompt_of, save_checkpoint, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ibtpo_kernels as K
from ibtpo_engine import Engine, Model, Node, Sampling, Tree, load_model, sampler_logprob
from ibtpo_engine import native as native_module

pytestmark = pytest.mark.skipif(not K.has_compiled(), reason="needs the compiled kernels")

PROMPT = prompt_of(70)
SAMPLING = Sampling(max_tokens=45, temperature=0.7, stop_tokens=(2,))  # 0.7 is not the same number in float32
WAYS = {"fp32-native": torch.float32, "fp32-module": torch.float32, "bf16-module": torch.bfloat16}
MOST_BYTES = native_module.MOST_BYTES
FIELDS = ("tokens", "logprob", "logprob_raw", "entropy")


@contextmanager
def run_by(way: str) -> Iterator[None]:
    """The native decoder only where `way` says so."""
    before = native_module.MOST_BYTES
    native_module.MOST_BYTES = MOST_BYTES if way.endswith("native") else 0
    try:
        yield
    finally:
        native_module.MOST_BYTES = before


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with run_by(request.param):
        yield request.param


@pytest.fixture(scope="module")
def model(way: str) -> Model:
    return tiny_model(hidden=104, dtype=WAYS[way])


def bitwise(model: Model, kv_tokens: int = 8192, **options: int) -> Engine:
    return Engine(model, kv_tokens=kv_tokens, parity="bitwise", **options)


@pytest.fixture(scope="module")
def cold(model: Model, way: str) -> list[Node]:
    """The tree that every other way of growing it must reproduce."""
    engine = bitwise(model)
    assert engine.scheduler.runner.is_native == way.endswith("native")
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        nodes = tree.nodes()
    assert tree.num_sampled > 100
    return nodes


def equal(left: Sequence[Node], right: Sequence[Node]) -> None:
    """The same nodes, to the last bit."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert (a.start, a.finish) == (b.start, b.finish)
        for name in FIELDS:
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


def trained_logprobs(model: Model, trees: Sequence[Tree], temperature: float, parity: str) -> tuple[Tensor, Tensor]:
    """[2, E] (at the temperature, at 1): the sampler's log-probs of all trees, and those of one packed forward pass."""
    packed = [tree.export() for tree in trees]
    first = np.cumsum([0, *map(len, packed)])
    parts = list(zip(packed, first.tolist(), strict=False))

    def joined(arrays: Iterable[npt.NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).to(model.device)

    tokens, pos = joined(p.tokens for p in packed).long(), joined(p.pos for p in packed)
    end = joined(p.end + n for p, n in parts).int()
    rows = joined(p.edge_row + n for p, n in parts).long()
    targets = tokens[joined(p.edge_token + n for p, n in parts).long()]
    hidden = model.packed(tokens, pos, end, parity=parity)
    if parity == "bitwise":
        found = sampler_logprob(hidden, model.head, rows, targets, temperature=temperature)
    else:
        found = tuple(K.linear_logprob(hidden, model.head, rows, targets, temperature=t)[0] for t in (temperature, 1.0))
    sampled = [np.concatenate([getattr(p, name)[p.edge_token] for p in packed]) for name in ("logprob", "logprob_raw")]
    return torch.from_numpy(np.stack(sampled)), torch.stack(found).detach().cpu()


# ---- the engine against itself ---------------------------------------------------------------------------------


def test_warm_is_cold(model: Model, cold: list[Node]) -> None:
    engine = bitwise(model)
    for repeat in range(3):
        before = engine.stats()["reused"]
        with grow(engine, PROMPT, SAMPLING, key=5) as tree:
            equal(tree.nodes(), cold)
        assert engine.stats()["reused"] - before == (64 if repeat else 0)
    assert_idle(engine)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 16, 33])
def test_prefilled_in_chunks_is_prefilled_at_once(model: Model, cold: list[Node], prefill_tokens: int) -> None:
    engine = bitwise(model, prefill_tokens=prefill_tokens)
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        equal(tree.nodes(), cold)
    assert engine.stats()["steps"] >= 70 // prefill_tokens


@pytest.mark.parametrize("cut", [1, 10, 26, 37])
def test_decoded_is_prefilled(model: Model, cut: int) -> None:
    """What follows is the same whether the tokens before were sampled one by one or came as a prompt."""
    greedy = Sampling(temperature=0, max_tokens=40)
    engine, other = bitwise(model), bitwise(model)
    with engine.tree(prompt_of(20)) as tree:
        [decoded] = engine.extend(tree.root.fork(), greedy)
    with other.tree([*prompt_of(20), *decoded.tokens[:cut].tolist()]) as tree:
        [prefilled] = other.extend(tree.root.fork(), greedy)
    for name in ("tokens", "logprob_raw", "entropy"):
        assert np.array_equal(getattr(prefilled, name)[: 40 - cut], getattr(decoded, name)[cut:]), name


def test_preempted_is_undisturbed(model: Model) -> None:
    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(3)

    prompts = [prompt_of(40, seed=i) for i in range(4)]
    grown, preemptions = [], []
    for kv_tokens in (8192, 16 * 20):
        engine = bitwise(model, kv_tokens)
        trees = dict(engine.run(search, prompts, Sampling(max_tokens=60)))
        grown.append([node for i in range(4) for node in trees[i].nodes()])
        preemptions.append(engine.stats()["preemptions"])
    equal(*grown)
    assert preemptions[0] == 0 < preemptions[1]


@pytest.mark.parametrize("max_branches", [1, 3, 64])
def test_batched_with_anything_is_alone(model: Model, cold: list[Node], max_branches: int) -> None:
    engine = bitwise(model, max_branches=max_branches)
    tree, others = engine.tree(PROMPT, key=5), [engine.tree(prompt_of(9 + 5 * i, seed=i)) for i in range(6)]
    mates = [node for other in others for node in other.root.fork(3)]
    branches = tree.root.fork(3)
    engine.extend([*mates[:5], branches[0], *mates[5:], *branches[1:]], SAMPLING)
    first, second, _ = branches
    engine.extend([*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)], SAMPLING)
    equal(tree.nodes(), cold)


def test_after_release_and_on_other_threads_the_bits_are_the_same(model: Model, cold: list[Node]) -> None:
    engine, before = bitwise(model), torch.get_num_threads()
    tree = engine.tree(PROMPT, key=5)
    try:
        first, second, _ = engine.extend(tree.root.fork(3), SAMPLING)
        engine.release()
        torch.set_num_threads(3 if before == 1 else 1)
        engine.extend([*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)], SAMPLING)
    finally:
        torch.set_num_threads(before)
    equal(tree.nodes(), cold)


def test_native_and_module_are_the_same_to_the_bit() -> None:
    model, grown = tiny_model(hidden=104), []
    for way in ("fp32-native", "fp32-module"):
        with run_by(way):
            engine = bitwise(model)
            assert engine.scheduler.runner.is_native == way.endswith("native")
            grown.append(grow(engine, PROMPT, SAMPLING, key=5).nodes())
    equal(*grown)


def test_fast_is_not_bitwise(model: Model, cold: list[Node], way: str) -> None:
    """Where torch multiplies, the batch is seen in the last bits: the tests above have something to find."""
    if way.endswith("native"):
        pytest.skip("the native decoder is bitwise as it is")
    engine = Engine(model, kv_tokens=8192)
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        ours = tree.nodes()
    differs = any(not np.array_equal(a.logprob, b.logprob) for a, b in zip(ours, cold, strict=True))
    if not differs and torch_is_bitwise(model):
        pytest.skip("on this processor torch's products of this type do not see the batch either")
    assert differs


def torch_is_bitwise(model: Model) -> bool:
    """Does every row of the model's products have the same bits in any batch, as torch computes them?"""
    for weight in (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)):
        x = torch.randn(70, weight.shape[1]).to(weight.dtype)
        whole = torch.nn.functional.linear(x, weight)
        for rows in range(1, 70):
            if not torch.equal(torch.nn.functional.linear(x[:rows], weight), whole[:rows]):
                return False
    return True


seen: Counter[str] = Counter()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pages=st.sampled_from([24, 27, 200]),
    max_branches=st.integers(1, 20),
    prefill_tokens=st.integers(1, 100),
    order=st.permutations(range(5)),
    count=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def _same_seed_same_bits(
    pages: int, max_branches: int, prefill_tokens: int, order: list[int], count: int, dtype: torch.dtype
) -> None:
    """Pool, batch, chunks, the searches beside it and their order are drawn; each tree is what it is alone."""

    def search(tree: Tree) -> Iterator[list[Node]]:
        first, second, _ = yield tree.root.fork(3)
        yield [*first.fork(1, at=len(first) // 2), *second.fork(2, at=1)]

    model, sampling = tiny_model(dtype=dtype), Sampling(max_tokens=20, temperature=0.9)
    prompts = [PROMPT[: 17 + 9 * i] for i in range(5)]  # each begins as the next one does
    engine = bitwise(model, 16 * pages, max_branches=max_branches, prefill_tokens=prefill_tokens)
    chosen = order[:count]
    for index, tree in engine.run(search, [prompts[i] for i in chosen], sampling, keys=chosen):
        alone = bitwise(model)
        [(_, expected)] = alone.run(search, [prompts[chosen[index]]], sampling, keys=[chosen[index]])
        equal(tree.nodes(), expected.nodes())
        seen["trees"] += 1
    seen["preempted"] += engine.stats()["preemptions"] > 0
    seen["reused"] += engine.stats()["reused"] > 0
    assert_idle(engine)


def test_same_seed_same_bits_whatever_the_engine_and_its_load() -> None:
    seen.clear()
    _same_seed_same_bits()
    assert seen["trees"] > 12
    assert seen["preempted"] > 0
    assert seen["reused"] > 0


# ---- the engine against the trainer ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_finds_the_samplers_log_probs(model: Model, way: str, temperature: float) -> None:
    """Over a forest packed together; the gap is zero, where "fast" leaves one."""
    engine = bitwise(model)
    sampling = Sampling(max_tokens=45, temperature=temperature, stop_tokens=(2,))
    trees = [grow(engine, prompt_of(n, seed=n), sampling, key=n) for n in (5, 16, 70, 33)]
    sampled, trained = trained_logprobs(model, trees, temperature, "bitwise")
    assert sampled.shape[1] > 300
    assert torch.equal(sampled, trained)
    _, fast = trained_logprobs(model, trees, temperature, "fast")
    assert 0 < (sampled - fast).abs().max() < (1e-4 if way.startswith("fp32") else 1.0)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8, "num_attention_heads": 7, "num_key_value_heads": 1, "attention_bias": True}),
        ("qwen2", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_size": 75, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_so_it_does_for_every_architecture(
    family: str, fields: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, family, **fields)
    model = load_model(tmp_path, dtype=dtype)
    for way in ("native", "module"):
        with run_by(way):
            tree = grow(bitwise(model), prompt_of(37), SAMPLING, key=2)
        sampled, trained = trained_logprobs(model, [tree], 0.7, "bitwise")
        assert sampled.shape[1] > 60
        assert torch.equal(sampled, trained)


def test_how_a_forest_is_packed_and_whether_gradients_are_wanted_cannot_be_seen(model: Model) -> None:
    """Each path alone, and the tree at once, with and without autograd."""
    with grow(bitwise(model), PROMPT, SAMPLING, key=5) as tree:
        packed = tree.export()
    arrays = (torch.from_numpy(x.copy()) for x in (packed.tokens, packed.pos, packed.end))
    tokens, pos, end = arrays
    whole = model.packed(tokens.long(), pos, end, parity="bitwise")
    trained = model.requires_grad_(True).packed(tokens.long(), pos, end, parity="bitwise")
    model.requires_grad_(False)
    assert trained.requires_grad
    assert torch.equal(trained, whole)
    for node, first in zip(packed.nodes, packed.first.tolist(), strict=True):
        path = torch.from_numpy(node.prefix().astype(np.int64))
        n = len(path)
        alone = model.packed(path, torch.arange(n), torch.full((n,), n, dtype=torch.int32), parity="bitwise")
        assert torch.equal(alone[node.start :], whole[first : first + len(node)])


def test_scores_have_the_bits_of_what_was_sampled(model: Model) -> None:
    engine = Engine(model, kv_tokens=4096, parity="bitwise", prefill_tokens=7)
    with engine.tree(prompt_of(37)) as tree:
        nodes = engine.extend(tree.root.fork(3), Sampling(max_tokens=20, temperature=0.7))
        for node, score in zip(nodes, engine.score(tree, [node.tokens for node in nodes]), strict=True):
            assert np.array_equal(score.logprob, node.logprob_raw)
            assert np.array_equal(score.entropy, node.entropy)


def test_what_the_model_says_of_shaped_tokens_has_the_bits_of_the_trainer(model: Model) -> None:
    """Bias, mask and least length change what is sampled, and not the log-prob at temperature 1 of what was."""
    shaping = {"logit_bias": {5: 3.0, 7: -2.0}, "min_tokens": 20, "stop_tokens": (2, 3, 4)}
    sampling = Sampling(max_tokens=45, allowed=lambda path: np.arange(40) != path[-1], **shaping)
    engine = bitwise(model)
    with engine.tree(PROMPT) as tree:
        engine.extend(tree.root.fork(4), sampling)
        sampled, trained = trained_logprobs(model, [tree], 1.0, "bitwise")
        assert torch.equal(sampled[1], trained[1])
        assert not torch.equal(sampled[0], trained[0])


def test_gradients_are_those_of_fast_to_rounding() -> None:
    """Of the sum of log-probs over a tree, by every parameter."""
    model = tiny_model(hidden=104)
    with grow(bitwise(model), PROMPT, SAMPLING, key=5) as tree:
        packed = tree.export()
    tokens = torch.from_numpy(packed.tokens).long()
    rows, index = torch.from_numpy(packed.edge_row).long(), torch.from_numpy(packed.edge_token).long()
    model.requires_grad_(True)
    gradients = []
    for parity in ("fast", "bitwise"):
        hidden = model.packed(tokens, torch.from_numpy(packed.pos), torch.from_numpy(packed.end), parity=parity)
        logprob, _ = K.linear_logprob(hidden, model.head, rows, tokens[index])
        gradients.append(torch.autograd.grad(logprob.sum(), list(model.parameters())))
    for (name, _), x, y in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(x.abs().max()), msg=name)
        assert x.abs().max() > 0


def test_an_angle_does_not_know_the_positions_beside_it() -> None:
    """The rotation is torch's own: of a table, of any run of positions, and of one position alone."""
    model = tiny_model(positions=40_000)
    table = model.rotation(torch.arange(40_000))
    for pos in (torch.tensor([39_999]), torch.arange(5, 12), torch.randint(40_000, (333,)), torch.arange(1)):
        for whole, part in zip(table, model.rotation(pos), strict=True):
            assert torch.equal(whole[pos], part)


# ---- what cannot be promised -----------------------------------------------------------------------------------


def test_where_the_promise_cannot_be_kept_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parity: 'exact' is not one of 'fast', 'bitwise'"):
        Engine(tiny_model(), kv_tokens=64, parity="exact")
    with pytest.raises(ValueError, match=r"supports torch.float32 and torch.bfloat16, not torch.float64"):
        bitwise(tiny_model(dtype=torch.float64))
    with (
        pytest.raises(ValueError, match="the compiled CPU kernels or the Triton kernels; here ops run on 'ref"),
        K.backend("reference"),
    ):
        bitwise(tiny_model())
    model, one = tiny_model(), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="here ops run on 'reference'"), K.backend("reference"):
        model.packed(one, one - 1, one.int(), parity="bitwise")
    engine = bitwise(model)
    tree = engine.tree(PROMPT)
    with pytest.raises(ValueError, match="here ops run on 'reference'"), K.backend("reference"):
        engine.extend(tree.root.fork(), SAMPLING)


def test_a_layer_of_which_nothing_is_known_is_refused() -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    engine = bitwise(model)
    with engine.tree(PROMPT) as tree, pytest.raises(ValueError, match="plain linear layers, not Sequential"):
        engine.extend(tree.root.fork(), SAMPLING)
    mlp.up_proj = mlp.up_proj[0]
    mlp.up_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="or one with a hook"):
        model.packed(one, one - 1, one.int(), parity="bitwise")
