"""Kill a small run at random moments, resume it each time, and see that it ends as one left alone does.

    python tests/killing.py FOLDER --kills 100 --seed 7

Half of the kills come after a random time, half right before a random one of the run's file operations (opened,
renamed, removed, made), where a checkpoint or a log is half written. A run is killed until it ends in spite of that,
then the next one begins, until there were enough kills. torch is imported once, in a process that runs nothing and
forks a child a run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endings import assert_complete, assert_same_end

from ibtpo.cli import main as ibtpo
from ibtpo.run_format import CONFIG

CHAIN = ["--digits.min-ops", "1", "--digits.max-ops", "1", "--sampling.max-tokens", "16"]
WARM = [
    *CHAIN, "--warm-start.max-updates", "60", "--warm-start.decay-updates", "20", "--warm-start.batch-size", "16",
    "--warm-start.pass-share", "0", "--sampled-tokens", "1", "--prompts-per-step", "2", "--eval.prompts", "1",
]  # fmt: skip
BUDGET = 1500
RUN = [
    *CHAIN, "--sampled-tokens", str(BUDGET), "--prompts-per-step", "3", "--search.rounds", "4",
    "--checkpoint-every", "2", "--eval.prompts", "2", "--eval.samples", "1", "--eval.every", "3", "--optim.lr", "1e-3",
    "--trees-megabytes", "0.006", "--safeguards.keep-checkpoints", "2", "--loss.kl-coef", "0.01",
]  # fmt: skip
SLOW_IMPORTS = ("torch._dynamo", "torch.utils.tensorboard", "transformers.models.qwen2.tokenization_qwen2")
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
PATIENCE = 12  # kills of one run, after which it is left alone


@dataclass
class Kills:
    """How the runs were killed: kills by kind, and the files at which it was done."""

    number: int = 0
    runs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)


def train(*arguments: object, folder: Path, after: float = 0.0, at: int = 0) -> tuple[int, float]:
    """Train in a child process, killed `after` seconds or before its `at`-th operation on a file of the folder.

    Returns:
        what `os.waitpid` says, and the seconds it took. The operations are counted in `FOLDER.count`.
    """
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            _silence(folder.with_suffix(".txt"))
            _watch(folder, at)
            code = ibtpo(["train", "--quiet", *map(str, arguments)])
        finally:
            os._exit(code)
    timer = threading.Timer(after, os.kill, (child, signal.SIGKILL)) if after else None
    if timer is not None:
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
        timer.join()
    return status, time.monotonic() - begin


def _silence(path: Path) -> None:
    """What the child prints goes to a file."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _watch(folder: Path, at: int) -> None:
    """Kill this process before its `at`-th operation in the folder; write down how far it came, and with what."""
    note = os.open(folder.with_suffix(".count"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    prefix, count = str(folder), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if (
            event not in OPERATIONS
            or not isinstance(arguments[0], str | Path)
            or not str(arguments[0]).startswith(prefix)
        ):
            return
        count += 1
        os.pwrite(note, f"{count:9} {event} {str(arguments[0])[len(prefix) :]:<200}".encode(), 0)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def last_operation(folder: Path) -> tuple[int, str]:
    """How many file operations a child made, and what the last was: event and path."""
    number, _, operation = folder.with_suffix(".count").read_text().strip().partition(" ")
    return int(number or 0), operation.strip()


def killed_run(out: Path, policy: Path, whole: Path, rng: random.Random, kills: Kills, most: int, scale: Scale) -> None:
    """Kill a run until it ends, at most `most` times; it must end as `whole` did."""
    begun = kills.number
    while True:
        arguments = ["--resume", out] if (out / CONFIG).exists() else ["--model", policy, "--out", out, *RUN]
        spared = kills.number - begun >= min(PATIENCE, most)
        kind = "spared" if spared else rng.choice(("time", "file"))
        after = rng.uniform(0.05, scale.seconds) if kind == "time" else 0.0
        at = rng.randint(1, scale.operations) if kind == "file" else 0
        status, _ = train(*arguments, folder=out, after=after, at=at)
        if status == 0:
            break
        number, operation = last_operation(out)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL or spared:
            raise SystemExit(f"{out}: ended with status {status}, not killed:\n{out.with_suffix('.txt').read_text()}")
        kills.number += 1
        kills.kinds[kind] += 1
        if kind == "file":
            kills.files[operation] += 1
        print(f"kill {kills.number}: {kind} {after or at:.4g}, at operation {number}: {operation}", flush=True)
    kills.runs += 1
    assert_complete(out, BUDGET)
    assert_same_end(out, whole)
    print(f"{out.name}: the same end after {kills.number - begun} kills", flush=True)


@dataclass(frozen=True)
class Scale:
    """How long kills may wait: seconds, and file operations."""

    seconds: float
    operations: int


def kill_runs(folder: Path, number: int, seed: int) -> Kills:
    """Kill runs in `folder` `number` times in all."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    rng, kills = random.Random(seed), Kills()
    assert train("--out", folder / "warm", *WARM, folder=folder / "warm")[0] == 0
    policy = max((folder / "warm" / "checkpoints").glob("step-*"))
    whole = folder / "whole"
    status, seconds = train("--model", policy, "--out", whole, *RUN, folder=whole)
    assert status == 0, whole.with_suffix(".txt").read_text()
    operations, _ = last_operation(whole)
    print(f"seed {seed}; left alone: {seconds:.2f} s, {operations} file operations", flush=True)
    scale = Scale(0.8 * seconds, operations // 3)
    while kills.number < number:
        killed_run(folder / f"run{kills.runs:03}", policy, whole, rng, kills, number - kills.number, scale)
    return kills


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the runs are made; must not exist yet")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    kills = kill_runs(arguments.folder.resolve(), arguments.kills, arguments.seed)
    print(json.dumps({"kills": kills.number, "runs": kills.runs, **kills.kinds, "files": kills.files}))


if __name__ == "__main__":
    main()
