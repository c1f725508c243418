"""The page: style, script and data in one HTML document that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from ibtpo.metrics import GROUPS
from ibtpo.report import NOT_ACCURACY

SCRIPTS = ("util", "data", "chart", "overview", "layout", "tree", "detail", "table", "panes", "app")


def render_page(names: Sequence[str], runs: Sequence[dict[str, Any]], *, live: bool) -> str:
    """The document.

    The content security policy allows only the hashes of our own style and script, so that markup in a completion can
    neither run nor load anything.

    Args:
        names: names of the runs, any text; they make the title.
        runs: initial data of each run for the script; any JSON, with strings of any content.
        live: may the page request updates from its server?
    """
    data = {"live": live, "notAccuracy": NOT_ACCURACY, "groups": _metric_groups(), "runs": runs}
    style, script = _resource("style.css"), _script()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'" if live else "")
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(" · ".join(names)),
        "style": style,
        "script": script,
        "data": embed(data),
    }
    pieces = _resource("page.html").split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _metric_groups() -> list[dict[str, Any]]:
    """Every metric with its unit and meaning, by group."""
    return [
        {"title": g.title, "metrics": [{"name": m.name, "unit": m.unit, "meaning": m.meaning} for m in g.metrics]}
        for g in GROUPS
    ]


def embed(data: Any) -> str:
    """JSON that is safe inside a ``<script>`` element, whatever strings it contains."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _script() -> str:
    return '"use strict";\n' + "\n".join(_resource(f"{name}.js") for name in SCRIPTS)


@cache
def _resource(name: str) -> str:
    return files("ibtpo.viewer").joinpath("static", name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
