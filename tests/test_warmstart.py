"""The warm start ends when the policy is near its teacher, sooner or later, or when its updates are used up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ibtpo.checkpoints import latest_checkpoint
from ibtpo.cli import main
from ibtpo.config import DigitChainConfig, WarmStartConfig
from ibtpo.config_io import base_config
from ibtpo.grow import Grower
from ibtpo.policy import built_in_policy
from ibtpo.setup import make_engine
from ibtpo.tasks import DigitChain
from ibtpo.warmstart import CHECK_EVERY, FINAL_RATE, WINDOW, PassShare, WarmStart, _Schedule, warm_start
from ibtpo_engine import Sampling

CONFIG = WarmStartConfig(excess=0.5, decay_updates=4, max_updates=40, batch_size=4)


def _rates(config: WarmStartConfig, excess: list[float]) -> list[float]:
    """The rate of every update, where the mean excess loss after update u is excess[u]."""
    schedule, rates = _Schedule(config), []
    while schedule.updates < schedule.total:
        rates.append(schedule.rate())
        schedule.advance(excess[schedule.updates])
    return rates


def test_rate_falls_once_the_loss_is_near_the_teachers() -> None:
    """Low at update 20, and never mind that it rises again: four updates later all is over."""
    rates = _rates(CONFIG, [1.0] * 20 + [0.4] + [1.0] * 20)
    assert rates[:21] == [1.0] * 21
    assert rates[21:] == pytest.approx([0.868198, 0.55, 0.231802, FINAL_RATE], abs=1e-6)


def test_first_updates_alone_do_not_end_it() -> None:
    assert len(_rates(CONFIG, [0.0] * 40)) == WINDOW + CONFIG.decay_updates


@pytest.mark.parametrize("decay_updates", [4, 40, 100])
def test_updates_never_exceed_the_limit(decay_updates: int) -> None:
    rates = _rates(replace(CONFIG, decay_updates=decay_updates), [1.0] * 40)
    assert len(rates) == CONFIG.max_updates
    assert rates[-1] == pytest.approx(FINAL_RATE if decay_updates <= 40 else 0.68, abs=0.02)


def test_policy_comes_near_its_teacher() -> None:
    """One operation, a teacher that errs a lot: the loss ends between the teacher's entropy and the bar."""
    torch.set_num_threads(1)
    task = DigitChain(DigitChainConfig(min_ops=1, max_ops=1, teacher_exponent=1.0), 0)
    policy = built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))
    config = WarmStartConfig(excess=0.3, decay_updates=20, max_updates=400, batch_size=32)
    seen: list[WarmStart] = []
    end = warm_start(policy, task, config, seed=0, on_update=seen.append)
    assert end == seen[-1]
    assert WINDOW + config.decay_updates < end.updates == end.total == len(seen) < config.max_updates
    assert 0.0 < end.excess < config.excess < seen[10].excess
    assert all(state.total == config.max_updates for state in seen[: -config.decay_updates - 1])


def test_rate_falls_only_once_the_pass_rate_suffices_too() -> None:
    """Low loss from the start; the share is asked for every 25 updates, and the third answer is enough."""
    config = replace(CONFIG, max_updates=200, pass_share=0.4)
    answers = iter([0.1, 0.39, 0.4])
    schedule = _Schedule(config, lambda: next(answers))
    while schedule.updates < schedule.total:
        schedule.advance(0.0)
    assert schedule.updates == WINDOW + 2 * CHECK_EVERY + config.decay_updates


def test_pass_share_compares_policy_and_teacher() -> None:
    """A policy that has learnt nothing has none of the teacher's rate; a teacher never right does not divide by 0."""
    torch.set_num_threads(1)
    config = base_config(task=None, preset="grpo", file=None, run=None)
    task = DigitChain(DigitChainConfig(min_ops=1, max_ops=1), 0)
    policy = built_in_policy(0, dtype=torch.float32, device=torch.device("cpu"))
    grower = Grower(make_engine(config, policy), task, policy.tokenizer, config.jsonl)
    problems = [task.train_problem(index) for index in range(8)]
    share = PassShare(grower, task, Sampling(max_tokens=8, stop_tokens=policy.stops), problems, 0)
    assert 0.5 < share._teacher <= 1.0  # one operation, mean error rate .18
    assert share() == 0.0


def test_bf16_training_goes_on_from_the_warm_start(tmp_path: Path) -> None:
    """The optimizer's fp32 masters are those of the warm-started policy, not of the random one before it.

    At this rate no weight moves far enough to be rounded elsewhere, which at 1e-9 some two of them do.
    """
    arguments = [
        "--dtype", "bfloat16", "--optim.lr", "1e-12", "--advantage.uniform-groups", "ib_only",
        "--warm-start.max-updates", "12", "--warm-start.decay-updates", "4", "--warm-start.pass-share", "0",
        "--sampled-tokens", "200", "--prompts-per-step", "2", "--eval.prompts", "2", "--eval.samples", "1",
    ]  # fmt: skip
    assert main(["train", "--quiet", "--out", str(tmp_path / "run"), *arguments]) == 0
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "run" / "start", last.path))
    assert json.loads((last.path / "state.json").read_text())["step"] > 0
    assert "exp_avg.model.norm.weight" in load_file(last.path / "optimizer.safetensors")  # it did step
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
