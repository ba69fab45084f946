"""Find and parse YOLO label files, and resolve the paths in YOLO settings, which often come from another machine."""

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
    """An object: its class number, and (4,) cx, cy, w, h or a (k, 2) polygon, in fractions of the image size."""

    label: int
    shape: np.ndarray


def label_candidates(image: Path) -> list[Path]:
    """Return the possible paths of an image's label file, in the order they are tried.

    .../images/.../x.jpg has .../labels/.../x.txt; others are beside the image, or in a folder `labels` beside it.
    """
    return [folder / f"{image.stem}.txt" for folder in _label_folders(image.parent)]


def find_label_files(images: Iterable[Path]) -> dict[Path, Path | None]:
    """Find the label file of each image; None if there is no such file."""
    folders: dict[Path, list[Path]] = {}
    files: dict[Path, Path | None] = {}
    for image in images:
        if image.parent not in folders:
            folders[image.parent] = _label_folders(image.parent)  # once per folder: it lists other folders
        candidates = (folder / f"{image.stem}.txt" for folder in folders[image.parent])
        files[image] = next((path for path in candidates if path.is_file()), None)
    return files


def _label_folders(folder: Path) -> list[Path]:
    folders: list[Path] = []
    # the last folder named `images`: earlier ones may be the user's own
    depth = next((i for i in reversed(range(len(folder.parts))) if folder.parts[i].lower() in IMAGE_FOLDERS), None)
    if depth is not None:
        tail = folder.parts[depth + 1 :]
        for labels in _labels_in(Path(*folder.parts[:depth])):
            folders += [labels.joinpath(*tail), labels]
    folders += [folder, *_labels_in(folder), *(labels / folder.name for labels in _labels_in(folder.parent))]
    return list(dict.fromkeys(folders))


def _labels_in(folder: Path) -> list[Path]:
    """Return the label folders directly in a folder, the most common name first."""
    inside = sorted(path for path in folder.iterdir() if path.name.lower() in LABEL_FOLDERS and path.is_dir())
    return sorted(inside, key=lambda path: LABEL_FOLDERS.index(path.name.lower()))


def read_labels(path: Path, keypoints: int, notes: Notes) -> list[tuple[str, Line]]:
    """Parse a label file to (location for the notes, object) of each valid line.

    Args:
        path: the label file.
        keypoints: count of numbers after the box in a pose dataset, 0 for other datasets.
        notes: invalid lines are added here.
    """
    objects: list[tuple[str, Line]] = []
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
        elif shape.min() < -1 or shape.max() > 2:  # generous, since truncated objects may exceed 0..1
            notes.add("label lines left out whose numbers are not fractions of the image (pixels?)", place)
        else:
            objects.append((place, Line(int(label), shape)))
    return objects


def _words(text: str) -> list[str]:
    """Split numbers at blanks, tabs, commas or semicolons; some programs write 0,5 for 0.5."""
    words = text.replace(";", " ").split()
    # a comma is a decimal comma only if blanks already separate five numbers and there is no decimal point
    if len(words) < 5 or "." in text:
        return " ".join(words).replace(",", " ").split()
    return [word.strip(",").replace(",", ".") for word in words]


def _shape(values: list[float], keypoints: int, place: str, notes: Notes) -> np.ndarray | None:
    """Interpret the numbers after the class by their count: box, pose, polygon, or one of them and a confidence."""
    count = len(values)
    is_pose = count > 4 and (count == 4 + keypoints or (count % 2 == 1 and _ends_in_visibilities(values)))
    if count == 4 or is_pose:
        if is_pose:
            notes.add("label lines with keypoints: only their box is taken", place)
        return np.array(values[:4])
    if count >= 5 and count % 2 == 1:
        notes.add("label lines with one number more, which is ignored as a confidence", place)
        values = values[:-1]
    if len(values) == 4:
        return np.array(values)
    return np.reshape(values, (-1, 2)) if len(values) >= 6 and len(values) % 2 == 0 else None


def _ends_in_visibilities(values: list[float]) -> bool:
    """Return True if the numbers after the box are triples x, y, v with v in {0, 1, 2} (COCO's visibility)."""
    return (len(values) - 4) % 3 == 0 and set(values[6::3]) <= {0.0, 1.0, 2.0}


def to_annotation(shape: np.ndarray, size: tuple[int, int], orientation: int) -> dict[str, Any]:
    """Convert a box or polygon to a COCO annotation in pixels of the frame that training uses.

    Fractions refer to the image as displayed. If EXIF mirrors it or turns it by 180 degrees, or it is square, the size
    does not tell whether that was applied, and training uses the pixels as stored; so the shape is turned back instead.

    Args:
        shape: (4,) cx, cy, w, h or (k, 2), fractions.
        size: (h, w) of the upright image.
        orientation: EXIF orientation, 1 to 8.
    """
    height, width = size
    points = shape.copy().reshape(-1, 2)
    centers = points[:1] if shape.ndim == 1 else points
    is_turned = orientation >= 5 and height == width  # by 90 degrees; other images are turned when they are read
    if orientation in (2, 3) or (is_turned and orientation in (6, 7)):
        centers[:, 0] = 1 - centers[:, 0]
    if orientation in (3, 4) or (is_turned and orientation in (7, 8)):
        centers[:, 1] = 1 - centers[:, 1]
    points = (points[:, ::-1] if is_turned else points) * (width, height)
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
    """Find the images of an entry of a yaml: a folder, a text file that lists images, or one image.

    Args:
        entry: the path as written.
        roots: folders that it may be relative to, the most likely first.
        where: file, key and entry, for the notes.
        notes: paths that do not exist, or exist elsewhere, are added here.
    """
    place = locate(entry, roots) if isinstance(entry, str) else None
    if place is None:
        notes.add("entries left out that do not exist", f"{where} (searched in {', '.join(map(str, roots))})")
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
    images: dict[Path, None] = {}  # a dict as an ordered set
    folders: dict[str, Path] = {}  # a list names few folders: each is located once
    for line in filter(None, read_lines(file)):
        head, _, name = line.replace("\\", "/").rpartition("/")
        place = folders[head] / name if head in folders else None
        if place is None or not place.is_file():
            place = locate(line, roots)
        if place is None or not place.is_file():
            notes.add("listed images left out that do not exist", f"{file.name}: {line}")
            continue
        folders[head] = place.parent
        images[place] = None
    return list(images)


def locate(text: str, roots: Iterable[Path]) -> Path | None:
    """Find a path under one of the roots: as written, else without its first parts, which may be another machine's.

    Many exports have one `../` too many, or start with the folder they were written in. A last part that any dataset
    has, like `images`, is not matched alone.
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
