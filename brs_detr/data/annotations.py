"""A COCO json as columns of numbers; entries that are not well formed go by the policy of `faults.py`.

Nothing here opens a picture, and nothing keeps the json's Python objects. What needs pictures is in `frames.py`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from brs_detr.data.faults import DataError, FaultLog


@dataclass
class Images:
    """Columns over images.

    Attributes:
        ids: (I,) int64; names: I file names.
        frames: (I, 2) int32 (h, w) that the boxes are drawn in.
        pictures: (I, 2) int32 (h, w) of the file as it will be read; the frame where the file was not opened.
    """

    ids: np.ndarray
    names: list[str]
    frames: np.ndarray
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        return f"image {self.ids[row]} ({self.names[row]})"

    def keep(self, rows: np.ndarray) -> Images:
        """The images of a boolean mask (I,)."""
        names = [name for name, kept in zip(self.names, rows, strict=True) if kept]
        return Images(self.ids[rows], names, self.frames[rows], self.pictures[rows])


@dataclass
class Objects:
    """Columns over annotations.

    Attributes:
        ids: (N,) int64; rows: (N,) int64 into the images; labels: (N,) int32, 0..C-1.
        xywh: (N, 4) float64 pixels; areas: (N,) float64; crowd: (N,) bool.
    """

    ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, which: np.ndarray) -> Objects:
        """The annotations of a boolean mask or index array."""
        return Objects(*(getattr(self, field.name)[which] for field in fields(self)))


def load_json(path: str | Path) -> dict[str, Any]:
    """Read a COCO json; polygons and run lengths are dropped while it is parsed, for they are most of its memory.

    Raises:
        DataError: the file is missing, is no JSON, or is not a detection dataset.
    """
    try:
        with open(path, encoding="utf-8-sig") as file, _no_collection():
            data = json.load(file, object_hook=_without_masks)
    except FileNotFoundError:
        raise DataError(f"{path}: this annotation file does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: this is not a JSON file ({error}).") from None
    if isinstance(data, list):
        raise DataError(f"{path}: this is a list, as detection results are; a dataset has images and annotations.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{path}: this is not a COCO detection dataset: it has no list `{key}`.")
    return data


@contextmanager
def _no_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage: the collector would only walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_masks(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def read_categories(data: dict[str, Any], path: str | Path, log: FaultLog) -> tuple[list[int], list[str]]:
    """Category ids in ascending order and their names; label `k` is the k-th of them.

    Raises:
        DataError: there is no category, an id is not a whole number, or an id occurs twice.
    """
    names: dict[int, str] = {}
    for entry in data["categories"]:
        key = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            raise DataError(f"{path}: the category {entry!r} has no whole number as its id.")
        if key in names:
            raise DataError(f"{path}: two categories have the id {key}; give each its own.")
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            log.add("category_name_missing", f"category {key}")
            name = str(key)
        elif name in names.values():
            log.add("category_name_duplicate", f"category {key}", name)
        names[key] = name
    if not names:
        raise DataError(f"{path}: the list `categories` is empty, so there is nothing to detect.")
    ids = sorted(names)
    return ids, [names[key] for key in ids]


def read_images(data: dict[str, Any], log: FaultLog) -> Images:
    """The images with usable entries; the size is 0 where the json gives none."""
    ids: list[int] = []
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    seen: set[int] = set()
    for position, entry in enumerate(data["images"]):
        key = _whole(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not name:
            log.add("image_malformed", f"image entry {position}", "its id must be a whole number, file_name a text")
            continue
        if key in seen:
            log.add("image_id_duplicate", f"image {key} ({name})")
            continue
        seen.add(key)
        height, width = _whole(entry.get("height")), _whole(entry.get("width"))
        known = height is not None and width is not None and height > 0 and width > 0
        ids.append(key)
        names.append(name)
        sizes.append((height, width) if known else (0, 0))
    frames = np.array(sizes, np.int32).reshape(-1, 2)
    return Images(np.array(ids, np.int64), names, frames, frames.copy())


def read_objects(data: dict[str, Any], images: Images, category_ids: list[int], log: FaultLog) -> Objects:
    """The annotations that are well formed: known image and category, a box of four finite numbers with w, h > 0."""
    row_of = {int(key): row for row, key in enumerate(images.ids)}
    label_of = {key: label for label, key in enumerate(category_ids)}
    ids, rows, labels, boxes, areas, crowd = ([] for _ in range(6))
    seen: set[int] = set()
    for position, entry in enumerate(data["annotations"]):
        if not isinstance(entry, dict) or "image_id" not in entry or "category_id" not in entry:
            log.add("annotation_malformed", f"annotation entry {position}")
            continue
        key, row, label = entry.get("id"), _get(row_of, entry["image_id"]), _get(label_of, entry["category_id"])
        if row is None or label is None:
            kind = "image_id_unknown" if row is None else "category_id_unknown"
            name = kind.removesuffix("_unknown")
            log.add(kind, f"annotation {key}", f"{name} {entry[name]!r}")
            continue
        box = entry.get("bbox")
        wrong = _wrong_box(box)
        if wrong:
            log.add(wrong, f"annotation {key} ({images.names[row]})", f"bbox {box!r}" if "bbox" in entry else "")
            continue
        key = _whole(key)
        if key in seen:
            log.add("annotation_id_duplicate", f"annotation {key} ({images.names[row]})")
        elif key is not None:
            seen.add(key)
        is_crowd, area = _crowd_and_area(entry, box, images.names[row], log)
        ids.append(key or 0)
        rows.append(row)
        labels.append(label)
        boxes.append(box)
        areas.append(area)
        crowd.append(is_crowd)
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    return Objects(
        np.array(ids, np.int64),
        np.array(rows, np.int64),
        np.array(labels, np.int32),
        xywh,
        np.array(areas, np.float64),
        np.array(crowd, bool),
    )


def _crowd_and_area(entry: dict[str, Any], box: list, name: str, log: FaultLog) -> tuple[bool, float]:
    crowd, area = entry.get("iscrowd"), entry.get("area")
    where = ""
    if crowd is None or crowd or "ignore" in entry or not _number(area) or not 0 < area < 1e18:
        where = f"annotation {entry.get('id')} ({name})"
    if crowd is None:
        log.add("iscrowd_missing", where)
    elif crowd:
        log.add("crowd", where)
    if not crowd and entry.get("ignore"):
        log.add("ignored", where)
        crowd = True
    if not _number(area) or not 0 < area < 1e18:
        log.add("area_missing" if area is None else "area_not_positive", where, "" if area is None else f"area {area}")
        area = box[2] * box[3]
    return bool(crowd), float(area)


# these four run once per number of the json: exact types first, for speed
def _wrong_box(box: Any) -> str | None:
    if box is None:
        return "box_missing"
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        return "box_not_four_numbers"
    x, y, w, h = box
    if not (-1e9 < x < 1e9 and -1e9 < y < 1e9 and -1e9 < w < 1e9 and -1e9 < h < 1e9):  # NaN compares false
        return "box_not_finite"
    if w < 0 or h < 0:
        return "box_negative"
    return "box_empty" if w == 0 or h == 0 else None


_NUMBERS = frozenset((int, float))


def _number(value: Any) -> bool:
    return type(value) in _NUMBERS


def _whole(value: Any) -> int | None:
    if type(value) is str and value.isascii() and value.isdigit():  # some tools quote their ids and sizes
        value = int(value)
    if type(value) is int:
        return value if -(2**62) < value < 2**62 else None
    return int(value) if type(value) is float and abs(value) < 2**53 and value.is_integer() else None


def _get(table: dict[int, int], key: Any) -> int | None:
    return table.get(key) if type(key) is int else table.get(_whole(key))
