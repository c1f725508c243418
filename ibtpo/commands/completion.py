"""``ibtpo completion``: completion scripts for shells, made by the library that parses the flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, Union, get_args

import tyro

Shell = Literal["bash", "zsh", "fish"]
SHELLS = get_args(Shell)


@dataclass(frozen=True, kw_only=True)
class CompletionArguments:
    """Print a script that completes commands, flags, choices and paths of `ibtpo`.

    bash: put `eval "$(ibtpo completion bash)"` into ~/.bashrc. zsh: `ibtpo completion zsh > DIR/_ibtpo`, with DIR in
    $fpath. fish: `ibtpo completion fish > ~/.config/fish/completions/ibtpo.fish`.
    """

    shell: Annotated[Shell, tyro.conf.Positional]
    """bash, zsh or fish."""


def completion(
    arguments: Sequence[str],
    commands: Mapping[str, type[Any]],
    *,
    names: Mapping[str, Iterable[str]],
    first: Mapping[str, tuple[str, Iterable[str]]],
) -> int:
    """Run the command.

    Args:
        commands: the dataclass of the flags of every command, by its name.
        names: what a flag that takes any text is completed with, by the name of its field.
        first: by command, its positional field and what that is completed with.

    Returns:
        the exit code; not 0 if the library cannot make a script for this shell.
    """
    parsed = tyro.cli(CompletionArguments, prog="ibtpo completion", args=arguments, use_underscores=False)
    kinds = {name: _with_names(kind, names) for name, kind in commands.items()}
    kinds |= {name: _by_first_word(kinds[name], *words) for name, words in first.items()}
    program = _one_of(kinds)
    try:
        tyro.cli(program, prog="ibtpo", args=["--tyro-print-completion", parsed.shell], use_underscores=False)
    except SystemExit as done:
        if parsed.shell == "bash":
            print("complete -o default -F _tyro_ibtpo ibtpo  # where the script knows nothing: paths")
        return int(done.code or 0)
    raise AssertionError("the script is printed by way of SystemExit")


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """A choice of subcommands."""
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007


def _by_first_word(kind: type[Any], name: str, words: Iterable[str]) -> Any:
    """A command with the positional `name` given up for subcommands `words`: of these alone scripts know a choice.

    All have the flags of the command, which stand before and after the word, or behind another one (a file).
    """
    hidden: Any = (name, str, field(default="", init=False))
    rest = make_dataclass(kind.__name__, [hidden], bases=(kind,), frozen=True, kw_only=True)
    word: Any = ("word", tyro.conf.OmitArgPrefixes[_one_of(dict.fromkeys(words, rest))])  # type: ignore[misc]
    return make_dataclass(kind.__name__, [word], bases=(rest,), frozen=True, kw_only=True)


def _with_names(kind: type[Any], names: Mapping[str, Iterable[str]]) -> type[Any]:
    """The flags of a command, those that have `names` with a choice among them."""
    chosen: list[Any] = [
        (known.name, Literal[tuple(names[known.name])], field(default=known.default))
        for known in fields(kind)
        if known.name in names
    ]
    return make_dataclass(kind.__name__, chosen, bases=(kind,), frozen=True, kw_only=True) if chosen else kind
