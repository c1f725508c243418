"""Grown trees on disk: one small file a tree, and an index with a line for each.

::

    trees.jsonl                        a line a tree: step, prompt, answer, rewards, file
    trees/step-000012-003.json.gz      the tree itself: what `tree_record` returns

The viewer reads the whole index, and a tree only when it is displayed.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ibtpo.disk import unfinished
from ibtpo.metrics import RIGHT

if TYPE_CHECKING:
    from ibtpo_engine import Node, Tree

FOLDER = "trees"
FILE = re.compile(r"step-(\d{6,})-\d{3,}\.json\.gz")
_PART, _MOST_PARTS = "\ufffd", 4  # the decoded text of an incomplete character; a character has at most four bytes
_INDEXED_LETTERS = 400  # characters of prompt and answer in the index; the tree's file has all

Record = dict[str, Any]


def tree_record(
    tree: Tree,
    decode: Callable[[list[int]], object],
    *,
    piece: Callable[[int], str] | None = None,
    answer: str = "",
    index: int = 0,
) -> Record:
    """A tree as plain data.

    Args:
        tree: finished and graded.
        decode: the text of token ids.
        piece: the text one token adds, if that differs from decoding it alone (`StepSplitter.text`).
        answer: reference answer.
        index: the tree's number within its training step.

    Returns:
        ``answer``, ``index``, ``branched``: [round, node, IB-Score when picked] in the order the search branched, and
        ``nodes``, depth first. A node has its ``parent``'s index (None for the prompt, which comes first), its
        ``text``, the text's ``pieces``, one a token, their ``logprob`` and ``entropy`` in nats under the model at
        temperature 1 (empty for the prompt), ``round``, ``reward`` and ``finish`` of a leaf, and the estimates
        ``value``, ``eta1``, ``eta2`` and ``score`` if the search left them.
    """
    nodes = tree.nodes()
    place = {node: i for i, node in enumerate(nodes)}
    ib = tree.notes.get("ib")
    one = cache(piece or (lambda token: str(decode([token]))))
    records = []
    for node in nodes:
        pieces = _pieces(node.tokens.tolist(), decode, one)
        sampled = node.parent is not None
        records.append(
            {
                "parent": None if node.parent is None else place[node.parent],
                "text": "".join(pieces),
                "pieces": pieces,
                "logprob": _rounded(node.logprob_raw.tolist()) if sampled else [],
                "entropy": _rounded(node.entropy.tolist()) if sampled else [],
                "round": node.notes.get("round"),
                "reward": node.reward if node.is_leaf else None,
                "finish": node.finish,
                **({} if ib is None else _estimates(ib, node)),
            }
        )
    picked = [[turn, place[node], _finite(score)] for turn, node, score in tree.notes.get("branched", ())]
    return {"answer": answer, "index": index, "branched": picked, "nodes": records}


def _pieces(ids: list[int], decode: Callable[[list[int]], object], piece: Callable[[int], str]) -> list[str]:
    """The text of each token; a character spread over several tokens belongs to the last of them.

    The text of a token with a part of a character contains `_PART`. Only consecutive tokens of this kind are decoded
    together, until a character is complete, so that long texts with rare characters are not decoded repeatedly.
    """
    pieces: list[str] = []
    begun: list[int] = []  # tokens since the beginning of an incomplete character, and ...
    shown = 0  # ... how much of their text has been given to tokens
    for token in ids:
        text = piece(token)
        if _PART in text:
            begun.append(token)
            whole = str(decode(begun))
            complete = max(shown, len(whole.rstrip(_PART)))
            if len(whole) - complete > _MOST_PARTS:  # too many: one that has begun lies in the last three
                last = str(decode(begun[-3:]))
                before = len(whole) - len(last)
                complete, begun = max(complete, before), begun[-3:]
                text, shown = whole[shown:complete], complete - before
            elif complete == len(whole):
                text, begun, shown = whole[shown:], [], 0
            else:
                text, shown = whole[shown:complete], complete
        elif begun:  # it was never completed
            pieces[-1] += str(decode(begun))[shown:]
            begun, shown = [], 0
        pieces.append(text)
    if begun:
        pieces[-1] += str(decode(begun))[shown:]
    return pieces


def _estimates(ib: Any, node: Node) -> dict[str, float | None]:
    step = node.parent is not None
    return {
        "value": _finite(ib.value(node)),
        "eta1": _finite(ib.eta1(node)) if step else None,
        "eta2": _finite(ib.eta2(node)) if step else None,
        "score": _finite(ib.score(node)) if node.children else None,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Values rounded to three decimals; None for NaN and Inf."""
    return [round(value, 3) if math.isfinite(value) else None for value in values]


def write_tree(folder: Path, step: int, record: Mapping[str, Any]) -> Record:
    """Write a `tree_record` into the run folder; returns its line for the index."""
    index = int(record.get("index", 0))
    path = folder / FOLDER / f"step-{step:06d}-{index:03d}.json.gz"
    path.parent.mkdir(exist_ok=True)
    temporary = unfinished(path)
    try:
        data = json.dumps({"step": step, **record}, allow_nan=False, separators=(",", ":")).encode()
        temporary.write_bytes(gzip.compress(data, 6, mtime=0))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {"step": step, "index": index, "file": path.name, **_summary(record)}


def _summary(record: Mapping[str, Any]) -> Record:
    nodes = record["nodes"]
    rewards = [node.get("reward") or 0.0 for node in nodes if node.get("finish") is not None]
    return {
        "prompt": nodes[0]["text"][:_INDEXED_LETTERS] if nodes else "",
        "answer": str(record.get("answer", ""))[:_INDEXED_LETTERS],
        "leaves": len(rewards),
        "right": sum(reward > RIGHT for reward in rewards),
        "reward": round(math.fsum(rewards) / len(rewards), 4) if rewards else None,
        "steps": max(len(nodes) - 1, 0),
        "tokens": sum(len(node.get("pieces", ())) for node in nodes[1:]),
    }


def tree_bytes(folder: Path) -> int:
    """Size in bytes of all trees of a run folder."""
    return sum(path.stat().st_size for path in _tree_files(folder))


def thin_trees(folder: Path, most_bytes: float, left_bytes: float) -> set[str]:
    """If the trees take more than `most_bytes`, delete those of the steps closest to their neighbours until the rest
    takes at most `left_bytes`.

    The trees of the first and last step are kept. Returns the names of the deleted files.
    """
    files: dict[int, list[Path]] = {}
    for path in _tree_files(folder):
        files.setdefault(_step(path.name), []).append(path)
    sizes = {step: sum(path.stat().st_size for path in paths) for step, paths in files.items()}
    deleted: set[str] = set()
    total = sum(sizes.values())
    if total <= most_bytes:
        return deleted
    steps = np.array(sorted(sizes))
    while total > left_bytes and len(steps) > 2:
        nearest = 1 + int(np.argmin(steps[2:] - steps[:-2]))
        gone, steps = int(steps[nearest]), np.delete(steps, nearest)
        total -= sizes[gone]
        for path in files[gone]:
            path.unlink(missing_ok=True)
            deleted.add(path.name)
    return deleted


def _tree_files(folder: Path) -> list[Path]:
    trees = folder / FOLDER
    return [path for path in trees.iterdir() if FILE.fullmatch(path.name)] if trees.is_dir() else []


def _step(name: str) -> int:
    match = FILE.fullmatch(name)
    assert match is not None
    return int(match[1])
