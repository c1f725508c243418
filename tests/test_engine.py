"""What the engine samples depends on seed, key and place in the tree, and on nothing else."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType

import numpy as np
import pytest
import torch
from engine_helpers import (
    ROUNDING,
    assert_idle,
    check_every_step,
    expected_tokens,
    grow,
    node_on,
    path_logits,
    prompt_of,
    same,
    tiny_model,
)

from ibtpo_engine import Engine, Model, Node, Sampling, Tree
from ibtpo_kernels import backend, linear_logprob

PROMPT = prompt_of(70)
SAMPLING = Sampling(max_tokens=45, stop_tokens=(2,))
GREEDY = Sampling(max_tokens=30, temperature=0)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(dtype=request.param)


@pytest.fixture(scope="module")
def cold(model: Model) -> list[Node]:
    """The tree every other way of growing it must reproduce."""
    engine = Engine(model, kv_tokens=8192)
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        nodes = tree.nodes()
    assert len(nodes) > 8
    assert tree.num_sampled > 100
    stats = engine.stats()
    assert (stats["reused"], stats["preemptions"], stats["evicted_pages"]) == (0, 0, 0)
    return nodes


# ---- same seed and key, same tree ----------------------------------------------------------------------------


def test_every_token_is_what_one_forward_pass_over_its_path_draws(model: Model, cold: list[Node]) -> None:
    for node in cold[1:]:
        assert np.array_equal(node.tokens, expected_tokens(model, node, SAMPLING))


def test_a_replay_is_exact_to_the_bit(model: Model, cold: list[Node]) -> None:
    with grow(Engine(model, kv_tokens=8192), PROMPT, SAMPLING, key=5) as tree:
        same(tree.nodes(), cold, atol=0)


def test_a_prefix_found_in_the_index_changes_nothing(model: Model, cold: list[Node]) -> None:
    engine = Engine(model, kv_tokens=8192)
    for repeat in range(3):
        before = engine.stats()["reused"]
        with grow(engine, PROMPT, SAMPLING, key=5) as tree:
            same(tree.nodes(), cold)
        assert engine.stats()["reused"] - before == (64 if repeat else 0)
    assert_idle(engine)


def test_a_prompt_of_whole_pages_found_whole_changes_nothing(model: Model) -> None:
    """Then only the hidden state of its last token is missing."""
    engine = Engine(model, kv_tokens=8192)
    trees = []
    for _ in range(2):
        computed = engine.stats()["computed"]
        with engine.tree(PROMPT[:64], key=1) as tree:
            engine.extend(tree.root.fork(2), Sampling(max_tokens=1))
        trees.append((tree, engine.stats()["computed"] - computed))
    assert [computed for _, computed in trees] == [64, 1]
    same(trees[0][0].nodes(), trees[1][0].nodes())
    assert_idle(engine)


@pytest.mark.parametrize("prefill_tokens", [1, 16, 23])
def test_prefill_in_chunks_changes_nothing(model: Model, cold: list[Node], prefill_tokens: int) -> None:
    engine = Engine(model, kv_tokens=8192, prefill_tokens=prefill_tokens)
    with grow(engine, PROMPT, SAMPLING, key=5) as tree:
        same(tree.nodes(), cold)
    assert engine.stats()["steps"] >= 70 // prefill_tokens


def test_preemption_changes_nothing(model: Model) -> None:
    """Branches that lose their pages under way are filled again and go on where they were."""

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(3)

    grown, preemptions = [], []
    for kv_tokens in (8192, 16 * 20):
        engine = Engine(model, kv_tokens=kv_tokens)
        trees = dict(engine.run(search, [prompt_of(40, seed=i) for i in range(4)], Sampling(max_tokens=60)))
        grown.append([node for i in range(4) for node in trees[i].nodes()])
        preemptions.append(engine.stats()["preemptions"])
        assert_idle(engine)
    same(*grown)
    assert preemptions[0] == 0 < preemptions[1]


@pytest.mark.parametrize("max_branches", [1, 2, 64])
def test_batch_mates_change_nothing(model: Model, cold: list[Node], max_branches: int) -> None:
    engine = Engine(model, kv_tokens=8192, max_branches=max_branches)
    others = [engine.tree(prompt_of(9 + i, seed=i)) for i in range(6)]
    tree = engine.tree(PROMPT, key=5)
    mates = [node for other in others for node in other.root.fork(2)]
    branches = tree.root.fork(3)
    widths = watch(engine, lambda: len(engine.scheduler.running))
    engine.extend([*mates[:5], branches[0], *mates[5:], *branches[1:]], SAMPLING)
    first, second, _ = branches
    engine.extend([*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)], SAMPLING)
    same(tree.nodes(), cold)
    for node in mates:
        assert np.array_equal(node.tokens, expected_tokens(model, node, SAMPLING))
    assert max(widths) == min(max_branches, 15)


def watch(engine: Engine, look: Callable[[], int]) -> list[int]:
    """What `look` says after every step from now on."""
    seen, step = [], engine.scheduler.step

    def watched(version: int, most: int = 1) -> list[Node] | None:
        finished = step(version)
        seen.append(look())
        return finished

    engine.scheduler.step = watched
    return seen


def test_run_grows_what_extend_grows(model: Model, cold: list[Node]) -> None:
    def search(tree: Tree) -> Iterator[list[Node]]:
        first, second, _ = yield tree.root.fork(3)
        yield [*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)]

    engine = Engine(model, kv_tokens=8192)
    prompts = [prompt_of(30, seed=1), PROMPT, prompt_of(31, seed=2)]
    trees = dict(engine.run(search, prompts, SAMPLING, keys=[3, 5, 4]))
    same(trees[1].nodes(), cold)
    assert_idle(engine)


def test_after_release_the_tree_goes_on_as_if_nothing_happened(model: Model, cold: list[Node]) -> None:
    engine = Engine(model, kv_tokens=8192)
    tree = engine.tree(PROMPT, key=5)
    first, second, _ = engine.extend(tree.root.fork(3), SAMPLING)
    engine.release()
    engine.release()
    assert not engine.cache.pool.layers
    engine.check_integrity()
    engine.extend([*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)], SAMPLING)
    same(tree.nodes(), cold)
    tree.close()
    engine.release()
    assert_idle(engine)


def test_a_cut_prompt_found_in_the_index_is_filled_once_for_all_its_branches(model: Model) -> None:
    engine = Engine(model, kv_tokens=2048)
    with engine.tree(PROMPT[:64]) as tree:
        expected = engine.extend(tree.root.fork(3), SAMPLING)
    with engine.tree(PROMPT[:64], key=0) as again:
        again.root.split(32)
        check_every_step(engine)
        same(engine.extend(again.prompt.fork(3), SAMPLING), expected)
    assert_idle(engine)


def test_compiled_and_reference_ops_sample_the_same_tree(model: Model, cold: list[Node]) -> None:
    with backend("reference"), grow(Engine(model, kv_tokens=8192), PROMPT, SAMPLING, key=5) as tree:
        same(tree.nodes(), cold)


def test_two_engines_and_the_process_do_not_disturb_each_other(model: Model, cold: list[Node]) -> None:
    before = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    one, two = Engine(model, kv_tokens=8192), Engine(tiny_model(seed=1), kv_tokens=512, seed=3, max_branches=2)
    ours, theirs = one.tree(PROMPT, key=5), two.tree(PROMPT, key=5)
    first, second, _ = one.extend(ours.root.fork(3), SAMPLING)
    other = two.extend(theirs.root.fork(2), SAMPLING)
    torch.rand(3)
    torch.set_rng_state(before[0])
    two.release()
    one.extend([*first.fork(2, at=max(len(first) // 2, 1)), *second.fork(1, at=len(second) - 1)], SAMPLING)
    same(ours.nodes(), cold)
    assert other[0].tokens.tolist() != first.prefix()[len(PROMPT) :][: len(other[0])].tolist()
    after = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert not torch.is_inference_mode_enabled()


def test_the_autocast_of_the_caller_reaches_no_step(how: str) -> None:
    """A trainer in mixed precision may sample and score where it stands: numbers are those of the model as it is."""
    model = tiny_model()
    suffix, found = prompt_of(20, seed=1), []
    for mixed in (False, True):
        engine = Engine(model, kv_tokens=8192)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), grow(engine, PROMPT, SAMPLING) as tree:
            found.append((tree.nodes(), engine.score(tree, [suffix])[0]))
    (expected, plain), (nodes, score) = found
    same(nodes, expected)
    np.testing.assert_allclose(score.logprob, plain.logprob, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(score.entropy, plain.entropy, rtol=0, atol=ROUNDING)


# ---- randomness ----------------------------------------------------------------------------------------------


def test_siblings_prompts_keys_and_seeds_all_differ() -> None:
    model = tiny_model()

    def tokens(seed: int, key: int | None) -> list[tuple[int, ...]]:
        engine = Engine(model, kv_tokens=4096, seed=seed)
        with engine.tree(PROMPT, key=key) as tree:
            nodes = engine.extend(tree.root.fork(8), Sampling(max_tokens=12))
            nodes += engine.extend(nodes[0].fork(8, at=3), Sampling(max_tokens=12))
        return [tuple(node.tokens.tolist()) for node in nodes[1:]]

    drawn = tokens(0, 0)
    assert len(set(drawn)) == 15
    for other in (tokens(0, 1), tokens(1, 0)):
        assert not set(drawn) & set(other)
    assert tokens(0, None) == drawn, "by default a tree's key is its place in the order of opening"


def test_the_same_prompt_twice_in_a_run_gives_different_samples_unless_the_keys_are_equal() -> None:
    engine = Engine(tiny_model(), kv_tokens=4096)

    def search(tree: Tree) -> Iterator[list[Node]]:
        yield tree.root.fork(4)

    def leaves(keys: list[int] | None) -> list[list[list[int]]]:
        trees = dict(engine.run(search, [PROMPT] * 2, Sampling(max_tokens=10), keys=keys))
        return [[leaf.tokens.tolist() for leaf in trees[i].leaves()] for i in range(2)]

    one, two = leaves(None)
    assert not any(tokens in two for tokens in one)
    one, two = leaves([7, 7])
    assert one == two
    assert engine.stats()["reused"] > 0


def test_equal_prompts_opened_at_once_are_computed_once() -> None:
    engine = Engine(tiny_model(), kv_tokens=4096)
    trees = [engine.tree(PROMPT) for _ in range(5)]
    engine.extend([node for tree in trees for node in tree.root.fork(2)], Sampling(max_tokens=1))
    stats = engine.stats()
    assert stats["reused"] == 4 * 64
    assert stats["computed"] == 70 + 4 * 6


# ---- forks ---------------------------------------------------------------------------------------------------


def test_a_fork_of_a_finished_node_goes_on_like_a_fresh_tree_on_the_same_prefix(model: Model) -> None:
    """Greedy, so that only what was cached can make a difference; at every kind of place, page ends included."""
    engine = Engine(model, kv_tokens=8192)
    with engine.tree(prompt_of(13)) as tree:
        [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=50))
        whole = leaf.prefix()
        for depth in (63, 62, 49, 48, 47, 33, 32, 31, 20, 14, 13):  # from the end: what is cut is the upper part
            node = next(node for node in leaf.path() if node.start < depth <= node.end)
            [ours] = engine.extend(node.fork(at=depth - node.start), replace(GREEDY, max_tokens=depth - 13 + 20))
            assert ours.start == depth
            same([ours], [node_on(model, whole[:depth].tolist(), replace(GREEDY, max_tokens=20))])
            assert ours.prefix()[:depth].tolist() == whole[:depth].tolist()
            engine.check_integrity()
        assert len(tree.nodes()) >= 20


def test_a_fork_within_the_prompt_samples_from_there(model: Model) -> None:
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(prompt_of(40)) as tree:
        [whole] = engine.extend(tree.root.fork(), GREEDY)
        [short] = engine.extend(whole.path()[0].fork(at=17), GREEDY)
        assert (short.start, short.end, whole.end) == (17, 70, 70)
        same([short], [node_on(model, prompt_of(40)[:17], replace(GREEDY, max_tokens=53))])
        engine.check_integrity()


# ---- sampler and trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=60),
        Sampling(max_tokens=60, temperature=0.7),
        Sampling(max_tokens=60, temperature=1.3, top_p=0.8),
        Sampling(max_tokens=60, top_k=5),
        Sampling(max_tokens=60, min_p=0.5),
    ],
    ids=["plain", "temperature", "top-p", "top-k", "min-p"],
)
def test_sampler_and_trainer_agree_on_logprob_and_entropy(sampling: Sampling) -> None:
    """On every edge of a forked tree, within fp32 rounding: the sampler's numbers are the trainer's old policy."""
    model = tiny_model()
    engine = Engine(model, kv_tokens=8192)
    with grow(engine, PROMPT, sampling) as tree:
        packed = tree.export()
    tokens, pos, end, row, token = (
        torch.from_numpy(array.copy())
        for array in (packed.tokens.astype(np.int64), packed.pos, packed.end, packed.edge_row, packed.edge_token)
    )
    with torch.no_grad():
        hidden = model.packed(tokens, pos, end)
        logprob, entropy = linear_logprob(hidden, model.head, row.long(), tokens[token.long()])
        tempered, _ = linear_logprob(
            hidden, model.head, row.long(), tokens[token.long()], temperature=sampling.temperature
        )
    assert len(token) > 150
    agree(packed.logprob_raw[packed.edge_token], logprob)
    agree(packed.entropy[packed.edge_token], entropy[row.long()])
    if (sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0, 0):
        agree(packed.logprob[packed.edge_token], tempered)
    else:  # renormalised over what was kept: never less likely
        assert (packed.logprob[packed.edge_token] >= tempered.numpy() - 1e-5).all()
        assert (packed.logprob[packed.edge_token] > tempered.numpy() + 0.01).any()
    assert not packed.logprob[: tree.prompt_len].any()


def agree(sampled: np.ndarray, trained: torch.Tensor) -> None:
    difference = np.abs(sampled - trained.numpy())
    assert difference.max() < 3e-5
    assert difference.mean() < 3e-6


# ---- how branches end ----------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_branch_and_is_kept() -> None:
    engine = Engine(tiny_model(), kv_tokens=8192)
    sampling = Sampling(max_tokens=40, stop_tokens=(2, 7, 11))
    with engine.tree(PROMPT) as tree:
        nodes = engine.extend(tree.root.fork(40), sampling)
    stopped = [node for node in nodes if node.finish == "stop"]
    assert len(stopped) > 20
    for node in nodes:
        stops = np.isin(node.tokens, (2, 7, 11))
        assert not stops[:-1].any()
        assert stops[-1] == (node.finish == "stop")
        assert node.finish == "stop" or len(node) == 40
        assert len(node) == len(node.logprob) == len(node.logprob_raw) == len(node.entropy) <= 40


def test_nothing_of_a_branchs_parameters_stays_behind_for_the_next() -> None:
    """Branches take over the places of finished ones; their stop tokens, temperature and cuts go with them."""
    engine = Engine(tiny_model(), kv_tokens=8192, max_branches=3)
    loose, strict = Sampling(max_tokens=20), Sampling(max_tokens=20, temperature=0, stop_tokens=tuple(range(30)))
    with engine.tree(PROMPT) as tree:
        for sampling in (strict, loose, replace(strict, top_k=2, top_p=0.5, min_p=0.3, temperature=0.5), loose):
            nodes = engine.extend(tree.root.fork(6), sampling)
            for node in nodes:
                assert np.array_equal(node.tokens, expected_tokens(engine.model, node, sampling))
            assert {node.finish for node in nodes} == {"length"} if sampling is loose else {"stop"}


def test_max_tokens_counts_from_the_end_of_the_prompt_wherever_the_fork_is() -> None:
    engine = Engine(tiny_model(), kv_tokens=8192)
    with engine.tree(PROMPT) as tree:
        [leaf] = engine.extend(tree.root.fork(), Sampling(max_tokens=20))
        nodes = engine.extend([*leaf.fork(at=13), *leaf.fork(), *tree.root.fork()], Sampling(max_tokens=25))
    assert [leaf.end, *(node.end for node in nodes)] == [90, 95, 95, 95]
    assert [len(node) for node in nodes] == [12, 5, 25]
    assert {node.finish for node in nodes} == {"length"}


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    engine = Engine(tiny_model(), kv_tokens=1024)
    with engine.tree(PROMPT) as tree:
        [free] = engine.extend(tree.root.fork(), replace(GREEDY, max_tokens=6))
        last = int(free.tokens[-1])
        n = free.tokens.tolist().index(last) + 1
        [node] = engine.extend(tree.root.fork(), replace(GREEDY, max_tokens=n, stop_tokens=(last,)))
    assert (len(node), node.finish) == (n, "stop")


def test_a_path_ends_at_the_models_context() -> None:
    engine = Engine(tiny_model(positions=50), kv_tokens=1024)
    with engine.tree(prompt_of(40)) as tree:
        [node] = engine.extend(tree.root.fork(), Sampling(max_tokens=400))
        assert (node.end, node.finish) == (50, "length")
        with pytest.raises(ValueError, match="starts at depth 50, but paths end at 50"):
            engine.extend(node.fork(), Sampling(max_tokens=400))


def test_greedy_is_the_most_likely_token_and_certain_of_it(model: Model) -> None:
    engine = Engine(model, kv_tokens=1024)
    with engine.tree(PROMPT) as tree:
        one, two = engine.extend(tree.root.fork(2), GREEDY)
    same([one], [two], atol=0)
    assert one.tokens.tolist() == path_logits(model, one.prefix())[one.start - 1 : -1].argmax(-1).tolist()
    assert not one.logprob.any()
    assert (one.logprob_raw < 0).all()
    assert (one.entropy > 0).all()


def test_branches_with_different_parameters_share_a_batch(model: Model) -> None:
    """A search that extends with parameters of its own while other branches are under way."""
    kinds = [
        Sampling(max_tokens=25),
        Sampling(max_tokens=33, temperature=0.6, top_p=0.7, stop_tokens=(4, 9, 2)),
        Sampling(max_tokens=20, top_k=3, stop_tokens=(2,)),
        Sampling(max_tokens=30, temperature=0),
    ]
    alone = []
    for i, sampling in enumerate(kinds):
        engine = Engine(model, kv_tokens=4096)
        with engine.tree(prompt_of(20, seed=i), key=i) as tree:
            alone += engine.extend(tree.root.fork(2), sampling)
    engine = Engine(model, kv_tokens=4096)
    nodes = []
    for i, sampling in enumerate(kinds):
        forks = engine.tree(prompt_of(20, seed=i), key=i).root.fork(2)
        engine._submit(forks, sampling)
        nodes += forks
    engine._step()
    assert len(engine.scheduler.running) == 8, "all of them are in one batch"
    while any(node.in_flight for node in nodes):
        engine._step()
    same(nodes, alone)


def test_siblings_are_not_looked_at_for_each_other() -> None:
    """Calls of Python a branch, generators' turns included, stay the same for twice and four times as many."""

    def calls(count: int) -> float:
        made = [0]

        def counting(frame: FrameType, event: str, arg: object) -> None:
            made[0] += event == "call"

        engine = Engine(tiny_model(), kv_tokens=16 * (count + 2), max_branches=32)
        with engine.tree([3, 4, 5]) as tree:
            nodes = tree.root.fork(n=count)
            sys.setprofile(counting)
            try:
                engine.extend(nodes, Sampling(max_tokens=2))
            finally:
                sys.setprofile(None)
        return made[0] / count

    few = calls(128)
    assert calls(256) < 1.1 * few
    assert calls(512) < 1.1 * few


def test_a_tree_that_is_kept_once_closed_keeps_no_engine() -> None:
    engine = Engine(tiny_model(), kv_tokens=1024)
    with engine.tree(PROMPT) as tree:
        engine.extend(tree.root.fork(n=3), SAMPLING)
        engine.score(tree, [[3, 4]], keep=True)
        tree.root.children[0].drop()
    pool = weakref.ref(engine.cache.pool)
    del engine
    gc.collect()
    assert pool() is None
    assert len(tree.leaves()) == 3
