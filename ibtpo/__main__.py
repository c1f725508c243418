"""``ibtpo``, ``python -m ibtpo``, and what torchrun starts: ``torchrun --nproc-per-node 8 -m ibtpo train ...``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Load the command line, which takes seconds, and run it; Ctrl-C ends either without a traceback."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
    if by_default:
        signal.signal(signal.SIGINT, _stop)
    from ibtpo.cli import main as command  # here: nothing catches Ctrl-C in an import above

    if by_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End at once: an import that is interrupted may swallow an exception, or end in another."""
    os.write(2, b"ibtpo: stopped at once; nothing had begun\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
