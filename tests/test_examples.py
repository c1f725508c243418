"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from completion_server import serving
from engine_helpers import assert_idle, prompt_of, tiny_model

from ibtpo.policy import built_in_policy, load_policy
from ibtpo.steps import StepSplitter
from ibtpo_engine import Engine, EngineBackend, Growth, Node, Sampling, Tree, load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
PROBLEMS = ["7*8-5=?", "3+9*4=?"]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    return folder


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    example(name).main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("mcts", r"{} \d+ trajectories, best reward 0\.[1-9]\d"),
        ("best_of_n", r"{} \d+ steps, mean process reward 0\.\d\d"),
        ("eptree", r"{} 18 trajectories, \d+ tokens long, \d+ sampled"),
    ],
)
def test_it_prints_a_line_a_problem_with_and_without_a_checkpoint(
    name: str, pattern: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = []
    for flags in ([], ["--model", str(checkpoint)]):
        outs.append(printed(name, monkeypatch, capsys, *flags, *PROBLEMS))
        for problem in PROBLEMS:
            assert any(re.fullmatch(pattern.format(re.escape(problem)), line) for line in outs[-1])
    assert outs[0] == outs[1]  # the same weights either way


@pytest.mark.parametrize("name", ["mcts", "best_of_n", "eptree", "remote_search"])
def test_help_says_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        printed(name, monkeypatch, capsys, "--help")
    assert "--model" in capsys.readouterr().out


def test_a_search_of_your_own_fits_a_page() -> None:
    assert len((EXAMPLES / "mcts.py").read_text(encoding="utf-8").splitlines()) < 60


# ---- MCTS ----------------------------------------------------------------------------------------------------


def test_mcts_spends_its_rounds_where_the_reward_is() -> None:
    """Rewarded for its first token alone, it comes back to the rewarded children of the root most of the time."""
    mcts, engine = example("mcts"), Engine(tiny_model(), kv_tokens=8192)
    splitter = StepSplitter(_Words(), step_tokens=4)
    trees = engine.run(
        lambda tree: mcts.mcts(tree, splitter, simulations=60),
        [prompt_of(5, seed=i) for i in range(8)],
        Sampling(max_tokens=12),
        reward=lambda tree, leaf: float(leaf.prefix()[tree.prompt_len] % 3 == 0),
    )
    shares = []
    for _, tree in trees:
        visits = {child: len(child.notes["rewards"]) for child in tree.root.children}
        assert sum(visits.values()) == 60 == len(tree.root.notes["rewards"])
        assert all(len(node.children) <= 3 for node in tree.nodes())
        good = [count for child, count in visits.items() if child.tokens[0] % 3 == 0]
        if 0 < len(good) < 3:  # otherwise there was nothing to choose
            shares.append(sum(good) / 60 - len(good) / 3)
    assert len(shares) >= 3
    assert min(shares) > 0.1
    assert_idle(engine)


class _Words:
    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        return "w" * len(token_ids)


# ---- best-of-n -----------------------------------------------------------------------------------------------


def test_best_of_n_goes_on_from_the_best_step_each_time() -> None:
    """Every step kept has the highest process reward among the n that were graded; the losers are dropped."""
    best_of_n, engine = example("best_of_n"), Engine(tiny_model(), kv_tokens=8192)
    graded: dict[tuple[int, int], list[tuple[float, Node]]] = {}

    def reward(tree: Tree, step: Node) -> float:
        value = float(step.tokens.sum() % 7)
        graded.setdefault((tree.key, step.start), []).append((value, step))
        return value

    newlines, end, prompts = (4, 5, 6, 7, 8, 9), 2, [prompt_of(6, seed=i) for i in range(6)]
    sampling = Sampling(max_tokens=40, stop_tokens=(*newlines, end))
    num_steps = 0
    for _, tree in engine.run(best_of_n.best_of_n(5, (end,), 40), prompts, sampling, reward=reward):
        [leaf] = tree.leaves()
        steps = leaf.path()[1:]
        num_steps += len(steps)
        assert len(tree.nodes()) == len(steps) + 1
        for step in steps:
            candidates = graded[tree.key, step.start]
            assert len(candidates) == 5
            assert step.reward == max(value for value, _ in candidates)
            assert [other for _, other in candidates if not other.dropped] == [step]
            assert step is leaf or int(step.tokens[-1]) in newlines
        assert int(leaf.tokens[-1]) == end or leaf.end == 46
    assert num_steps > 12
    assert_idle(engine)


def test_the_process_reward_checks_the_arithmetic() -> None:
    step_reward = example("best_of_n").step_reward
    assert [step_reward(step) for step in ("7*8=6\n", "7*8=5\n", "1.", "1", "7*8=6", "")] == [1.0, 0.5, 0.5, 0, 0, 0]


# ---- EPTree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "rounds", "t"), [(2, 1, 1, 1), (6, 2, 1, 2), (3, 4, 3, 2)])
def test_eptree_branches_before_the_most_surprising_tokens(m: int, n: int, rounds: int, t: int) -> None:
    """Against a plain account of every round: the leaves' tokens and log-probs, no tree, sorted by surprisal."""
    eptree, engine = example("eptree"), Engine(tiny_model(), kv_tokens=8192)
    deepest, turns = 15, 0

    def search(tree: Tree) -> Growth:
        nonlocal turns
        growth = eptree.eptree(m, n, rounds, t, deepest=deepest)(tree)
        branches, starts = next(growth), set()
        assert [branch.parent for branch in branches] == [tree.root] * m
        while True:
            leaves = yield branches
            starts |= {leaf.prefix()[: leaf.start + 1].tobytes() for leaf in leaves}
            expected = []
            for chain in tree.root.children:
                surprisal: dict[bytes, float] = {}  # prefix that ends with a token -> -log p of it
                for leaf in chain.leaves():
                    logprob = np.concatenate([node.logprob for node in leaf.path()])
                    for depth in range(tree.prompt_len, min(leaf.end, tree.prompt_len + deepest)):
                        surprisal[leaf.prefix()[: depth + 1].tobytes()] = -logprob[depth]
                # a position that was branched at once has siblings, so the token that first stood there counts as one
                heads = {node.prefix()[: node.start + 1].tobytes() for node in chain.walk()}
                ranked = sorted(surprisal.keys() - heads, key=lambda prefix: -surprisal[prefix])
                expected += [prefix[:-4] for prefix in ranked[:n]]
            assert starts <= {node.prefix()[: node.start + 1].tobytes() for node in tree.nodes()}
            expected.sort()
            try:
                branches = growth.send(leaves)
            except StopIteration:
                return
            turns += 1
            parents = [branch.parent.prefix().tobytes() for branch in branches]
            assert sorted(set(parents)) == expected
            assert all(parents.count(parent) == t for parent in parents)

    trees = [tree for _, tree in engine.run(search, [prompt_of(6, seed=i) for i in range(3)], Sampling(max_tokens=20))]
    assert turns == 3 * rounds
    assert [len(tree.leaves()) for tree in trees] == [m * (1 + rounds * n * t)] * 3
    assert_idle(engine)


def test_eptree_stops_branching_where_no_token_may_be_picked() -> None:
    eptree, engine = example("eptree"), Engine(tiny_model(), kv_tokens=8192)
    [(_, tree)] = engine.run(eptree.eptree(3, rounds=2, deepest=1), [prompt_of(6)], Sampling(max_tokens=5))
    assert len(tree.leaves()) == 3


# ---- a server, and another trainer ---------------------------------------------------------------------------


def test_the_remote_search_runs_against_a_server(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(EngineBackend(Engine(load_model(checkpoint), kv_tokens=8192))) as server:
        flags = ["--url", server.url, "--model", "tiny", "--tokenizer", str(checkpoint), "--max-tokens", "30"]
        lines = printed("remote_search", monkeypatch, capsys, *flags, "7*8=?\n", "2+2=?\n")
        assert sorted(lines)[0].startswith(r"'2+2=?\n': 10 trajectories, ")
        assert len(server.requests) == sum(int(re.search(r"(\d+) trajectories", line)[1]) for line in lines)


def two_then_forks(n: int) -> Any:
    """A search whose trees have `n` leaves that share more than the prompt."""

    def search(tree: Tree) -> Growth:
        leaves = yield tree.root.fork(n // 2)
        yield [leaf.fork(at=len(leaf) // 2)[0] for leaf in leaves]

    return search


@pytest.mark.parametrize(
    ("search", "rank"), [(None, 0), (two_then_forks, 0), (two_then_forks, 2)], ids=["chains", "tree", "adapter"]
)
def test_grpo_trainer_trains_on_what_the_engine_samples(
    search: Any, rank: int, checkpoint: Path, tmp_path: Path
) -> None:
    """Each prompt is one tree; ids and log-probs are those of the trainer's own model at that very update.

    For the reference of its KL penalty TRL switches the adapter off; when it samples again, it is on.
    """
    pytest.importorskip("trl", reason="TRL is not installed")
    if rank:
        pytest.importorskip("peft", reason="PEFT is not installed")
    trl_grpo, trl = example("trl_grpo"), importlib.import_module("trl")
    from datasets import Dataset  # comes with TRL
    from transformers import AutoModelForCausalLM

    rollouts = trl_grpo.TreeRollouts(*([] if search is None else [search]), kv_tokens=4096, seed=3)
    differences, seen, weights, ends = [], [], [], set()

    def watched(prompts: list[str], trainer: Any) -> dict[str, Any]:
        result = rollouts(prompts, trainer)
        seen.append(prompts)
        weights.append([p for p in trainer.model.parameters() if p.requires_grad][-1].detach().clone())
        rows = zip(result["prompt_ids"], result["completion_ids"], result["logprobs"], strict=True)
        for prompt, completion, logprobs in rows:
            assert len(completion) == len(logprobs) > 0
            assert not stops & set(completion[:-1])
            ends.add(completion[-1])
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            own = (logits / trainer.args.temperature).log_softmax(-1)[range(len(completion)), completion]
            differences.append(float((own - torch.tensor(logprobs)).abs().max()))
        return result

    policy = load_policy(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    equals = policy.tokenizer.encode("=")[0]
    stops = {policy.tokenizer.eos_token_id, equals}  # several, as Llama 3.1 has
    model.generation_config.eos_token_id = sorted(stops)
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=policy.tokenizer,
        reward_funcs=trl_grpo.reward,
        train_dataset=Dataset.from_list([{"prompt": problem + "\n"} for problem in PROBLEMS]),
        rollout_func=watched,
        peft_config=trl_grpo.lora(rank) if rank else None,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=12,
            temperature=0.8,
            learning_rate=1e-3,
            beta=0.1 if rank else 0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        ),
    )
    trainer.train()
    assert len(seen) == 3
    assert all(sorted(prompts) == sorted([p + "\n" for p in PROBLEMS] * 4) for prompts in seen)
    assert rollouts.num_trees == 6
    assert rollouts.engine.version == 3
    assert len(differences) == 24
    assert equals in ends
    assert max(differences) < 2e-5
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))
    assert set(map(id, rollouts.engine.model.parameters())) == set(map(id, trainer.model.parameters()))
    assert_idle(rollouts.engine)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_grpo_example_runs(
    rank: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    flags = ["--model", str(checkpoint), "--output", str(tmp_path), "--steps", "2", "--rank", str(rank)]
    lines = printed("trl_grpo", monkeypatch, capsys, *flags, *PROBLEMS)
    assert re.fullmatch(r"4 trees, \d+ tokens sampled by the engine", lines[-1])


def test_the_grpo_example_asks_for_a_full_batch(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    with pytest.raises(SystemExit):
        printed("trl_grpo", monkeypatch, capsys, "--model", str(checkpoint), "7*8-5=?")
    assert "takes two problems" in capsys.readouterr().err


def test_completions_are_sampled_as_the_trainer_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """TRL's own `GenerationConfig`, made of the same settings, is the witness."""
    pytest.importorskip("trl", reason="TRL is not installed")
    trl_grpo, trl = example("trl_grpo"), importlib.import_module("trl")
    from datasets import Dataset  # comes with TRL
    from transformers import AutoModelForCausalLM

    def sampling(**settings: Any) -> tuple[Sampling, Any]:
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            processing_class=load_policy(checkpoint, dtype=torch.float32, device=torch.device("cpu")).tokenizer,
            reward_funcs=trl_grpo.reward,
            train_dataset=Dataset.from_list([{"prompt": "7*8=?"}] * 8),
            args=trl.GRPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, **settings),
        )
        return trl_grpo.TreeRollouts._sampling(trainer), trainer.generation_config

    ours, theirs = sampling(
        temperature=0.8, top_k=7, top_p=0.9, max_completion_length=33, repetition_penalty=1.0,
        generation_kwargs={"min_p": 0.1, "top_k": 5, "min_new_tokens": 2, "suppress_tokens": [4, 6], "do_sample": True},
    )  # fmt: skip
    assert (ours.temperature, ours.top_p, ours.top_k, ours.min_p) == (0.8, 0.9, 5, 0.1)
    assert (ours.temperature, ours.top_p) == (theirs.temperature, theirs.top_p)
    assert (ours.top_k, ours.min_p) == (theirs.top_k, theirs.min_p)
    assert (ours.min_tokens, ours.max_tokens) == (theirs.min_new_tokens, theirs.max_new_tokens) == (2, 33)
    assert list(ours.stop_tokens) == theirs.eos_token_id
    assert ours.logit_bias == dict.fromkeys(theirs.suppress_tokens, -np.inf)
    assert sampling(generation_kwargs={"max_new_tokens": 4, "eos_token_id": 3})[0] == Sampling(
        max_tokens=4, stop_tokens=(3,)
    )
    for refused in ({"repetition_penalty": 1.05}, {"generation_kwargs": {"num_beams": 4}}):
        with pytest.raises(ValueError, match=r"does not sample with \{'(repetition_penalty': 1.05|num_beams': 4)\}"):
            sampling(**refused)


def test_a_search_with_another_number_of_leaves_is_refused(checkpoint: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    trl_grpo = example("trl_grpo")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = load_policy(checkpoint, dtype=torch.float32, device=torch.device("cpu")).tokenizer
    rollouts = trl_grpo.TreeRollouts(lambda n: two_then_forks(n - 1), kv_tokens=4096)
    with pytest.raises(ValueError, match="grew 2 completions of .*wants 4"):
        rollouts(["7*8=?\n"] * 4, _Trainer(model, tokenizer))


def test_the_chat_template_is_given_what_the_trainer_says(checkpoint: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    tokenizer = load_policy(checkpoint, dtype=torch.float32, device=torch.device("cpu")).tokenizer
    tokenizer.chat_template = "{{ messages[0].content }}{% if twice %}{{ messages[0].content }}{% endif %}"
    prompt = [{"role": "user", "content": "7*8=?"}]
    encoded = example("trl_grpo").TreeRollouts._encode(prompt, _Trainer(None, tokenizer))
    assert encoded == tokenizer.encode("7*8=?7*8=?")


class _Trainer:
    """As much of a GRPOTrainer as a rollout function looks at."""

    class accelerator:
        process_index = 0

        @staticmethod
        def unwrap_model(model: Any) -> Any:
            return model

    class args:
        temperature, top_p, top_k, min_p, max_completion_length = 1.0, 1.0, None, None, 9
        repetition_penalty, generation_kwargs = 1.0, None

    chat_template_kwargs: ClassVar[dict[str, Any]] = {"twice": True}

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.processing_class = tokenizer
        self.eos_token_ids = [tokenizer.eos_token_id]
