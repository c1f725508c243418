"""A training step and its peers, measured in turns in one run.

OMP_NUM_THREADS=2 .venv/bin/python bench/train_peers.py [step long update ...] [--out FOLDER] [--repetitions N]

step    the built-in task with the warm-started built-in policy, 24 prompts a step: sampling, grading, update.
        `ibtpo train` with eight independent trajectories a prompt (grpo) and with IBTree's twelve (ib-tpo), against
        TRL's GRPOTrainer with eight: with generate, with continuous batching, and with our engine as rollout function
long    the same with two prompts of 512 tokens and eight trajectories of 32, where most tokens are shared; the policy
        is the one of parity.py, with random weights
update  the update alone, for the same trajectories, IBTree's for 24 prompts of the built-in task: packed as trees,
        packed as chains that share nothing, and by GRPOTrainer, to which a rollout function gives them

All compute in float32 and take one optimizer step of AdamW, without a KL penalty. Each training runs in a process of
its own, as its users run it, and stops between steps while it is the others' turn. Tokens are those of the
trajectories, each counted in full. Writes train_peers.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from parity import VOCABULARY, policy
from rich.console import Console
from rows import RESULTS, Call, Row, compare, write
from train_large import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ibtpo.advantage import NodeAdvantage, advantage
from ibtpo.config import DigitChainConfig, TrainConfig
from ibtpo.config_io import base_config, merge
from ibtpo.grow import Grower
from ibtpo.optim import MasterAdamW
from ibtpo.pack import MicroBatch, _first_fit, _side_by_side
from ibtpo.policy import load_policy
from ibtpo.search import make_search
from ibtpo.setup import make_engine, make_sampling
from ibtpo.steps import step_splitter
from ibtpo.tasks.digit_chain import DigitChain
from ibtpo.train import train
from ibtpo.trainer import START
from ibtpo.update import Updater
from ibtpo_engine import Tree, load_tokenizer, save_model

OnStep = Callable[[int], None]
"""Told the number of tokens of a step's trajectories; returns when the next step may begin."""
PROMPTS, TRAJECTORIES = 24, 8
LONG_PROMPTS, LONG, NEW = 2, 512, 32
NUM_PROMPTS = 4096  # more than any run gets to


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what is printed."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Training:
    """A training run in a process of its own; a call takes one step and returns the tokens of its trajectories."""

    def __init__(self, run: Callable[[OnStep], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.end, other = context.Pipe()
        self.process = context.Process(target=_train, args=(run, other))
        self.process.start()
        other.close()

    def __call__(self) -> int:
        self.end.send(None)
        told = self.end.recv()
        if isinstance(told, str):
            raise RuntimeError(told)
        return int(told)

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _train(run: Callable[[OnStep], None], end: Connection) -> None:
    """Run; after each step tell its number of tokens and wait for the next turn."""

    def on_step(tokens: int) -> None:
        end.send(tokens)
        end.recv()

    try:
        end.recv()
        with quiet():
            run(on_step)
        end.send("the run is over")
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        end.send(f"{type(error).__name__}: {error}")


def settings(preset: str, task: str, changes: dict[str, Any]) -> TrainConfig:
    """A preset with one optimizer step a training step, no KL penalty, and groups of equal rewards trained on, too."""
    alike = {
        "mini_batches": 1,
        "eval": {"prompts": 1, "samples": 1},
        "loss": {"kl_coef": 0.0},
        "advantage": {"uniform_groups": "ib_only"},  # TRL drops none
    }
    config = base_config(task=task, preset=preset, file=None, run=None)
    return merge(merge(config, alike, source="alike"), changes, source="changes")


def ours(preset: str, task: str, changes: dict[str, Any], on_step: OnStep) -> None:
    """`ibtpo train` with a preset; `changes` are settings."""
    config = settings(preset, task, changes | {"sampled_tokens": 1 << 40, "checkpoint_every": 1 << 20})
    log = Path(changes["out"]) / "metrics.jsonl"

    def after(step: int) -> None:
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        on_step(int(last["trajectory_tokens"]))

    os.chdir(log.parents[1])  # where rewards.py is looked for
    train(config, Console(quiet=True), after)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What GRPOTrainer is given.

    Attributes:
        model: checkpoint folder.
        prompts: texts in the order of training; reward: of the n-th one's completion.
        prompts_per_step, group, new: trajectories a prompt and their longest length.
        lr: learning rate.
        sampler: what samples.
        given: completions of a step by prompt, for `sampler` "given".
    """

    model: Path
    prompts: list[str]
    reward: Callable[[int, str], float]
    prompts_per_step: int
    group: int
    new: int
    lr: float
    sampler: Literal["generate", "continuous batching", "our engine", "given"] = "generate"
    given: dict[str, list[list[int]]] = field(default_factory=dict)


def trl(peer: Peer, on_step: OnStep) -> None:
    """TRL's GRPOTrainer."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from trl import GRPOConfig, GRPOTrainer  # slow to import, and not needed by the others
    from trl_grpo import TreeRollouts

    tokens = 0

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: object) -> list[float]:
        nonlocal tokens
        tokens = sum(map(len, completion_ids))
        return [peer.reward(i, text) for i, text in zip(number, completions, strict=True)]

    def given(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        left = {prompt: iter(peer.given[prompt]) for prompt in prompts}
        completions = [next(left[prompt]) for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            on_step(tokens)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(peer.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(peer.model),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text, "number": i} for i, text in enumerate(peer.prompts)]),
        rollout_func={"our engine": TreeRollouts(), "given": given}.get(peer.sampler),
        callbacks=[AfterStep()],
        args=GRPOConfig(
            output_dir=str(peer.model / "trl"),
            max_steps=1 << 20,
            per_device_train_batch_size=peer.prompts_per_step * peer.group,
            num_generations=peer.group,
            max_completion_length=peer.new,
            learning_rate=peer.lr,
            lr_scheduler_type="constant",
            beta=0.0,
            shuffle_dataset=False,
            use_transformers_continuous_batching=peer.sampler == "continuous batching",
            gradient_checkpointing=False,  # on by default, slower
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        ),
    )
    trainer.train()


