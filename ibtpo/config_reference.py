"""Every configuration field with default, allowed values and meaning, read from ibtpo/config.py.

docs/configuration.md is generated from it (``python -m ibtpo.config_reference``).
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ibtpo.config import TrainConfig
from ibtpo.config_io import without_none
from ibtpo.validation import noting_limits

_TYPES = {int: "integer", float: "number", str: "text", bool: "true, false", Path: "path"}

HEADER = """# Configuration

Generated from `ibtpo/config.py` by `python -m ibtpo.config_reference > docs/configuration.md`.

Every field is a flag of `ibtpo train`, `eval` and `sample` (`--search.rounds 5`, with `-` for `_`) and a key of a YAML
file (`--config FILE`, `search: {rounds: 5}`). Flags override the file, the file overrides the preset, and the preset
overrides these defaults. Without a task or data of your own, the built-in task's settings
(`ibtpo/configs/digit-chain.yaml`) also override the defaults, but not the preset. `ibtpo config` prints the result.

If the allowed values depend on another field, they are shown for that field's default.
"""


@dataclass(frozen=True)
class Field:
    """A setting.

    Attributes:
        name: as in YAML, dotted.
        default: as in YAML.
        allowed: values, or type and interval.
        meaning: its sentence.
    """

    name: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The fields of one dataclass; the section of the run's own fields has no name."""

    name: str
    meaning: str
    fields: tuple[Field, ...]


def sections() -> list[Section]:
    """All settings, in the order of ibtpo/config.py."""
    return list(_sections(TrainConfig))


def _sections(kind: type[Any], name: str = "") -> Iterator[Section]:
    sentences, limits, hints = _sentences(kind), _limits(kind), get_type_hints(kind)
    prefix = f"{name}." if name else ""
    default, own, below = kind(), [], []
    for field in fields(kind):
        value = getattr(default, field.name)
        if is_dataclass(value):
            below.append((type(value), prefix + field.name))
            continue
        full = prefix + field.name
        own.append(Field(full, _text(value), _allowed(hints[field.name], limits.get(full)), sentences[field.name]))
    meaning = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    yield Section(name, meaning, tuple(own))
    for section, section_name in below:
        yield from _sections(section, section_name)


def _sentences(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(inspect.cleandoc(str(after.value.value)).split())
    return found


def _limits(kind: type[Any]) -> dict[str, str]:
    """The values that its checks allow; numbers that are None by default are set to 1 so that they are checked."""
    hints = get_type_hints(kind)
    absent = {f.name: 1 for f in fields(kind) if f.default is None and {int, float} & set(get_args(hints[f.name]))}
    with noting_limits() as limits:
        kind(**absent)
    return limits


def _allowed(hint: Any, limit: str | None) -> str:
    wanted, is_optional = without_none(hint)
    if get_origin(wanted) is Literal:
        allowed = ", ".join(map(str, get_args(wanted)))
    elif get_origin(wanted) is tuple:
        allowed = "texts"
    elif wanted is str and limit is not None:
        allowed = limit
    else:
        allowed = _TYPES[wanted] + (f" in {limit}" if limit is not None else "")
    return f"{allowed}, or null" if is_optional else allowed


def _text(value: Any) -> str:
    """The value as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return json.dumps(value) if isinstance(value, str) and not value.strip() else str(value)


def documentation() -> str:
    """The text of docs/configuration.md."""
    lines = [HEADER]
    for section in sections():
        lines += [f"## {section.name or 'The run'}", "", section.meaning, ""]
        lines += ["| field | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.default}` | {_cell(f.allowed)} | {_cell(f.meaning)} |" for f in section.fields]
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    """Escape a text for a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    print(documentation())
