r"""Rewriting answers in common notation into LaTeX that math-verify reads correctly.

math-verify ignores what it does not know. Here some notation is rewritten (½, 10\,000, \$18), and words that tell
answers apart become symbols: 3 hours 20 minutes, which math-verify reads as 3, becomes 3*U_hour, 20*U_minute.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

# common notation that math-verify misreads or cannot parse: characters, and numbers
_IN_LATEX = str.maketrans(
    {chr(ord(digit) + 0xFEE0): digit for digit in "0123456789+-.,/()"}  # full width
    | {
        c: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split("\N{FRACTION SLASH}"))
        for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    }
    | {"°": r"^{\circ}", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "：": ": "}
)
_LABEL = re.compile(r"(####|[^\W\d_]:\**)(?=[-+]?\d)")  # Answer:34
_GROUPED = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:(?:\\[,;: ]|[^\S\n]|~)\d{3})+(?![\w/])")  # 10\,000 and 10 000
_FULL_STOP = re.compile(r"(?<=[\d})])\.(?=\s*\})")  # \boxed{34.}
_HOUR = re.compile(r"(?<=\d):00(?![\d:])")  # 11:00, a time, not a ratio
# \{x \mid x > 1\} and \{x \in \mathbb{R} : x > 1\}
_SET_OF = re.compile(
    r"(?:\\left)?\\\{\s*(?:[A-Za-z]|\([A-Za-z],\s*[A-Za-z]\))\s*(?:\\in\s*\\mathbb\s*\{?[A-Z]\}?\s*)?(?:\\mid|\\vert|\||:)"
    r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*?)(?:\\right)?\\\}"
)
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\)|\{([^{}]*)\})")
_RAISED = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_MIXED = re.compile(r"(?<![\w.,/^])(\d+)\s+([1-9]\d*)/([1-9]\d*)(?![\w/]|\.\d)")  # 3 1/2
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w]|\.\d)")
_MONEY = re.compile(r"\\\$(?=\s?[-+]?[\d.])")  # \$18, which is found only in a box
_NUMBER_AS_TEXT = re.compile(
    r"(?<=[{$=])\s{0,3}\\(?:text|textbf|mbox|mathrm|mathbf)\{\s{0,3}([-+]?\d[\d.,/]*)\s{0,3}\}"
)
# 3 \text{ hours } 20 \text{ minutes}; 2 red and 3 blue
_AMOUNT = r"([-+]?(?:\d+(?:[.,]\d+)*|\\[dt]?frac\{\d+\}\{\d+\}))\s{0,3}(?:(?:\\[,;: ]|~)\s{0,3})?"
_UNIT = r"(?:\\(?:text|textrm|mbox|mathrm)\s?\{\s{0,3}([A-Za-z][A-Za-z .,]{0,40})\}|([A-Za-z]{2,40})\b)"
_SEPARATOR = r"\s{0,3}(?:(?:[,;]|\\[,;: ])\s{0,3})?(?:(?:and\b|\\text\s?\{\s{0,3}and\s{0,3}\})\s{0,3})?"  # unambiguous
_QUANTITY = re.compile(_AMOUNT + _UNIT)
_QUANTITIES = re.compile(
    r"(?<=[{$])\s{0,3}(?P<text>\\text\{)?"
    + rf"{_QUANTITY.pattern}(?:{_SEPARATOR}{_QUANTITY.pattern}){{1,9}}"
    + r"\.?\s{0,3}(?(text)\}\s{0,3})(?=[}$])"
)
_SAME_UNIT = {"h": "hour", "hr": "hour", "min": "minute", "s": "second", "sec": "second"} | {
    "foot": "ft", "feet": "ft", "inche": "in", "inch": "in",
}  # fmt: skip
# 1, 2, \ldots, 10
_DOTS = r"(?:\\[lc]?dots[a-z]?(?![A-Za-z])|\.{3}|\N{HORIZONTAL ELLIPSIS})"
_BETWEEN = r"\s{0,3}(?:[,+]|\\cdot(?![A-Za-z])|\\times)\s{0,3}"
_ELLIPSIS = re.compile(rf"([A-Za-z\d]{{0,20}})({_BETWEEN}){_DOTS}(?=(?:{_BETWEEN}|\s)([A-Za-z\d]{{1,20}})|)")
_BEGINNING = re.compile(rf"(?<![\w.,])\d{{1,9}}(?:,\s{{0,3}}\d{{1,9}}){{2,20}}(?=\s{{0,3}},\s{{0,3}}{_DOTS})")
_MODULUS = re.compile(
    r"\s{0,3}(?P<open>\()?\\(?:[pb]?mod(?![A-Za-z])|text\s?\{\s?mod\s?\})\s{0,3}"
    r"(?:\{(?P<braced>[^{}$]{1,50})\}|(?P<bare>\d+|[A-Za-z]))(?(open)\s{0,3}\))"
)
_BARE_MODULUS = re.compile(r"\\pmod\s{0,3}(\d{1,18})(?!\d)")
_REMAINDER = re.compile(rf"(?<=[{{$])\s{{0,3}}(\d{{1,18}}){_MODULUS.pattern}\s{{0,3}}(?=[}}$])")


def in_latex(text: str) -> str:
    """Rewrite notation such as 90°, ½, √2, x², 3 1/2, 10 000, 1.5e3 into forms that math-verify reads."""
    text = _FULL_STOP.sub("", _LABEL.sub(r"\1 ", text.translate(_IN_LATEX)))
    text = _NUMBER_AS_TEXT.sub(r"\1", _MONEY.sub("", text))
    text = _QUANTITIES.sub(_quantities, text)
    text = _ELLIPSIS.sub(_ellipsis, _BEGINNING.sub(_beginning, text))
    text = _GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = _SET_OF.sub(r"\1", _HOUR.sub("", text))
    text = text.replace("~", " ").replace(r"\varnothing", r"\emptyset")
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text)
    text = _RAISED.sub(
        lambda power: "^{" + unicodedata.normalize("NFKC", power[0]).replace("\N{MINUS SIGN}", "-") + "}", text
    )
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _SCIENTIFIC.sub(lambda number: rf"{number[1]}\times 10^{{{int(number[2])}}}", text)


def has_modulus(text: str) -> bool:
    r"""Does an answer contain a modulus, as in ``x \equiv 3 \pmod 4``?"""
    return bool(_MODULUS.search(text))


def with_modulus(text: str) -> str:
    r"""Rewrite ``x \equiv 3 \pmod 4``, which math-verify reads as 4, as x = 3 + 4*U_mod."""
    text = text.replace(r"\equiv", "=") if has_modulus(text) else text
    return _MODULUS.sub(lambda found: rf" + U_{{mod}} \cdot ({found['braced'] or found['bare']})", text)


def as_remainder(text: str) -> str:
    r"""Rewrite ``72 \pmod{100}`` as 72 if the number is less than the modulus.

    Other moduli are put in braces: math-verify reads ``x \equiv 3 \pmod 5`` as 5, and with ``\pmod{5}`` as 3.
    """

    def remainder(found: re.Match[str]) -> str:
        modulus = found["braced"] or found["bare"]
        return found[1] if modulus.isdecimal() and int(found[1]) < int(modulus[:19]) else found[0]

    return _BARE_MODULUS.sub(r"\\pmod{\1}", _REMAINDER.sub(remainder, text))


def _quantities(found: re.Match[str]) -> str:
    """Numbers times the symbols of their units; the numbers alone if all have the same unit."""
    parts = [(number, _unit(text or bare)) for number, text, bare in _QUANTITY.findall(found[0])]
    units = {unit for _, unit in parts}
    if "" in units:
        return found[0]
    return ", ".join(number if len(units) == 1 else rf"{number} \cdot U_{{{unit}}}" for number, unit in parts)


def _unit(name: str) -> str:
    """The same name for a unit, its plural and its abbreviations; "" if there is no name."""
    unit = "".join(word for word in re.findall("[a-z]+", name.lower()) if word not in ("and", "or"))
    unit = unit.removesuffix("s") or unit
    return _SAME_UNIT.get(unit, unit)


def _ellipsis(found: re.Match[str]) -> str:
    """Replace the dots by symbols named after the terms next to them."""
    return rf"{found[1]}{found[2]}U_{{{found[1] or 'x'}}} \cdot V_{{{found[3] or 'x'}}}"


def _beginning(found: re.Match[str]) -> str:
    """Shorten the beginning of an arithmetic sequence to its first two numbers."""
    numbers = [int(number) for number in re.findall(r"\d+", found[0])]
    steps = {after - before for before, after in pairwise(numbers)}
    return f"{numbers[0]}, {numbers[1]}" if len(steps) == 1 else found[0]
