"""Check ground truth and repair it in memory for COCO's evaluation code, by the rules that training follows.

COCO's code trusts its input: a missing area raises, a NaN box corrupts the matching, and an annotation with id 0 or a
duplicate id counts as missed. So every annotation is checked and renumbered; the file is not changed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brs_detr.ops.rle import RLE, as_text, box_bitmap, encode, pack_segmentation, stated_size, to_rle
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, read_file


@dataclass
class GroundTruth:
    """A checked dataset.

    Attributes:
        dataset: `images`, `annotations`, `categories` in COCO's format; annotations have a `segmentation` (compressed
            run lengths) if it was read with masks.
        names: class name by category id, in ascending order of ids.
        issues: number of entries that were dropped or repaired, by issue.
        masks: True if it was read with masks.
        frequency: "r", "c" or "f" by category id, where the file says so, as LVIS does.
        negative: category ids by image id that LVIS knows to be absent from the image; empty for other datasets.
        not_exhaustive: category ids by image id of which not all objects are annotated.
    """

    dataset: dict[str, list[dict[str, Any]]]
    names: dict[int, str]
    issues: Counter[str] = field(default_factory=Counter)
    masks: bool = False
    frequency: dict[int, str] = field(default_factory=dict)
    negative: dict[int, frozenset[int]] = field(default_factory=dict)
    not_exhaustive: dict[int, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, annotations: str | Path | dict[str, Any] | GroundTruth, masks: bool = False) -> GroundTruth:
        """Check a COCO json or its content; a `GroundTruth` is returned unchanged.

        Args:
            annotations: the json's path, its content, or a checked `GroundTruth`.
            masks: also read the masks; an object without a usable one has its box.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not regular or gives a key two values, a list that COCO's format requires is
                missing, or a category has no id; for masks, an image has no size, or the `GroundTruth` no masks.
        """
        if isinstance(annotations, cls):
            if masks and not annotations.masks:
                raise ValueError("the annotations were read without masks. Read them with masks=True.")
            return annotations
        source = "the annotations"
        content: Any = annotations
        if isinstance(annotations, (str, Path)):
            source, content = str(annotations), _load(annotations)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise ValueError(f"{source}: no list `{key}`, so this is not a COCO detection dataset")
        issues: Counter[str] = Counter()
        images = _images(content["images"], issues)
        names = _names(content["categories"], source)
        boxes = _annotations(content["annotations"], images, names, issues, masks)
        categories = [{"id": key, "name": names[key]} for key in sorted(names)]
        dataset = {"images": list(images.values()), "annotations": boxes, "categories": categories}
        names = {key: names[key] for key in sorted(names)}
        frequency = {parse_id(entry["id"]): entry.get("frequency") for entry in content["categories"]}
        known = {key: frequency[key] for key in names if frequency[key] in FREQUENCIES}
        lists = (
            _category_lists(content["images"], name) for name in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        return cls(dataset, names, issues, masks, known, *lists)

    @property
    def federated(self) -> bool:
        """Return True if only some classes are annotated in each image, as in LVIS."""
        return bool(self.negative)

    @property
    def image_ids(self) -> list[int]:
        """Return the ids of all images."""
        return [image["id"] for image in self.dataset["images"]]

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Return the (h, w) of all images by id, (0, 0) where the file does not say."""
        images = self.dataset["images"]
        return {image["id"]: (parse_id(image["height"]) or 0, parse_id(image["width"]) or 0) for image in images}

    def max_objects(self, image_ids: Iterable[int], *, by_class: bool = True) -> tuple[int, int | None]:
        """Return (maximum number of objects in an image, that image's id), of one class or of all; without crowds."""
        selected = set(image_ids)
        counts = Counter(
            (a["image_id"], a["category_id"] if by_class else None)
            for a in self.dataset["annotations"]
            if a["image_id"] in selected and not a["iscrowd"]
        )
        if not counts:
            return 0, None
        (image, _), number = counts.most_common(1)[0]
        return number, image


FREQUENCIES = ("r", "c", "f")  # classes in up to 10, up to 100 and more training images of LVIS


