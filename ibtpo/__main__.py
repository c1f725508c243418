"""``python -m ibtpo`` is ``ibtpo``; what torchrun starts: ``torchrun --nproc-per-node 8 -m ibtpo train ...``."""

from __future__ import annotations

import sys

from ibtpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
