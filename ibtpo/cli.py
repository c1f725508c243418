"""The command line: ``ibtpo train | eval | sample | study | view | ...``; every configuration field is a flag."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree as Outline

from ibtpo.checkpoints import latest_checkpoint, weights_of
from ibtpo.commands.completion import SHELLS, CompletionArguments, completion
from ibtpo.commands.config import ConfigArguments, show_config
from ibtpo.commands.doctor import DoctorArguments, doctor
from ibtpo.config import TrainConfig
from ibtpo.config_io import base_config, flat
from ibtpo.console import Output, RunConsole, say
from ibtpo.disk import writing
from ibtpo.distributed import join, restarted
from ibtpo.evaluation.command import EvalArguments, instead_of_training, print_evaluation, run_evaluation
from ibtpo.grading import GraderError
from ibtpo.grow import Grower
from ibtpo.list_flags import join_repeated
from ibtpo.metrics import RIGHT
from ibtpo.optim import NonFinite
from ibtpo.policy import Policy, load_policy
from ibtpo.presets import PRESET_NOTES, PRESETS
from ibtpo.printable import printable
from ibtpo.report import NOT_ACCURACY, summarize_run
from ibtpo.rewards import RewardSpec, parse_rewards
from ibtpo.run_format import is_run
from ibtpo.runlog import REPORT
from ibtpo.search import make_search
from ibtpo.setup import choose_device, make_engine, make_sampling
from ibtpo.steps import step_splitter
from ibtpo.stopping import Interrupted
from ibtpo.studies.command import StudyArguments, study
from ibtpo.studies.matrix import shipped_studies
from ibtpo.tasks import DigitChain, Grades, Problem, RewardGrades, Task, make_task
from ibtpo.tasks.digit_chain import parse_prompt
from ibtpo.train import train
from ibtpo.viewer.cli import ViewArguments, view
from ibtpo_engine import EngineError, Tree

USAGE = """usage: ibtpo {train,eval,sample,presets,study,view,config,doctor,completion} [--help] [flags]

  train    grow trees, score them, train on them; `ibtpo train` alone runs the built-in task
  eval     accuracy of a checkpoint or run: avg@k, pass@k, maj@k, greedy; resumable
  sample   grow one tree and print it
  presets  the methods --preset knows: what each is, where it comes from, what it sets
  study    methods x seeds at an equal budget: the paper's tables, with intervals, curves and a page
  view     look at a run in the browser, or at two: curves, prompts, trees
  config   print the settings that a command would use, or --explain every one
  doctor   what is installed, what works here, and each kernel against its reference
  completion   print a script that completes commands and flags in bash, zsh or fish

`ibtpo COMMAND --help` lists every flag with its default. Settings may also come from a YAML file (--config FILE),
with the same names: `--search.rounds 5` is `search: {rounds: 5}`.

