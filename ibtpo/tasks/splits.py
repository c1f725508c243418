"""Choosing which of several Parquet files to train on by their names, such as train-00000-of-00002."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_TRAIN = ("train", "training")
_OTHERS = ("test", "testing", "eval", "validation", "valid", "val", "dev")
_SHARD = re.compile(r"(.+)-\d+-of-\d+.*")  # as the Hugging Face Hub names the files of a split


def choose_split(folder: Path, files: Sequence[Path]) -> tuple[list[Path], str]:
    """The Parquet files to train on, with a note, by the splits in their names; all files if no name has a split.

    Raises:
        ValueError: the names do not say which files to train on.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if len(splits) == 1:
        return list(files), ""
    train = [name for name in splits if _word_of(name) in _TRAIN]
    if len(train) != 1 or "" in splits:
        names = ", ".join(name or splits[name][0].name for name in splits)
        raise ValueError(f"{folder}: holds {names}, and which to read is not clear; give one file: {files[0]}")
    others = ", ".join(name for name in splits if name != train[0])
    return splits[train[0]], f"{folder}: the split {train[0]} is read, not {others}; name a file to read another"


def _split_of(file: Path) -> str:
    """The split in a file's name: train_sft in train_sft-00000-of-00003, test in gsm8k_test; "" if there is none."""
    shard = _SHARD.fullmatch(file.stem)
    word = _word_of(shard[1] if shard else file.stem)
    return shard[1] if shard and word else word


def _word_of(name: str) -> str:
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in _TRAIN + _OTHERS), "")
