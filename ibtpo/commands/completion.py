"""``ibtpo completion``: completion scripts for shells, made by the library that parses the flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, Union

import tyro


@dataclass(frozen=True, kw_only=True)
class CompletionArguments:
    """Print a script that completes commands, flags, choices and paths of `ibtpo`.

    bash: put `eval "$(ibtpo completion bash)"` into ~/.bashrc. zsh: `ibtpo completion zsh > DIR/_ibtpo`, with DIR in
    $fpath. fish: `ibtpo completion fish > ~/.config/fish/completions/ibtpo.fish`.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """bash, zsh or fish."""


def completion(
    arguments: Sequence[str], commands: Mapping[str, type[Any]], *, names: Mapping[str, Iterable[str]]
) -> int:
    """Run the command.

    Args:
        commands: the dataclass of the flags of every command, by its name.
        names: what a flag that takes any text is completed with, by the name of its field.

    Returns:
        the exit code; not 0 if the library cannot make a script for this shell.
    """
    parsed = tyro.cli(CompletionArguments, prog="ibtpo completion", args=arguments, use_underscores=False)
    subcommands = tuple(
        Annotated[_with_names(kind, names), tyro.conf.subcommand(name)] for name, kind in commands.items()
    )
    program: Any = Union[subcommands]  # noqa: UP007 - made at run time
    try:
        tyro.cli(program, prog="ibtpo", args=["--tyro-print-completion", parsed.shell], use_underscores=False)
    except SystemExit as done:
        if parsed.shell == "bash":
            print("complete -o default -F _tyro_ibtpo ibtpo  # where the script knows nothing: paths")
        return int(done.code or 0)
    raise AssertionError("the script is printed by way of SystemExit")


def _with_names(kind: type[Any], names: Mapping[str, Iterable[str]]) -> type[Any]:
    """The flags of a command, those that have `names` with a choice among them."""
    chosen: list[Any] = [
        (known.name, Literal[tuple(names[known.name])], field(default=known.default))
        for known in fields(kind)
        if known.name in names
    ]
    return make_dataclass(kind.__name__, chosen, bases=(kind,), frozen=True, kw_only=True) if chosen else kind