Exit codes: 0 done, or train and eval stopped by SIGTERM, a closed terminal or a closed pipe, with what they had kept;
2 the input cannot be used or the run cannot go on, stderr says why; 130 stopped by Ctrl-C. docs/troubleshooting.md
lists what can go wrong and what to do.
"""

Flat = tyro.conf.arg(name="")  # the fields of the run are flags without a prefix
Preset = Annotated[
    str,
    tyro.conf.arg(
        help=f"Method: {', '.join(PRESETS)}; `ibtpo presets` explains them. Fields in --config or flags win over it."
    ),
]
Arguments = TypeVar("Arguments")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a policy with IB-TPO (or a rival) and write a run folder with metrics, checkpoints and a report.

    Without --model and --data the built-in policy is warm-started and trained on the built-in task. With a Hugging
    Face folder and a JSONL file of prompts and answers the same loop runs on them.
    """

    preset: Preset = "ib-tpo"
    config: Path | None = None
    """YAML file with any of the fields below."""
    quiet: bool = False
    """Show no progress, only the result."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Grow one tree and print it: steps with value, IB-Score, confidence, and the round they were sampled in."""

    preset: Preset = "ib-tpo"
    config: Path | None = None
    """YAML file with any of the fields below."""
    prompt: str | None = None
    """Prompt to answer; by default the task's problem number --index. "\\n" stands for a newline."""
    answer: str | None = None
    """Right answer to --prompt, needed unless the task is digit-chain."""
    index: int = 0
    """Training problem of the task to show when no prompt is given."""
    run: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, as `USAGE` lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str], Console], int]]
    commands = {"train": _train, "eval": _eval, "sample": _sample, "presets": _presets, "study": study, "view": view}
    commands |= {"config": _config, "doctor": doctor, "completion": _completion}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"ibtpo: {arguments[0]!r} is not a command\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return commands[arguments[0]](arguments[1:], Output())
    except Interrupted as stop:
        print(f"ibtpo: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("ibtpo: stopped at once; what was saved before is safe", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody piped us into `head`
        return 0
    except (ValueError, EngineError, GraderError, NonFinite, OSError) as error:
        message = "; ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"ibtpo: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2


def _train(arguments: list[str], console: Console) -> int:
    base = TrainArguments(run=_base(arguments, run=_early(arguments).resume))
    parsed = _parse(TrainArguments, base, "ibtpo train", arguments)
    config = _with_data(parsed.run)
    with join(config) as group:
        out = train(restarted(config, group), RunConsole(quiet=parsed.quiet or not group.leads), group=group)
    if not group.leads:
        return 0
    for table in _result_tables(out):
        console.print(table)
    console.print(NOT_ACCURACY, style="dim")
    last = latest_checkpoint(out)
    if last is not None:
        say(console, f"checkpoint: {last.path}")
    say(console, f"report: {out / REPORT}")
    return 0


def _eval(arguments: list[str], console: Console) -> int:
    base = replace(_base_of_model(arguments), out=None)  # the run's own folder is not for this
    parsed = _parse(EvalArguments, EvalArguments(run=base), "ibtpo eval", arguments)
    config, folder, policy, task = _open(parsed.resolve(), console)
    with closing(task):
        evaluation, summary = run_evaluation(config, folder, policy, task, RunConsole())
    print_evaluation(evaluation, summary, console)
    if parsed.json is not None:
        with writing(parsed.json):
            parsed.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0


def _sample(arguments: list[str], console: Console) -> int:
    base = SampleArguments(run=_base_of_model(arguments))
    parsed = _parse(SampleArguments, base, "ibtpo sample", arguments)
    config, _, policy, task = _open(parsed.run, console)
    with closing(task):
        problem, grades = _problem(parsed, task)
        with closing(grades):
            grower = Grower(make_engine(config, policy), grades, policy.tokenizer, config.jsonl)
            splitter = step_splitter(policy.tokenizer, config.search)
            search = make_search(config.search, config.ib, splitter, config.sampling.max_tokens)
            [tree], _ = grower.grow([problem], [parsed.index], search, make_sampling(config, policy))
    console.print(_outline(tree, policy, problem))
    leaves = tree.leaves()
    console.print(
        f"{len(leaves)} trajectories, {_outcome([leaf.reward or 0.0 for leaf in leaves])}, "
        f"{tree.num_sampled} tokens sampled for {sum(leaf.end - tree.prompt_len for leaf in leaves)} in trajectories"
    )
    return 0


def _outcome(rewards: Sequence[float]) -> str:
    """How many are right and, where some are so in part, the mean reward."""
    partly = any(0 < reward < 1 for reward in rewards)
    mean = f" (mean reward {sum(rewards) / len(rewards):.3g})" if partly else ""
    return f"{sum(reward > RIGHT for reward in rewards)} right{mean}"


@dataclass(frozen=True, kw_only=True)
class PresetsArguments:
    """List the methods that --preset knows: what each is, where it comes from, what it sets."""


def _presets(arguments: list[str], console: Console) -> int:
    _parse(PresetsArguments, PresetsArguments(), "ibtpo presets", arguments)
    table = Table("preset", "what it is", "sets", show_lines=True)
    for name, changes in PRESETS.items():
        explanation, source = PRESET_NOTES[name]
        settings = "\n".join(f"{field} {value}" for field, value in flat(changes).items())
        table.add_row(name, f"{explanation} [dim]({source})[/]", settings)
    table.columns[0].no_wrap = True
    table.columns[2].no_wrap = console.width >= 80  # in a narrower window they would leave the explanation no room
    table.columns[2].overflow = "fold"
    console.print(table)
    return 0


def _config(arguments: list[str], console: Console) -> int:
    base = ConfigArguments(run=_base(arguments, run=_early(arguments).resume))
    parsed = _parse(ConfigArguments, base, "ibtpo config", arguments)
    return show_config(replace(parsed, run=_with_data(parsed.run)))


def _completion(arguments: list[str], console: Console) -> int:
    return completion(
        arguments,
        {
            "train": TrainArguments,
            "eval": EvalArguments,
            "sample": SampleArguments,
            "presets": PresetsArguments,
            "study": StudyArguments,
            "view": ViewArguments,
            "config": ConfigArguments,
            "doctor": DoctorArguments,
            "completion": CompletionArguments,
        },
        names={"preset": PRESETS},
        first={"study": ("name", shipped_studies()), "completion": ("shell", SHELLS)},
    )


def _result_tables(folder: Path) -> list[Table]:
    """What the run came to: held-out accuracy before and after, and what it took."""
    summary = summarize_run(folder)
    accuracy = Table(
        "held-out accuracy", "before", "after", title=f"{escape(str(folder))}: {summary.steps} training steps"
    )
    for row in summary.accuracies:
        accuracy.add_row(row.name, str(row.before or "–"), str(row.after or "–"))
    amounts = Table("", "", "")
    amounts.show_header = False
    for name, value, note in summary.amounts:
        amounts.add_row(name, value, f"[dim]{note}[/]")
    return [accuracy, amounts]


def _early(arguments: list[str]) -> argparse.Namespace:
    """The flags that decide what the defaults of all others are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default=None)
    parser.add_argument("--task", default=None)
    for name in ("--config", "--resume", "--data", "--model"):
        parser.add_argument(name, type=Path, default=None)
    parser.add_argument("--whole", action="store_true")
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # a flag without its value: the full parser explains it
        return parser.parse_known_args([])[0]


def _base(arguments: list[str], *, run: Path | None, instead: Mapping[str, Any] | None = None) -> TrainConfig:
    early = _early(arguments)
    task = early.task or ("jsonl" if early.data is not None else None)
    return base_config(task=task, preset=early.preset, file=early.config, run=run, instead=instead)


def _base_of_model(arguments: list[str]) -> TrainConfig:
    """Of a run, or a checkpoint of one, that --model names, the run's own: it is measured as it was trained."""
    early = _early(arguments)
    folders = [] if early.model is None else [early.model, early.model.absolute().parent.parent]
    run = next(filter(is_run, folders), None)
    instead = None if run is None else instead_of_training(run, early.data, whole=early.whole)
    return _base(arguments, run=run, instead=instead)


def _parse(kind: type[Arguments], default: Arguments, program: str, arguments: list[str]) -> Arguments:
    return tyro.cli(kind, default=default, prog=program, args=join_repeated(arguments), use_underscores=False)


def _with_data(config: TrainConfig) -> TrainConfig:
    """--data means the jsonl task."""
    return replace(config, task="jsonl") if config.data is not None else config


def _open(config: TrainConfig, console: Console) -> tuple[TrainConfig, Path, Policy, Task]:
    """The policy of a checkpoint or run folder, the folder it was read from, and the task."""
    config = _with_data(config)
    if config.model == "built-in":
        raise ValueError("model: give --model a checkpoint or run folder; `ibtpo train` makes one")
    folder = weights_of(Path(config.model), lambda text: say(console, text, style="dim"))
    policy = load_policy(folder, dtype=getattr(torch, config.dtype), device=choose_device(config.device))
    return config, folder, policy, make_task(config)


def _problem(arguments: SampleArguments, task: Task) -> tuple[Problem, Grades]:
    """What to sample for, and who grades it."""
    if arguments.prompt is None:
        return task.train_problem(arguments.index), task
    prompt = arguments.prompt.replace("\\n", "\n")
    if arguments.answer is not None:
        return Problem(prompt, arguments.answer), _grades_of(arguments.run)
    if task.name == DigitChain.name:
        return parse_prompt(prompt if prompt.endswith("\n") else prompt + "\n"), task
    raise ValueError("prompt: give the right --answer too; without rewards there is nothing to score")


def _grades_of(config: TrainConfig) -> RewardGrades:
    """Who grades a prompt that is no task's."""
    return RewardGrades(parse_rewards(config.reward) or (RewardSpec(config.jsonl.grade),), config.jsonl)


def _outline(tree: Tree, policy: Policy, problem: Problem) -> Outline:
    """The tree as indented text."""
    estimates = tree.notes["ib"]
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    outline = Outline(f"[bold]{escape(printable(prompt.strip()))}[/]  value {estimates.value(tree.root):.2f}")
    places = {tree.root: outline}
    for node in tree.nodes()[1:]:
        text = escape(repr(str(policy.tokenizer.decode(node.tokens.tolist())))[1:-1])
        notes = f"round {node.notes['round']}  pi {estimates.eta2(node):.2f}  value {estimates.value(node):.2f}"
        if node.children:
            notes += f"  J {estimates.score(node):+.2f}"
        mark = "" if node.reward is None else "  [green]right[/]" if node.reward > RIGHT else "  [red]wrong[/]"
        parent = node.parent
        assert parent is not None
        places[node] = places[parent].add(f"{text}  [dim]{notes}[/]{mark}")
    return outline


if __name__ == "__main__":
    sys.exit(main())
