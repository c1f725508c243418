"""The settings a resumed run may change, and those it may not.

Policy, problems and starting point of a run are fixed. Settings that decide how it goes on - budget, search, loss,
rates, limits, hardware - may change; as the run then no longer follows its first configuration, each change is printed.
If the model it began with was moved, its new path may be given.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ibtpo.checkpoints import Checkpoint
from ibtpo.config import TrainConfig
from ibtpo.config_io import flat, load_yaml, merge
from ibtpo.disk import RunFolderError
from ibtpo.policy import base_folder
from ibtpo.run_format import CONFIG, check_run
from ibtpo_engine.adapter_folder import is_adapter_folder

_OTHER, _HELD_OUT = "since the problems would not be the same", "since held-out problems would be trained on"
FIXED = {
    "model": "since the checkpoint has the weights, and the KL reference is the model it began with (which may move)",
    "dtype": "since weights and optimizer state are saved in it",
    "seed": "since problems, samples and what is held out depend on it",
    **dict.fromkeys(("task", "data", "layout", "digits"), _OTHER),
    **{f"jsonl.{name}": _OTHER for name in ("prompt_field", "answer_field", "data_fields", "template")},
    **{f"jsonl.{name}": _OTHER for name in ("system_prompt", "few_shot", "chat_template", "max_prompt_tokens")},
    "jsonl.chat_template_options": _OTHER,
    **{f"jsonl.{name}": _OTHER for name in ("pass_rate_field", "min_pass_rate", "max_pass_rate", "duplicates")},
    "jsonl.unanswered": _OTHER,
    **{f"jsonl.{name}": _HELD_OUT for name in ("eval_fraction", "eval_count", "eval_data")},
    **dict.fromkeys(("reward", "jsonl.grade"), "since rewards before and after could not be compared"),
    "optim.state": "since the optimizer is saved in this form",
    "lora": "since the adapters and their optimizer state have this shape",
    "warm_start": "since it is over",
    "out": "since a run is continued in its own folder",
}
"""Fields and sections that a resumed run must not change, each with the reason."""


def allowed_changes(run: Path, config: TrainConfig) -> str:
    """The settings that differ from those of the run folder `run`, each with its old and new value; "" if none.

    Raises:
        RunFolderError: one of them may not change, or this is not a run folder or has a newer format.
    """
    check_run(run, "resume")
    path = run / CONFIG
    before = flat(asdict(with_absolute_paths(merge(TrainConfig(), load_yaml(path), source=str(path)))))
    changes = {name: value for name, value in flat(asdict(config)).items() if before[name] != value}
    for name, value in changes.items():
        reason = FIXED.get(name) or FIXED.get(name.partition(".")[0])
        if reason is not None and not (name == "model" and _has_moved(before[name], value, run)):
            raise RunFolderError(
                f"resume: {name} cannot change from {before[name]} to {value}, {reason}; leave it out, or begin a new "
                "run with --out"
            )
    return ", ".join(f"{name} {before[name]} -> {value}" for name, value in changes.items())


def _has_moved(before: str, now: str, run: Path) -> bool:
    """May `now` be the moved model of the run? It is if `before` is gone and `now` is a folder outside of the run."""
    gone = before != TrainConfig().model and not Path(before).is_dir()
    return gone and Path(now).is_dir() and not Path(now).is_relative_to(run.absolute())


def check_beginning(config: TrainConfig, last: Checkpoint | None) -> None:
    """Check that the model a resumed run began with exists, if the run still needs it.

    Args:
        config: the run.
        last: the checkpoint the run resumes from, or None.

    Raises:
        RunFolderError: the model is missing and needed as the policy or the reference.
        CheckpointError: the model is missing and needed as the base of the run's adapters.
    """
    if last is not None and is_adapter_folder(last.path):
        base_folder(last.path, config.model)
    if config.model == TrainConfig().model or Path(config.model).is_dir():
        return
    if last is not None and not config.needs_reference:
        return
    needed, without = "has no checkpoint and begins with it", ""
    if last is not None:
        needed = "needs it as the reference policy"
        without = ", or do without the reference: --loss.kl-coef 0 --advantage.pi-ref sampling"
    raise RunFolderError(
        f"resume: {config.model}, which {config.resume} began with, is not there, and the run {needed}; restore it, "
        f"or give its new folder by --model FOLDER, or in the field model of {config.resume}/{CONFIG}{without}"
    )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths of model folder and data files, independent of the working directory."""
    model = str(Path(config.model).absolute()) if Path(config.model).is_dir() else config.model
    few_shot, eval_data = _absolute(config.jsonl.few_shot), _absolute(config.jsonl.eval_data)
    jsonl = replace(config.jsonl, few_shot=few_shot, eval_data=eval_data)
    return replace(config, model=model, data=_absolute(config.data), jsonl=jsonl)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
