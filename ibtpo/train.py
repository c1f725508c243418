"""A training run from its configuration to its report."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ibtpo.config import TrainConfig
from ibtpo.policy import built_in_policy, load_policy
from ibtpo.report import write_report
from ibtpo.runlog import RunFolder, latest_checkpoint
from ibtpo.setup import check_prompts, choose_device, default_folder, make_engine
from ibtpo.tasks import TeachableTask, make_task
from ibtpo.trainer import Trainer
from ibtpo_engine import OutOfPages


def train(config: TrainConfig, console: Console) -> Path:
    """Run or resume a training run to its end.

    Everything that can be wrong with the input is checked before the run folder is made.

    Returns:
        the run folder; the trained policy is its last checkpoint.

    Raises:
        ValueError: the input cannot be used; the message names file, field and remedy.
        Interrupted: stopped by Ctrl-C or SIGTERM, with a checkpoint to continue from.
    """
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature: 0 is greedy, all trajectories would be alike; set it above 0 to train")
    if config.search.redraws > 0 and config.advantage.uniform_groups != "skip":
        raise ValueError(
            f"search.redraws: {config.search.redraws} draws again for groups of equal rewards, on which "
            f"advantage.uniform_groups={config.advantage.uniform_groups} trains; set it to skip, or redraws to 0"
        )
    out = config.resume or config.out or default_folder(config)
    source: Path | str = config.model
    if config.resume is not None and (last := latest_checkpoint(config.resume)) is not None:
        source = last.path
    dtype, device = getattr(torch, config.dtype), choose_device(config.device)
    if source == "built-in":
        policy = built_in_policy(config.seed, dtype=dtype, device=device)
    else:
        policy = load_policy(source, dtype=dtype, device=device)
    policy.adapt(config.lora, config.seed)
    task = make_task(config)
    try:
        if source == "built-in" and not isinstance(task, TeachableTask):
            raise ValueError(
                f"model: the built-in policy knows the characters of digit-chain only, task {task.name} needs a "
                "checkpoint; give one with --model DIR"
            )
        check_prompts(task, policy, config)
        engine = make_engine(config, policy)
        settings = replace(config, resume=None)  # what the folder says the run is
        opened = RunFolder.create(out, settings) if config.resume is None else RunFolder.open(out, settings)
        gc.collect()
        gc.freeze()  # what is loaded by now stays; the collector need not walk it while trees come and go
        with opened as folder:
            trainer = Trainer(config, folder, policy, task, engine, console)
            if config.resume is not None:
                trainer.resume()
            try:
                trainer.run()
            except OutOfPages as error:
                raise OutOfPages(
                    f"{error}; in a run: --engine.kv-tokens, and --resume {out} goes on from the last checkpoint"
                ) from None
            finally:
                write_report(out)
    finally:
        gc.unfreeze()
        task.close()
    return out
