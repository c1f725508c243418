"""A training run from its configuration to its report."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ibtpo.checkpoints import CHECKPOINTS, Checkpoint, weights_of
from ibtpo.config import TrainConfig
from ibtpo.console import say
from ibtpo.distributed import ALONE, Follower, Group, device_name
from ibtpo.environment import record_environment
from ibtpo.loggers import check_installed
from ibtpo.memory_fit import check_memory
from ibtpo.policy import Policy, adapters_of, built_in_policy, load_policy, model_shape, tokenizer_of
from ibtpo.pool_bound import pool_warning
from ibtpo.resume import allowed_changes, check_beginning, with_absolute_paths
from ibtpo.run_format import is_run
from ibtpo.runlog import REPORT, RunFolder, check_free
from ibtpo.setup import check_prompts, check_weights, choose_device, default_folder, longest_prompt, make_engine
from ibtpo.tasks import Task, TeachableTask, make_task
from ibtpo.trainer import Trainer
from ibtpo.viewer import export_page
from ibtpo_engine import CheckpointError

_FROZEN_BY_PYTHON = 1000
"""Python 3.12 counts some hundred objects of its own among the frozen; whoever freezes has more."""


def train(
    config: TrainConfig,
    console: Console,
    on_step: Callable[[int], None] = lambda step: None,
    group: Group = ALONE,
) -> Path:
    """Run or resume a training run to its end.

    The input is checked before the run folder is made.

    Args:
        on_step: called with the number of each training step, once it is logged and saved; an exception ends the run.
        group: the processes of the run, each of which calls this; rank 0 writes the folder.

    Returns:
        the run folder; the trained policy is its last checkpoint.

    Raises:
        ValueError: the input is invalid; the message names file, field and remedy.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP, with a checkpoint to continue from.
        NonFinite: NaN or Inf in loss, gradient or weights; the last checkpoint is from before.
        GraderError, OutOfPages: the run cannot go on; it is saved up to its last step, and a note says how to resume.
    """
    _check_combinations(config, group)
    check_installed(config.log)
    if group.leads and config.resume is None and config.out is not None:
        check_free(config.out)
    config = with_absolute_paths(config)
    config = replace(config, model=_model(config, console, group))
    settings = replace(config, resume=None)  # as written to the folder
    with ExitStack() as stack:
        folder = None
        if config.resume is not None:
            folder = stack.enter_context(_reopened(config.resume, settings, console, group))
            check_beginning(config, folder.last)
        source = config.model if folder is None or folder.last is None else folder.last.path
        began_with = None if source == config.model else config.model
        task = stack.enter_context(closing(make_task(config)))  # before the plan: a wrong file is reported at once
        if source == "built-in" and not isinstance(task, TeachableTask):
            raise ValueError(
                f"model: the built-in policy knows the characters of digit-chain only, task {task.name} needs a "
                "checkpoint; give one with --model DIR"
            )
        mode, plan = check_memory(
            config,
            model_shape(source, began_with),
            choose_device(device_name(config)),
            group,
            longest_prompt=lambda: _longest_prompt(task, config, source, began_with),
        )
        say(console, str(plan), style="dim")
        if group.size > 1:
            say(console, f"{group.size} processes, {mode}")
        policy = _policy(config, source, began_with)
        _check_input(config, policy, task, source, console)
        engine = make_engine(config, policy)
        if folder is None:
            folder = stack.enter_context(_created(config.out or default_folder(config), settings, group))
        if group.leads and (differences := record_environment(folder.path)):
            say(console, f"continues with other versions: {', '.join(differences)}")
        gc.collect()
        if gc.get_freeze_count() < _FROZEN_BY_PYTHON:  # what the calling process has frozen remains so
            gc.freeze()  # objects loaded so far stay, so the garbage collector need not visit them
            stack.callback(gc.unfreeze)
        trainer = Trainer(config, folder, policy, task, engine, console, on_step, plan, group=group, mode=mode)
        if config.resume is not None:
            trainer.resume()
            folder.configure(settings)  # only now: settings that cannot be used must not be written to the folder
        _run(trainer)
    return folder.path


def _check_combinations(config: TrainConfig, group: Group) -> None:
    """Check for settings that are valid alone but not together.

    Raises:
        ValueError: the message names both.
    """
    search, advantage = config.search, config.advantage
    if config.lora.rank and config.model == "built-in":
        raise ValueError(
            "lora.rank: the built-in policy has no adapters; set it to 0, or give a checkpoint with --model"
        )
    if config.parity == "bitwise" and adapters_of(config) is not None:
        trained = f"lora.rank: {config.lora.rank} trains adapters" if config.lora.rank else "model: it is an adapter"
        raise ValueError(
            f"{trained}, and parity=bitwise does not support adapters; use --parity fast, or train the weights"
        )
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature: 0 is greedy, so all trajectories would be equal; set it above 0")
    if search.redraws > 0 and advantage.uniform_groups != "skip":
        raise ValueError(
            f"search.redraws: {search.redraws} draws new prompts for groups of equal rewards, but "
            f"advantage.uniform_groups={advantage.uniform_groups} trains on these; set it to skip, or redraws to 0"
        )
    if search.redraws > 0 and advantage.kind == "vineppo":
        raise ValueError(
            f"search.redraws: {search.redraws} draws new prompts for groups of equal rewards, but "
            "advantage.kind=vineppo learns from these too, by the values of their steps; set redraws to 0"
        )
    if advantage.kind == "treepo" and advantage.uniform_groups != "skip":
        raise ValueError(
            f"advantage.uniform_groups: {advantage.uniform_groups} would keep groups of equal rewards, and the "
            "whitening of advantage.kind=treepo would give them advantages without any reward; set it to skip"
        )
    if advantage.kind == "vineppo" and advantage.uniform_groups != "skip":
        raise ValueError(
            f"advantage.uniform_groups: {advantage.uniform_groups} does not apply to advantage.kind=vineppo, which "
            "skips groups by the values of their steps, not by their rewards; set it to skip"
        )


def _model(config: TrainConfig, console: Console, group: Group) -> str:
    """The model the run begins with, as recorded in its folder; if `model` is a run, rank 0 picks the checkpoint."""
    model = config.model
    needed = config.resume is None or config.needs_reference or is_run(Path(model))
    if group.leads and needed and Path(model).is_dir():
        path = weights_of(Path(model), lambda text: say(console, text))
        model = str(path)
        if config.needs_reference and config.resume is None and path.parent.name == CHECKPOINTS:
            say(
                console,
                f"the run needs {path} as the reference policy until it ends, and also to be resumed; if the run that "
                "wrote this checkpoint continues, it may delete it, so use a copy",
            )
    return group.gather(model, "choose the model")[0]


def _created(path: Path, settings: TrainConfig, group: Group) -> RunFolder:
    """The folder of a new run, made by rank 0."""
    if group.leads:
        folder = RunFolder.create(path, settings)
        group.gather(folder.path, "make the run folder")
        return folder
    return Follower(group.gather(path, "make the run folder")[0], None)


def _reopened(path: Path, settings: TrainConfig, console: Console, group: Group) -> RunFolder:
    """The folder of a resumed run, opened by rank 0; all processes resume from the same checkpoint."""
    if group.leads:
        changes = allowed_changes(path, settings)
        folder = RunFolder.open(path, settings, say=lambda text: say(console, text))
        if changes:  # only now: a folder that cannot be written is refused first
            say(console, f"continues with other settings: {changes}")
        group.gather(folder.last, "open the run folder")
        return folder
    nothing: Checkpoint | None = None
    last = group.gather(nothing, "open the run folder")[0]
    if last is not None and not last.path.is_dir():
        raise ValueError(f"resume: {last.path} is not seen from every node; put the run on a disk that all share")
    return Follower(path, last)


def _longest_prompt(task: Task, config: TrainConfig, source: Path | str, began_with: str | None) -> int:
    """Tokens of the longest prompt, before the policy is loaded; 0 if the folder has no tokenizer yet."""
    try:
        tokenizer = tokenizer_of(source, began_with)
    except CheckpointError:  # to find settings that fit, the model's config.json alone is enough
        return 0
    return longest_prompt(task, tokenizer, config)


def _policy(config: TrainConfig, source: Path | str, began_with: str | None) -> Policy:
    dtype, device = getattr(torch, config.dtype), choose_device(device_name(config))
    if source == "built-in":
        policy = built_in_policy(config.seed, dtype=dtype, device=device)
    else:
        policy = load_policy(source, dtype=dtype, device=device, began_with=began_with)
    policy.adapt(config.lora, config.seed)
    return policy


def _check_input(config: TrainConfig, policy: Policy, task: Task, source: Path | str, console: Console) -> None:
    check_weights(policy, str(source))
    notes = check_prompts(task, policy, config)
    warning = pool_warning(
        config,
        longest_prompt=lambda: longest_prompt(task, policy.tokenizer, config),
        context=policy.model.config.max_positions,
    )
    for note in [*notes, *([warning] if warning else [])]:
        say(console, note, style="dim")
    task.train_problem(0)  # raises now, not after the first evaluation, if no row is left for training


def _run(trainer: Trainer) -> None:
    """Train, and write the report even if that fails."""
    path = trainer.folder.path
    try:
        trainer.run()
    finally:
        try:
            if trainer.group.leads:
                export_page([path], path / REPORT, trees=trainer.config.report_trees)
        except (OSError, ValueError) as error:  # must not hide the run's own error, nor make a finished run fail
            say(trainer.console, f"no report was written: {error}")
