"""The ground truth of an evaluation, in COCO's format, with what is asked of it more than once.

COCO's code trusts its input: a missing area raises, a NaN box corrupts the matching, and an annotation with id 0 or a
duplicate id counts as missed. `CocoDetection` (`data/coco.py`) checks and repairs a json once, for training and
evaluation alike, and its `ground_truth` is what is evaluated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GroundTruth:
    """A checked dataset.

    Attributes:
        dataset: `images`, `annotations`, `categories` in COCO's format; annotations have a `segmentation` (compressed
            run lengths) if it was read with masks.
        names: class name by category id, in ascending order of ids.
        masks: True if it was read with masks.
        frequency: "r", "c" or "f" by category id, where the file says so, as LVIS does.
        negative: category ids by image id that LVIS knows to be absent from the image; empty for other datasets.
        not_exhaustive: category ids by image id of which not all objects are annotated.
    """

    dataset: dict[str, Any]
    names: dict[int, str]
    masks: bool = False
    frequency: dict[int, str] = field(default_factory=dict)
    negative: dict[int, frozenset[int]] = field(default_factory=dict)
    not_exhaustive: dict[int, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def from_dataset(cls, content: dict[str, Any], masks: bool = False) -> GroundTruth:
        """Take the ground truth of a dataset, `CocoDetection.ground_truth()`, which is checked and not copied.

        Args:
            content: in COCO's format: `images` with "id", "height" and "width", `categories` with "id" and "name",
                `annotations` numbered from 1 with "image_id", "category_id", "bbox", "area" and "iscrowd"; ids are
                integers. Of LVIS also its lists of categories of each image, and the categories' "frequency".
            masks: the annotations have a "segmentation", as compressed run lengths of their image's size.
        """
        images, categories = content["images"], sorted(content["categories"], key=lambda category: category["id"])
        return cls(
            content,
            {category["id"]: category["name"] for category in categories},
            masks,
            {category["id"]: category["frequency"] for category in categories if "frequency" in category},
            *(
                {image["id"]: frozenset(image[name]) for image in images if name in image}
                for name in ("neg_category_ids", "not_exhaustive_category_ids")
            ),
        )

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
        """Return the (h, w) of all images by id."""
        return {image["id"]: (image["height"], image["width"]) for image in self.dataset["images"]}

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