class Derivation:
    """The reward of the built-in task; a problem is known by its number."""

    def __init__(self) -> None:
        self.task = DigitChain(DigitChainConfig())

    def __call__(self, number: int, completion: str) -> float:
        return self.task.grade(self.task.train_problem(number), completion, False)


def even(prompt: object, completion: str, *_: object, **__: object) -> float:
    """What random text gets about half of the time."""
    return float(len(completion) % 2 == 0)


@contextlib.contextmanager
def running(runs: dict[str, Callable[[OnStep], None]]) -> Iterator[dict[str, Call]]:
    """A process for each training; they are killed at the end."""
    trainings: dict[str, Training] = {}
    try:
        for who, run in runs.items():
            trainings[who] = Training(run)
        yield dict(trainings)
    finally:
        for training in trainings.values():
            training.close()


def warm_start(folder: Path) -> Path:
    """The built-in policy after its warm start, as a checkpoint folder."""
    flags = {"--sampled-tokens": 1, "--eval.prompts": 1, "--eval.samples": 1, "--out": folder}
    command = [str(Path(sys.executable).with_name("ibtpo")), "train", "--quiet"]
    command += [str(word) for flag in flags.items() for word in flag]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / START


def step(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    model = options.policy or warm_start(folder / "warm")
    task = DigitChain(DigitChainConfig())
    config = settings("grpo", task.name, {})
    peer = Peer(
        model=model,
        prompts=[task.train_problem(i).prompt for i in range(NUM_PROMPTS)],
        reward=Derivation(),
        prompts_per_step=PROMPTS,
        group=TRAJECTORIES,
        new=config.sampling.max_tokens,
        lr=config.optim.lr,
    )
    base = {"model": str(model), "prompts_per_step": PROMPTS}
    runs = {
        "ibtpo, grpo": partial(ours, "grpo", task.name, base | {"out": str(folder / "grpo")}),
        "ibtpo, ib-tpo": partial(ours, "ib-tpo", task.name, base | {"out": str(folder / "ib-tpo")}),
    } | peers(peer)
    with running(runs) as contenders:
        yield from compare("training step, built-in policy", PROMPTS, contenders, options.repetitions, settle=0.05)


def peers(peer: Peer) -> dict[str, Callable[[OnStep], None]]:
    """GRPOTrainer with everything that can sample here."""
    return {
        "TRL, generate": partial(trl, peer),
        "TRL, continuous batching": partial(trl, replace(peer, sampler="continuous batching")),
        "TRL, our engine": partial(trl, replace(peer, sampler="our engine")),
    }


def long(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    write_tokenizer(folder / "model", VOCABULARY)
    save_model(policy(torch.float32), load_tokenizer(folder / "model"), folder / "model")
    (folder / "rewards.py").write_text(inspect.getsource(even), encoding="utf-8")
    letters = np.random.default_rng(0).integers(97, 123, (NUM_PROMPTS // 16, LONG)).astype(np.uint8)
    prompts = [row.tobytes().decode() for row in letters]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts), encoding="utf-8")
    changes = {
        "model": str(folder / "model"),
        "data": str(data),
        "out": str(folder / "grpo"),
        "task": "jsonl",
        "reward": ["rewards:even"],
        "prompts_per_step": LONG_PROMPTS,
        "sampling": {"max_tokens": NEW, "temperature": 1.0, "top_p": 1.0},
        "search": {"group_size": TRAJECTORIES},
        "engine": {"kv_tokens": 8192},
    }
    peer = Peer(
        model=folder / "model",
        prompts=prompts,
        reward=even,
        prompts_per_step=LONG_PROMPTS,
        group=TRAJECTORIES,
        new=NEW,
        lr=1e-6,
    )
    with running({"ibtpo, grpo": partial(ours, "grpo", "jsonl", changes)} | peers(peer)) as contenders:
        yield from compare("training step, prompts of 512", LONG_PROMPTS, contenders, options.repetitions, settle=0.05)


def chains(one: NodeAdvantage, weight: float) -> Iterator[MicroBatch]:
    """The trajectories of a tree, sharing nothing."""
    assert one.a_trajectory is not None
    leaves = [node for node in one.packed.nodes if node.is_leaf]
    for leaf, a in zip(leaves, one.a_trajectory, strict=True):
        tokens = torch.from_numpy(leaf.prefix().astype(np.int64))
        first, n = leaf.tree.prompt_len, len(tokens) - 1  # nothing depends on the last
        old = np.concatenate([node.logprob for node in leaf.path()])[-(n + 1 - first) :]
        each = torch.ones(n + 1 - first)
        yield MicroBatch(
            tokens=tokens[:-1],
            pos=torch.arange(n),
            end=torch.full((n,), n, dtype=torch.int32),
            rows=torch.arange(first - 1, n),
            edge_row=torch.arange(len(each)),
            targets=tokens[first:],
            positive=each * weight * max(float(a), 0.0),
            negative=each * weight * min(float(a), 0.0),
            weight=each * weight,
            positive_weight=each * weight * float(a > 0),
            negative_weight=each * weight * float(a < 0),
            old_logprob=torch.from_numpy(old),
            multiplicity=each.long(),
            edge_tree=torch.zeros_like(tokens[first:]),
            edge_token=torch.arange(first, n + 1),
        )


def unshared(trees: list[NodeAdvantage], budget: int) -> list[MicroBatch]:
    """Micro-batches of all trajectories, each a tree of its own."""
    weight = 1 / sum(int(one.lengths.sum()) for one in trees)
    parts = [chain for one in trees for chain in chains(one, weight)]
    return [_side_by_side([parts[i] for i in chosen]) for chosen in _first_fit([*map(len, parts)], budget)]


def gradients(updater: Updater, batches: list[MicroBatch]) -> list[torch.Tensor]:
    updater._gradients(batches)
    found = [parameter.grad.clone() for parameter in updater.model.parameters() if parameter.grad is not None]
    updater.optimizer.discard()
    return found


def update(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    model = options.policy or warm_start(folder / "warm")
    task = DigitChain(DigitChainConfig())
    config = settings("ibtree-grpo", task.name, {"model": str(model), "optim": {"lr": 1e-6}})
    learner = load_policy(model, dtype=torch.float32, device=torch.device("cpu"))
    grower = Grower(make_engine(config, learner), task, learner.tokenizer, config.jsonl)
    splitter = step_splitter(learner.tokenizer, config.search)
    search = make_search(config.search, config.ib, splitter, config.sampling.max_tokens)
    problems = [task.train_problem(i) for i in range(PROMPTS)]
    trees, _ = grower.grow(problems, range(PROMPTS), search, make_sampling(config, learner))
    updater = Updater(learner.model, MasterAdamW(learner.model, config.optim), None, config)
    advantages = [advantage(tree.export(), tree.notes["ib"], config.advantage) for tree in trees]
    apart = unshared(advantages, config.micro_batch_tokens)
    for mine, theirs in zip(gradients(updater, updater._pack(advantages)), gradients(updater, apart), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    total = sum(int(one.lengths.sum()) for one in advantages)

    def packed() -> int:
        updater.update(trees)
        return total

    def flat() -> int:
        loss = sum(float(part["loss"]) for part in updater._gradients(apart))
        updater._step(loss)
        return total

    size = {len(tree.leaves()) for tree in trees}.pop()
    peer = Peer(
        model=model,
        prompts=[problem.prompt for problem in problems],
        reward=Derivation(),
        prompts_per_step=PROMPTS,
        group=size,
        new=config.sampling.max_tokens,
        lr=1e-6,
        sampler="given",
        given={p.prompt: completions(tree) for p, tree in zip(problems, trees, strict=True)},
    )
    shares = {
        "tokens packed as trees": sum(len(batch) for batch in updater._pack(advantages)),
        "tokens packed as chains": sum(map(len, apart)),
    }
    print(shares)
    with running({"TRL, trajectories given": partial(trl, peer)}) as theirs:
        contenders: dict[str, Call] = {"ibtpo, trees": packed, "ibtpo, chains": flat} | theirs
        yield from compare("update, built-in policy", PROMPTS, contenders, options.repetitions, settle=0.05)


def completions(tree: Tree) -> list[list[int]]:
    return [leaf.prefix()[tree.prompt_len :].tolist() for leaf in tree.leaves()]


CASES = {"step": step, "long": long, "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = f"which of {', '.join(CASES)}; default: all"
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=which)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--repetitions", type=int, default=15, metavar="N")
    parser.add_argument(
        "--policy",
        type=lambda text: Path(text).resolve(),
        metavar="FOLDER",
        help="the built-in policy after a warm start, if kept",
    )
    options = parser.parse_args()
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            write(options.out / "train_peers.csv", [*CASES[name](Path(folder), options)])
    print(f"wrote {options.out / 'train_peers.csv'}")


if __name__ == "__main__":
    main()
