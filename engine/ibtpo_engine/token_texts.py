"""The text that a single token adds, and the places where separators divide a text."""

from __future__ import annotations

from typing import Any, Protocol


class Decodes(Protocol):
    """The tokenizer method needed here; transformers' tokenizers have it."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., **options: Any) -> Any:
        """The text of these ids."""


class TokenTexts(dict[int, str]):
    """The text that a token adds to preceding text, by id; each id is decoded once, when first needed.

    Args:
        tokenizer: decodes them.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        once = str(self._tokenizer.decode([token], **options))
        twice = str(self._tokenizer.decode([token, token], **options))  # sentencepiece drops the first token's space
        text = self[token] = twice[len(once) :] if twice.startswith(once) else once
        return text


def boundaries(text: str, separator: str) -> list[int]:
    """Positions just past each separator of a text that neither touches nor overlaps an earlier one."""
    ends, last = [], -len(separator) - 1
    found = text.find(separator)
    while found >= 0:
        if found > last + len(separator):
            ends.append(found + len(separator))
        last = found
        found = text.find(separator, found + 1)
    return ends
