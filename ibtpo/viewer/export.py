"""The page as one file that needs no server and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ibtpo.disk import write_atomically, writing
from ibtpo.viewer.page import render_page
from ibtpo.viewer.run import RunView, open_views

MOST_BYTES = 32_000_000  # of trees embedded in a page


def export_page(runs: Sequence[Path], path: Path, *, trees: int) -> Path:
    """Write the page of one or two runs, finished or not, to an HTML file; returns its path.

    Args:
        runs: run folders.
        path: file to write.
        trees: most trees to embed for each run; if there are more, those picked by `pick_trees`.

    Raises:
        ValueError: a folder is no run folder.
        RunFolderError: the file cannot be written.
    """
    views = open_views(runs)
    whole = [_whole(view, trees, MOST_BYTES // len(views)) for view in views]
    page = render_page([view.name for view in views], whole, live=False)
    with writing(path):
        write_atomically(path, page)
    return path


def _whole(view: RunView, trees: int, most_bytes: int) -> dict[str, Any]:
    rows, files, size = [], {}, 0
    for row in pick_trees(view.trees(), trees):
        content = view.tree(row["file"])
        if content and size + len(content) <= most_bytes:
            size += len(content)
            rows.append(row)
            files[row["file"]] = base64.b64encode(content).decode()
    answer = view.poll()
    return answer | {"age": None, "trees": {"cursor": "", "reset": True, "rows": rows}, "files": files}


def pick_trees(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` rows spread over the run; of neighbouring rows, the one whose outcomes are the most mixed."""
    bounds = [round(i * len(rows) / count) for i in range(count + 1)] if count else [0]
    windows = [rows[a:b] for a, b in pairwise(bounds) if a < b]
    return [min(window, key=lambda row: abs(_share_right(row) - 0.5)) for window in windows]


def _share_right(row: dict[str, Any]) -> float:
    return float(row.get("right", 0)) / (row.get("leaves") or 1)
