"""What a path in the settings of a YOLO dataset leads to, on another machine than the one it was written on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from brs_detr.data.labelled import PICTURE_FOLDERS, Notes, find_files, read_lines
from brs_detr.data.pictures import PICTURE_ENDINGS


def pictures_of(entry: Any, roots: tuple[Path, ...], where: str, notes: Notes) -> list[Path]:
    """Pictures of one entry of a yaml: a folder, a text file that lists them, or one picture.

    Args:
        entry: the path as written.
        roots: folders that it may be relative to, the likeliest first.
        where: file, key and entry, for the notes.
        notes: what was not found, or found elsewhere, is added here.
    """
    place = locate(entry, roots) if isinstance(entry, str) else None
    if place is None:
        notes.add("entries left out that lead nowhere", f"{where} (looked for in {', '.join(map(str, roots))})")
        return []
    if place != Path(os.path.normpath(roots[0] / entry)):
        notes.add("entries found elsewhere", f"{where} is {place}")
    if place.is_dir():
        pictures = find_files(place, PICTURE_ENDINGS, notes)
        if not pictures:
            notes.add("entries without a picture", where)
        return pictures
    return _listed(place, roots, notes) if place.suffix.lower() == ".txt" else [place]


def _listed(file: Path, roots: tuple[Path, ...], notes: Notes) -> list[Path]:
    roots = tuple(dict.fromkeys((file.parent, *roots)))
    found: dict[Path, None] = {}
    folders: dict[str, Path] = {}  # lines name few folders: each is looked for once
    for line in filter(None, read_lines(file)):
        head, _, name = line.replace("\\", "/").rpartition("/")
        place = folders[head] / name if head in folders else None
        if place is None or not place.is_file():
            place = locate(line, roots)
        if place is None or not place.is_file():
            notes.add("pictures left out that a list names and that are not there", f"{file.name}: {line}")
            continue
        folders[head] = place.parent
        found[place] = None
    return list(found)


def locate(text: str, roots: Iterable[Path]) -> Path | None:
    """A path as written under one of the roots; else without its first parts, which may be another machine's.

    Many exports have one `../` too many, or the folder they were written in. Nothing is guessed from a last part that
    any dataset has, like `images`.
    """
    parts = PurePosixPath(text.replace("\\", "/")).parts
    for start in range(max(1, len(parts))):
        if start and len(parts) - start == 1 and parts[-1].lower() in (*PICTURE_FOLDERS, "..", "data"):
            return None
        for root in roots:
            place = Path(os.path.normpath(root.joinpath(*parts[start:])))
            if place.exists():
                return place
    return None
