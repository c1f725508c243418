"""The files of studies.

::

    OUT/cells/<cell>/   spec.json, log.txt, result.json once done, error.txt if it failed
        policy/         of kind start: the policy
        run/            of kind train: its run folder
    OUT/<study>/        table, figures, page
"""

from __future__ import annotations

from pathlib import Path

from ibtpo.checkpoints import latest_checkpoint

CELLS, LOG, SPEC, RESULT, ERROR = "cells", "log.txt", "spec.json", "result.json", "error.txt"
POLICY, RUN = "policy", "run"


def policy_of(cell: Path) -> Path:
    """The policy in the folder of a finished cell of kind start or train."""
    last = latest_checkpoint(cell / RUN)
    return cell / POLICY if last is None else last.path
