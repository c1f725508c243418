"""SVG as text, escaped by construction: whatever a completion contains stays text."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

MINUS, DASH = "\u2212", "\u2013"
Content = str | Markup | None


def element(name: str, *content: Content, **attributes: str | float | None) -> Markup:
    """An element; text and attribute values are escaped, `Markup` content is taken as it is.

    Attribute names lose a trailing underscore (``class_``) and turn others into dashes; None leaves one out.
    """
    written = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    inner = "".join(escape(part) for part in content if part is not None)
    # every part is escaped: names are ours, values and text above
    return Markup(f"<{name}{written}>{inner}</{name}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-").replace("viewbox", "viewBox")


def _value(value: str | float) -> str:
    return str(escape(f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)))
