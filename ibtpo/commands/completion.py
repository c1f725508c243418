"""``ibtpo completion``: completion scripts for shells, made by the library that parses the flags."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_type_hints

import tyro
from rich.console import Console

from ibtpo.commands.arguments import parse_alone
from ibtpo.commands.config import ConfigArguments
from ibtpo.commands.doctor import DoctorArguments
from ibtpo.commands.eval import EvalArguments
from ibtpo.commands.presets import PresetsArguments
from ibtpo.commands.sample import SampleArguments
from ibtpo.commands.study import StudyArguments
from ibtpo.commands.train import TrainArguments
from ibtpo.commands.view import ViewArguments
from ibtpo.presets import PRESETS
from ibtpo.studies.matrix import shipped_studies

_WIDTH = 60  # of a description; fish and zsh pass the script to Python as one argument, at most 128 KiB on Linux
_DESCRIPTION = re.compile(r"'description': '((?:[^'\\]|\\.)*)'")

Shell = Literal["bash", "zsh", "fish"]
SHELLS = get_args(Shell)


@dataclass(frozen=True, kw_only=True)
class CompletionArguments:
    """Print a script that completes commands, flags, choices and paths of `ibtpo`.

    bash: put `eval "$(ibtpo completion bash)"` into ~/.bashrc. zsh: `ibtpo completion zsh > DIR/_ibtpo`, with DIR
    in $fpath. fish: `ibtpo completion fish > ~/.config/fish/completions/ibtpo.fish`.
    """

    shell: Annotated[Shell, tyro.conf.Positional]
    """bash, zsh or fish."""


def run(arguments: list[str], console: Console) -> int:
    """Run the command; returns the exit code, not 0 if the library cannot make a script for this shell."""
    parsed = parse_alone(CompletionArguments, "ibtpo completion", arguments)
    commands: dict[str, type[Any]] = {
        "train": TrainArguments,
        "eval": EvalArguments,
        "sample": SampleArguments,
        "presets": PresetsArguments,
        "study": StudyArguments,
        "view": ViewArguments,
        "config": ConfigArguments,
        "doctor": DoctorArguments,
        "completion": CompletionArguments,
    }
    first = {"study": ("name", shipped_studies()), "completion": ("shell", SHELLS)}  # values of positional fields
    kinds = {name: _with_names(kind, {"preset": PRESETS}) for name, kind in commands.items()}
    kinds |= {name: _by_first_word(kinds[name], *words) for name, words in first.items()}
    program = _one_of(kinds)
    script = io.StringIO()
    try:
        with redirect_stdout(script):
            tyro.cli(program, prog="ibtpo", args=["--tyro-print-completion", parsed.shell], use_underscores=False)
    except SystemExit as done:
        print(_DESCRIPTION.sub(lambda found: _cut(found[1]), script.getvalue()), end="")
        if parsed.shell == "bash":
            print("complete -o default -F _tyro_ibtpo ibtpo  # where the script knows nothing: paths")
        return int(done.code or 0)
    raise AssertionError("the script is printed by way of SystemExit")


def _cut(description: str) -> str:
    parts = re.findall(r"\\.|[^\\]", description)
    return f"'description': '{''.join(parts if len(parts) <= _WIDTH else [*parts[: _WIDTH - 1], '…'])}'"


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """A choice of subcommands."""
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007


def _by_first_word(kind: type[Any], name: str, words: Iterable[str]) -> Any:
    """A command whose positional `name` is replaced by subcommands `words`, the only choices that scripts complete.

    Its flags are accepted before the word, with descriptions, and after it, without, to keep the script short.
    """
    hints = get_type_hints(kind)
    flags: Any = [(own.name, hints[own.name], field(default=own.default)) for own in fields(kind) if own.name != name]
    after = make_dataclass("After", flags, frozen=True, kw_only=True)
    hidden: Any = (name, str, field(default="", init=False))
    word: Any = ("word", tyro.conf.OmitArgPrefixes[_one_of(dict.fromkeys(words, after))])  # type: ignore[misc]
    return make_dataclass(kind.__name__, [hidden, word], bases=(kind,), frozen=True, kw_only=True)


def _with_names(kind: type[Any], names: Mapping[str, Iterable[str]]) -> type[Any]:
    """The flags of a command, where those in `names` become a choice of the names."""
    chosen: list[Any] = [
        (known.name, Literal[tuple(names[known.name])], field(default=known.default))
        for known in fields(kind)
        if known.name in names
    ]
    return make_dataclass(kind.__name__, chosen, bases=(kind,), frozen=True, kw_only=True) if chosen else kind