def _category_lists(entries: list[Any], name: str) -> dict[int, frozenset[int]]:
    """Read a list of category ids of each image, by image id; as with the images, the first entry of an id counts."""
    lists: dict[int, frozenset[int]] = {}
    for entry in entries:
        key = parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if key is not None and isinstance(entry.get(name), list):
            ids = (parse_id(value) for value in entry[name])
            lists.setdefault(key, frozenset(value for value in ids if value is not None))
    return lists


def _load(path: str | Path) -> Any:
    try:
        return json.loads(read_file(path).decode("utf-8-sig"), object_pairs_hook=dict_of_pairs)
    except (UserFileError, TwoValuesError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse_id(value: Any) -> int | None:
    """Return an id as int, which some tools quote or write as 3.0; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return int(value) if _is_number(value) and value == value // 1 else None


def _names(entries: list[Any], source: str) -> dict[int, str]:
    """Read the class names by category id."""
    names = {}
    for entry in entries:
        key = parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            raise ValueError(f"{source}: the category {entry!r} has no integer id")
        names[key] = str(entry.get("name", key))
    return names


def _images(entries: list[Any], issues: Counter[str]) -> dict[int, dict[str, Any]]:
    """Read the images by id; the first one with an id is kept, as in training."""
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        key = parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            issues["image without id dropped"] += 1
        elif key in images:
            issues["second image of the same id dropped"] += 1
        else:
            images[key] = {"id": key, **{name: entry.get(name) for name in ("file_name", "height", "width")}}
    return images


def _annotations(
    entries: list[Any], images: dict[int, Any], names: dict[int, str], issues: Counter[str], masks: bool
) -> list[dict[str, Any]]:
    """Check and renumber the annotations; `ignore` becomes `iscrowd`, which COCO's code treats the same way."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        issue = _find_issue(entry, images, names)
        if issue:
            issues[f"{issue}, dropped"] += 1
            continue
        box = [float(value) for value in entry["bbox"]]
        area = entry.get("area")
        if not _is_number(area) or not 0 < area < math.inf:
            issues["area missing or not positive, width times height used"] += 1
            area = box[2] * box[3]
        kept.append(
            {
                "id": len(kept) + 1,  # from 1: COCO's code reads id 0 as "not matched"
                "image_id": parse_id(entry["image_id"]),
                "category_id": parse_id(entry["category_id"]),
                "bbox": box,
                "area": float(area),
                "iscrowd": int(bool(entry.get("iscrowd") or entry.get("ignore"))),
            }
        )
        if masks:
            kept[-1]["segmentation"] = _mask(entry.get("segmentation"), box, images[kept[-1]["image_id"]], issues)
    return kept


def _mask(segmentation: Any, box: list[float], image: dict[str, Any], issues: Counter[str]) -> RLE:
    """Return checked run lengths of the image's size, those of the box if the segmentation is not usable."""
    height, width = (parse_id(image[side]) for side in ("height", "width"))
    if not height or not width:
        raise ValueError(f"image {image['id']}: without a height and a width its masks cannot be evaluated.")
    words = np.frombuffer(pack_segmentation(segmentation), np.uint32)
    if len(words) and stated_size(words) in (None, (height, width)):
        return as_text(to_rle(words, (height, width)))
    issues["mask missing or not usable, box used"] += 1
    x, y, w, h = box
    return as_text(encode(box_bitmap(np.array([x, y, x + w, y + h]), (height, width))))


def _find_issue(entry: Any, images: dict[int, Any], names: dict[int, str]) -> str | None:
    """Return what makes an annotation unusable, None if it is usable."""
    if not isinstance(entry, dict):
        return "annotation is not an object"
    image, box = parse_id(entry.get("image_id")), entry.get("bbox")
    if image is None or image not in images:
        return "annotation of an unknown image"
    if parse_id(entry.get("category_id")) not in names:
        return "annotation of an unknown category"
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(v) for v in box):
        return "box is not four numbers"
    if not all(abs(v) < 1e9 for v in box):  # also catches NaN, which compares false
        return "box is not finite"
    if min(box[2:]) <= 0:
        return "box is empty"
    height, width = images[image]["height"], images[image]["width"]
    if box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        return "box is outside its image"
    if _is_number(height) and _is_number(width) and min(height, width) > 0 and (box[0] >= width or box[1] >= height):
        return "box is outside its image"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
