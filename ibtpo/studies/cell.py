"""The process of one cell: ``python -m ibtpo.studies.cell FOLDER`` does what FOLDER/spec.json says, on one thread.

It exits as soon as its standard input is closed, so it never outlives the study that started it. It writes either
FOLDER/result.json, atomically and last, or FOLDER/error.txt.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from ibtpo.config import TrainConfig
from ibtpo.config_io import merge
from ibtpo.disk import write_atomically
from ibtpo.studies.folders import ERROR, RESULT, SPEC
from ibtpo.studies.measure import measure


def main(folder: Path) -> int:
    """Run the cell; returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        policy = None if spec["folder"] is None else Path(spec["folder"])
        config = merge(TrainConfig(), spec["config"], source=SPEC)
        result = measure(spec, config, folder, policy)
        write_atomically(folder / RESULT, json.dumps(result))
    except Exception as error:
        write_atomically(folder / ERROR, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written there: returns when the process at the other end has ended
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
