"""A run killed at random moments, and resumed each time, ends as one left alone: `killing.py` with few kills."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from endings import assert_complete, assert_same_end, step_rows

KILLS = 8


def test_a_run_killed_again_and_again_ends_as_one_left_alone(tmp_path: Path) -> None:
    """In a process of its own: one that ran torch cannot be forked."""
    seed, folder = random.SystemRandom().randrange(10**6), tmp_path / "runs"
    driver = Path(__file__).with_name("killing.py")
    process = subprocess.run(
        [sys.executable, driver, folder, "--kills", str(KILLS), "--seed", str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(process.stdout)  # shown if the test fails: the seed, and every kill
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["kills"] >= KILLS
    runs = sorted(folder.glob("run???"))
    assert len(runs) == result["runs"] >= 1
    for run in runs:
        assert_complete(run, 1500)
        assert_same_end(run, folder / "whole")
    rows = step_rows(folder / "whole")
    assert sum(row["optimizer_steps"] for row in rows) > 5  # they learned something that could be lost
    assert len(list((folder / "whole" / "trees").iterdir())) < len(rows)  # and thinned their trees
