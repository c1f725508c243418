"""``ibtpo``, ``python -m ibtpo``, and what torchrun starts: ``torchrun --nproc-per-node 8 -m ibtpo train ...``."""

from __future__ import annotations

import io
import sys

from ibtpo.loading import loading


def main() -> int:
    """Run the command line; Ctrl-C ends it without a traceback, also while it loads."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal's encoding lacks must not end a run
    with loading():
        from ibtpo.cli import main as command
    return command()


if __name__ == "__main__":
    sys.exit(main())
