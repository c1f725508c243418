"""Digests of the files that a cell reads: if one changes, so may the cell's result."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from ibtpo.checkpoints import CHECKSUMS, latest_checkpoint
from ibtpo.config import TrainConfig


def inputs(config: TrainConfig) -> dict[str, str]:
    """Digests of the files that a configuration names, by field; files that do not exist are left out.

    For a file its hash, for a folder of data the hash of its files' names and sizes, for a run or checkpoint the
    checkpoint's name and the hash of its checksums.
    """
    read = {"data": config.data, "eval_data": config.jsonl.eval_data, "few_shot": config.jsonl.few_shot}
    found = {name: _of_data(path) for name, path in read.items() if path is not None and path.exists()}
    return found | _of_model(Path(config.model))


def _of_data(path: Path) -> str:
    if path.is_dir():
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        return hashlib.blake2b(json.dumps(sizes, sort_keys=True).encode(), digest_size=16).hexdigest()
    status = path.stat()
    return _hash(path, status.st_size, status.st_mtime_ns)


def _of_model(model: Path) -> dict[str, str]:
    last = latest_checkpoint(model)
    sums = (model if last is None else last.path) / CHECKSUMS
    return {"model": f"{sums.parent.name} {_of_data(sums)}"} if sums.is_file() else {}


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    """The hash of a file's bytes, computed once for all cells while size and modification time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
