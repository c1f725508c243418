"""A study's self-contained page: tables, figures, command and version."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jinja2

from ibtpo.disk import write_atomically
from ibtpo.studies.results import COLUMNS, Results
from ibtpo.studies.run import Failure
from ibtpo.studies.tables import entry_lines, explanation, sections

PAGE = "study.html"


def write_page(
    results: Results,
    folder: Path,
    figures: Sequence[Path],
    failures: Sequence[Failure],
    command: str,
    notes: Sequence[str],
) -> Path:
    """Write the page into the study's folder."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    page = template.render(
        study=results.study,
        explanation=explanation(results),
        sections=sections(results),
        lines=entry_lines,
        columns=COLUMNS[results.study.kind],
        figures=[base64.b64encode(path.read_bytes()).decode() for path in figures],
        failures=failures,
        command=command,
        notes=notes,
        version=version("ibtpo"),
    )
    path = folder / PAGE
    write_atomically(path, page)
    return path
