"""YOLO label files: which one belongs to an image, and what a line of it says.

What a path in the settings of a YOLO dataset leads to, on another machine than the one it was written on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from brs_detr.data.formats.base import IMAGE_FOLDERS, Notes, find_files, read_lines
from brs_detr.data.image_io import IMAGE_ENDINGS
from brs_detr.data.synthetic import polygon_area

LABEL_FOLDERS = ("labels", "label", "annotations", "txt")
NO_NUMBERS = "label lines left out that are not `class cx cy w h` nor `class x1 y1 x2 y2 x3 y3 ...`"


class Line(NamedTuple):
    """One object: its class number, and (4,) cx, cy, w, h or a (k, 2) outline, in fractions of the image."""

    label: int
    shape: np.ndarray


def places_of(image: Path) -> list[Path]:
    """Where the label file of an image may lie, in the order they are tried.

    .../images/.../x.jpg has .../labels/.../x.txt; others lie beside the image, or in a folder `labels` there.
    """
    return [folder / f"{image.stem}.txt" for folder in _label_folders(image.parent)]


def find_label_files(images: Iterable[Path]) -> dict[Path, Path | None]:
    """The label file of each image, None where it has none."""
    folders: dict[Path, list[Path]] = {}
    files: dict[Path, Path | None] = {}
    for image in images:
        if image.parent not in folders:
            folders[image.parent] = _label_folders(image.parent)
        places = (folder / f"{image.stem}.txt" for folder in folders[image.parent])
        files[image] = next((place for place in places if place.is_file()), None)
    return files


def _label_folders(folder: Path) -> list[Path]:
    folders: list[Path] = []
    depth = next((i for i in reversed(range(len(folder.parts))) if folder.parts[i].lower() in IMAGE_FOLDERS), None)
    if depth is not None:
        tail = folder.parts[depth + 1 :]
        folders += [place for home in _labels_in(Path(*folder.parts[:depth])) for place in (home.joinpath(*tail), home)]
    folders += [folder, *_labels_in(folder), *(home / folder.name for home in _labels_in(folder.parent))]
    return list(dict.fromkeys(folders))


def _labels_in(folder: Path) -> list[Path]:
    inside = sorted(place for place in folder.iterdir() if place.name.lower() in LABEL_FOLDERS and place.is_dir())
    return sorted(inside, key=lambda place: LABEL_FOLDERS.index(place.name.lower()))


def read_labels(path: Path, keypoints: int, notes: Notes) -> list[tuple[str, Line]]:
    """(place, object) of each line that is one.

    Args:
        path: the label file.
        keypoints: numbers after the box of each line of a pose dataset, 0 for other datasets.
        notes: lines left out are added here.
    """
    found = []
    for number, text in enumerate(read_lines(path), 1):
        if not text:
            continue
        place = f"{path}:{number}"
        try:
            label, *values = map(float, _words(text))
        except ValueError:
            notes.add(NO_NUMBERS, place)
            continue
        shape = _shape(values, keypoints, place, notes)
        if shape is None:
            notes.add(NO_NUMBERS, place)
        elif not math.isfinite(label) or label != int(label):
            notes.add("label lines left out whose class is not an integer", f"{place} ({text.split()[0]})")
        elif not np.isfinite(shape).all():
            notes.add("label lines left out with NaN or infinity", place)
        elif shape.min() < -1 or shape.max() > 2:
            notes.add("label lines left out whose numbers are no fractions of the image (pixels?)", place)
        else:
            found.append((place, Line(int(label), shape)))
    return found


def _words(text: str) -> list[str]:
    """Numbers apart by blanks, tabs, commas or semicolons; some programs write 0,5 for 0.5."""
    words = text.replace(";", " ").split()
    if len(words) < 5 or "." in text:
        return " ".join(words).replace(",", " ").split()
    return [word.strip(",").replace(",", ".") for word in words]


def _shape(values: list[float], keypoints: int, place: str, notes: Notes) -> np.ndarray | None:
    count = len(values)
    is_pose = count > 4 and (count == 4 + keypoints or (count % 2 == 1 and _ends_in_visibilities(values)))
    if count == 4 or is_pose:
        if is_pose:
            notes.add("label lines with keypoints: only their box is taken", place)
        return np.array(values[:4])
    if count >= 5 and count % 2 == 1:
        notes.add("label lines with one number more, taken as a confidence and ignored", place)
        values = values[:-1]
    if len(values) == 4:
        return np.array(values)
    return np.reshape(values, (-1, 2)) if len(values) >= 6 and len(values) % 2 == 0 else None


def _ends_in_visibilities(values: list[float]) -> bool:
    """Are the numbers after the box triples x, y, v with v one of 0, 1, 2?"""
    return (len(values) - 4) % 3 == 0 and set(values[6::3]) <= {0.0, 1.0, 2.0}


def to_annotation(shape: np.ndarray, size: tuple[int, int], orientation: int) -> dict[str, Any]:
    """Box (and outline) in pixels of the frame that training uses.

    Fractions are of the image as it is shown. Where EXIF mirrors it or stands it on its head the size does not tell,
    and the pixels are taken as stored: the shape is turned back instead.

    Args:
        shape: (4,) cx, cy, w, h or (k, 2), fractions.
        size: (h, w) of the image upright.
        orientation: EXIF's number, 1 to 8.
    """
    height, width = size
    points = shape.copy().reshape(-1, 2)
    centers = points[:1] if shape.ndim == 1 else points
    if orientation in (2, 3):
        centers[:, 0] = 1 - centers[:, 0]
    if orientation in (3, 4):
        centers[:, 1] = 1 - centers[:, 1]
    points = points * (width, height)
    if shape.ndim == 1:
        (cx, cy), (w, h) = points.tolist()
        return {"bbox": [cx - w / 2, cy - h / 2, w, h], "iscrowd": 0}
    low, high = points.min(0), points.max(0)
    return {
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": round(abs(polygon_area(points)), 4),
        "segmentation": [points.round(4).ravel().tolist()],
        "iscrowd": 0,
    }


def images_of(entry: Any, roots: tuple[Path, ...], where: str, notes: Notes) -> list[Path]:
    """Images of one entry of a yaml: a folder, a text file that lists them, or one image.

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
        images = find_files(place, IMAGE_ENDINGS, notes)
        if not images:
            notes.add("entries without an image", where)
        return images
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
            notes.add("images left out that a list names and that are not there", f"{file.name}: {line}")
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
        if start and len(parts) - start == 1 and parts[-1].lower() in (*IMAGE_FOLDERS, "..", "data"):
            return None
        for root in roots:
            place = Path(os.path.normpath(root.joinpath(*parts[start:])))
            if place.exists():
                return place
    return None
