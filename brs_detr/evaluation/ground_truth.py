"""True boxes as COCO's evaluation code wants them, mended in memory by the rules that training follows.

COCO's code trusts its input: a missing area raises, a NaN box spoils the matching, an annotation whose id is 0 or taken
twice counts as never found. So every annotation is checked and numbered anew; the file is not touched.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, read_file


@dataclass
class GroundTruth:
    """A checked dataset.

    Attributes:
        dataset: `images`, `annotations`, `categories` in COCO's form, without masks.
        names: class name by category id, in ascending order of ids.
        faults: how many entries were dropped or mended, by what was wrong.
    """

    dataset: dict[str, list[dict[str, Any]]]
    names: dict[int, str]
    faults: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, annotations: str | Path | dict[str, Any] | GroundTruth) -> GroundTruth:
        """Check a COCO json or its content; what is checked already passes as it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no regular file or gives a key two values, a list that COCO's format needs is missing, or
                a category has no id.
        """
        if isinstance(annotations, cls):
            return annotations
        source = "the annotations"
        if not isinstance(annotations, dict):
            source = str(annotations)
            annotations = _load(annotations)
        for key in ("images", "annotations", "categories"):
            if not isinstance(annotations, dict) or not isinstance(annotations.get(key), list):
                raise ValueError(f"{source}: no list `{key}`, so this is not a COCO detection dataset")
        faults: Counter[str] = Counter()
        images = _images(annotations["images"], faults)
        names = _names(annotations["categories"], source)
        boxes = _annotations(annotations["annotations"], images, names, faults)
        categories = [{"id": key, "name": names[key]} for key in sorted(names)]
        dataset = {"images": list(images.values()), "annotations": boxes, "categories": categories}
        return cls(dataset, {c["id"]: c["name"] for c in categories}, faults)

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images."""
        return [image["id"] for image in self.dataset["images"]]

    def max_objects(self, image_ids: Iterable[int], *, by_class: bool = True) -> tuple[int, int | None]:
        """(largest number of objects in one image, that image's id); of one class or of all. Crowds do not count."""
        wanted = set(image_ids)
        counts = Counter(
            (a["image_id"], a["category_id"] if by_class else None)
            for a in self.dataset["annotations"]
            if a["image_id"] in wanted and not a["iscrowd"]
        )
        if not counts:
            return 0, None
        (image, _), number = counts.most_common(1)[0]
        return number, image


def _load(path: str | Path) -> Any:
    try:
        return json.loads(read_file(path).decode("utf-8-sig"), object_pairs_hook=dict_of_pairs)
    except (UserFileError, TwoValuesError) as error:
        raise ValueError(f"{path}: {error}") from None


def whole_id(value: Any) -> int | None:
    """An id as an integer, which some tools quote or write as 3.0; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return int(value) if _number(value) and value == value // 1 else None


def _names(entries: list[Any], source: str) -> dict[int, str]:
    names = {}
    for entry in entries:
        key = whole_id(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            raise ValueError(f"{source}: the category {entry!r} has no integer id")
        names[key] = str(entry.get("name", key))
    return names


def _images(entries: list[Any], faults: Counter[str]) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        key = whole_id(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            faults["image without id dropped"] += 1
        elif key in images:
            faults["second image of the same id dropped"] += 1
        else:
            images[key] = {"id": key, **{name: entry.get(name) for name in ("file_name", "height", "width")}}
    return images


def _annotations(
    entries: list[Any], images: dict[int, Any], names: dict[int, str], faults: Counter[str]
) -> list[dict[str, Any]]:
    kept = []
    for entry in entries:
        fault = _fault(entry, images, names)
        if fault:
            faults[f"{fault}, dropped"] += 1
            continue
        box = [float(value) for value in entry["bbox"]]
        area = entry.get("area")
        if not _number(area) or not 0 < area < math.inf:
            faults["area missing or not positive, width times height taken"] += 1
            area = box[2] * box[3]
        kept.append(
            {
                "id": len(kept) + 1,  # COCO's code takes an id of 0 for "not matched"
                "image_id": whole_id(entry["image_id"]),
                "category_id": whole_id(entry["category_id"]),
                "bbox": box,
                "area": float(area),
                "iscrowd": int(bool(entry.get("iscrowd") or entry.get("ignore"))),
            }
        )
    return kept


def _fault(entry: Any, images: dict[int, Any], names: dict[int, str]) -> str | None:
    """What makes an annotation unusable, or None."""
    if not isinstance(entry, dict):
        return "annotation is no object"
    image, box = whole_id(entry.get("image_id")), entry.get("bbox")
    if image not in images:
        return "annotation of an unknown image"
    if whole_id(entry.get("category_id")) not in names:
        return "annotation of an unknown category"
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_number(v) for v in box):
        return "box is not four numbers"
    if not all(abs(v) < 1e9 for v in box):  # also catches NaN, which compares false
        return "box is not finite"
    if min(box[2:]) <= 0:
        return "box is empty"
    height, width = images[image]["height"], images[image]["width"]
    if box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        return "box is outside its image"
    if _number(height) and _number(width) and min(height, width) > 0 and (box[0] >= width or box[1] >= height):
        return "box is outside its image"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
