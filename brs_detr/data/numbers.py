"""Numbers of a json as labelling tools write them: 3.0 for an id, "17" in quotes, true for 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WORDS = {"true": 1, "false": 0}
_NUMBERS = frozenset((int, float))


def is_number(value: Any) -> bool:
    """An int or a float; a bool is none."""
    return type(value) in _NUMBERS


def whole_number(value: Any) -> int | None:
    """The value as an id or a size: an int, or a float without a fraction, that fits 64 bits; else None."""
    if type(value) is int:
        return value if -(2**62) < value < 2**62 else None
    return int(value) if type(value) is float and abs(value) < 2**53 and value.is_integer() else None


def unquote(entry: dict[str, Any], keys: Sequence[str]) -> bool:
    """Replace texts that are numbers by these numbers, in place; also within a list.

    Args:
        entry: of a json.
        keys: where to look.

    Returns:
        whether there was one.
    """
    found = False
    for key in keys:
        value = entry.get(key)
        if type(value) is str:
            plain = _plain(value)
        elif type(value) is list and str in map(type, value):
            plain = [_plain(item) if type(item) is str else item for item in value]
        else:
            continue
        found |= plain != value
        entry[key] = plain
    return found


def _plain(text: str) -> int | float | str:
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:  # also an int of thousands of digits
            continue
    return text
