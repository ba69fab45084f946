"""The classes of a COCO json, and what tells those of two jsons apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brs_detr.data.faults import DataError, FaultLog
from brs_detr.data.numbers import unquote, whole_number
from brs_detr.user_files import printable


def read_categories(data: dict[str, Any], path: str | Path, log: FaultLog) -> tuple[list[int], list[str]]:
    """Category ids in ascending order and their names; label `k` is the k-th of them.

    Raises:
        DataError: there is no category, an id is not a whole number, or an id occurs twice.
    """
    names: dict[int, str] = {}
    for position, entry in enumerate(data["categories"]):
        if isinstance(entry, dict) and unquote(entry, ("id",)):
            log.add("number_as_text", f"category entry {position}")
        key = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            shown = printable(repr(entry))[:80]
            raise DataError(
                f"{path}: the category {shown} has no whole number as its id; it should look like "
                '{"id": 1, "name": "..."}.'
            )
        if key in names:
            raise DataError(f"{path}: two categories have the id {key}; give each its own.")
        name = entry.get("name")
        name = "" if name is None else _one_line(str(name))
        if not name:
            log.add("category_name_missing", f"category {key}")
            name = str(key)
        elif name in names.values():
            log.add("category_name_duplicate", f"category {key}", name)
        names[key] = name
    if not names:
        raise DataError(f"{path}: the list `categories` is empty, so there is nothing to detect.")
    ids = sorted(names)
    return ids, [names[key] for key in ids]


def categories_differ(
    first: tuple[Sequence[int], Sequence[str]], second: tuple[Sequence[int], Sequence[str]], show: int = 5
) -> str | None:
    """How the categories (ids, names) of two sets differ, id by id, in a few words; None where they do not."""
    ours, theirs = dict(zip(*first, strict=True)), dict(zip(*second, strict=True))
    differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if not differing:
        return None
    cases = [f"id {key} is {_shown(ours, key)} there and {_shown(theirs, key)} here" for key in differing[:show]]
    more = f", and {len(differing) - show:,} more" if len(differing) > show else ""
    return ", ".join(cases) + more


def _shown(names: dict[int, str], key: int) -> str:
    return f"'{names[key]}'" if key in names else "absent"


def _one_line(name: str) -> str:
    # question marks, not codes: weights files hold names that were made so
    return "".join(c if c.isprintable() else "?" for c in " ".join(name.split()))
