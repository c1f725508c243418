"""The command line: ``ibtpo train | eval | sample | study | view | ...``; every configuration field is a flag."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ibtpo.console import Output
from ibtpo.loading import loading
from ibtpo.printable import printable
from ibtpo.stopping import Interrupted
from ibtpo.validation import did_you_mean

COMMANDS = ("train", "eval", "sample", "presets", "study", "view", "config", "doctor", "completion")
USAGE = """usage: ibtpo {train,eval,sample,presets,study,view,config,doctor,completion} [--help] [flags]

  train       grow trees, score them, train on them; `ibtpo train` alone runs the built-in task
  eval        measure the accuracy of a checkpoint or run: avg@k, pass@k, maj@k, greedy; resumable
  sample      grow one tree and print it
  presets     list the methods for --preset, with their sources and settings
  study       re-run the paper's tables: methods x seeds at an equal budget, with intervals and curves
  view        show a run, or two side by side, in the browser: curves, prompts, trees
  config      print the settings that `ibtpo train` would use; --explain describes every field
  doctor      report what is installed and what works here; check each kernel against its reference
  completion  print a script that completes commands and flags in bash, zsh or fish

`ibtpo COMMAND --help` lists every flag with its default; with --data or --preset added, the defaults that then apply.
Settings may also come from a YAML file (--config FILE), with the same names: `--search.rounds 5` is
`search: {rounds: 5}`.

Exit codes: 0: done, or stopped by SIGTERM, a closed terminal or a closed pipe (train, eval and study keep what they
have); 1: doctor found something broken, or cells of a study failed; 2: the input cannot be used or the run cannot go
on, stderr says why; 130: stopped by Ctrl-C. docs/troubleshooting.md lists problems and remedies.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, as `USAGE` lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        said = f"{arguments[0]!r} is not a command; {did_you_mean(arguments[0], COMMANDS)}".rstrip("; ")
        print(f"ibtpo: {said}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        with loading():
            command = import_module(f"ibtpo.commands.{arguments[0]}")
        return int(command.run(arguments[1:], Output()))
    except Interrupted as stop:
        print(f"ibtpo: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("ibtpo: stopped at once; what was saved before is safe", file=sys.stderr)
        return 130
    except BrokenPipeError:  # output was piped into `head`, say
        return 0
    except Exception as error:
        if not _says_what_to_do(error):
            raise
        message = "; ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"ibtpo: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2


def _says_what_to_do(error: Exception) -> bool:
    """Is its message meant for the user? Otherwise the error is a bug of ours, shown with its traceback."""
    if isinstance(error, ValueError | OSError):
        return True
    from ibtpo.grading import GraderError
    from ibtpo.optim import NonFinite
    from ibtpo_engine import EngineError

    return isinstance(error, EngineError | GraderError | NonFinite)
