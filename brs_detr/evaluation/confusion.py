"""The confusion matrix: as which class objects are found, at the scores where each class has its best F1.

Each class first takes its own objects, as COCO matches them at IoU 0.5; only what is left over can be a confusion. So
the diagonal over the sum of its row is the recall of the class table, and over the sum of its column the precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

BACKGROUND, MISSED = "background", "missed"


@dataclass(frozen=True)
class Confusion:
    """Counts of objects and detections at IoU 0.5.

    Attributes:
        classes: C names, in ascending order of category ids.
        counts: (C + 1, C + 1) int. [i, j] objects of class i were found as class j; [i, C] objects of class i were
            missed; [C, j] detections of class j have no object of their own, be it that they lie on background or that
            another detection has taken the object; [C, C] is 0.
    """

    classes: list[str]
    counts: np.ndarray

    def most_frequent(self, number: int) -> list[str]:
        """Sentences such as `ring found as disc: 7 of 82`, the largest counts first; none where all counts are 0."""
        between = self.counts[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        order = np.argsort(-between, axis=None, kind="stable")[:number]
        pairs = [np.unravel_index(place, between.shape) for place in order]
        return [
            f"{self.classes[true]} found as {self.classes[found]}: {between[true, found]:,} of "
            f"{self.counts[true].sum():,}"
            for true, found in pairs
            if between[true, found]
        ]

    def table(self) -> list[list[Any]]:
        """A header and one row a true class, with names, ready for a csv file."""
        content = self.as_dict()
        rows = zip(content["true"], content["counts"], strict=True)
        return [["true / found", *content["found"]], *([name, *row] for name, row in rows)]

    def as_dict(self) -> dict[str, Any]:
        """Names of the rows (`true`) and columns (`found`), and the `counts`, ready for a json."""
        names = {"true": [*self.classes, BACKGROUND], "found": [*self.classes, MISSED]}
        return names | {"counts": self.counts.tolist()}


def confusion_matrix(
    truths: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    lowest: Mapping[int, float],
    *,
    threshold: float = 0.5,
    max_detections: int = 100,
) -> Confusion:
    """Count as which class each object is found.

    In every image, the best score first: (1) a detection takes the free object of its own class that it overlaps most,
    if by `threshold`, the last one among equals, as in COCO's evaluation; (2) of those without one, a detection mostly
    inside a crowd of its class is left out; (3) each of the rest takes the free object of any class that it overlaps
    most, if by `threshold`. Objects then left are missed, detections then left have no object.

    Args:
        truths: COCO annotations with `image_id`, `category_id`, `bbox` xywh and `iscrowd`; crowds are not counted.
        detections: COCO results with `image_id`, `category_id`, `bbox` and `score`.
        names: name by category id, in the order of rows and columns.
        lowest: by category id, the lowest score of a detection that counts; a class without an entry has none.
        threshold: least IoU; for a crowd, least share of the detection inside it.
        max_detections: best detections kept for each image and class.
    """
    label_of = {category: label for label, category in enumerate(names)}
    truths = [truth for truth in truths if truth["category_id"] in label_of]
    detections = [d for d in detections if d["score"] >= lowest.get(d["category_id"], np.inf)]
    detections.sort(key=lambda detection: -detection["score"])
    labels = [np.array([label_of[row["category_id"]] for row in rows], int) for rows in (truths, detections)]
    counts = np.zeros((len(names) + 1, len(names) + 1), int)
    groups = _by_image(detections)
    for image, objects in _by_image(truths).items():
        found = _best_of_each_class(groups.pop(image, []), labels[1], max_detections)
        _count_image(
            counts,
            (labels[0][objects], labels[1][found]),
            np.array([bool(truths[row]["iscrowd"]) for row in objects]),
            [[rows[row]["bbox"] for row in chosen] for rows, chosen in ((truths, objects), (detections, found))],
            threshold,
        )
    for rows in groups.values():  # images without objects
        np.add.at(counts[-1], labels[1][_best_of_each_class(rows, labels[1], max_detections)], 1)
    return Confusion(list(names.values()), counts)


def _by_image(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Row numbers by image id, in order."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["image_id"], []).append(number)
    return groups


def _best_of_each_class(rows: list[int], labels: np.ndarray, limit: int) -> np.ndarray:
    """The first `limit` of each label among the rows of one image, best score first."""
    chosen = np.array(rows, int)
    if len(rows) <= limit:
        return chosen
    same = labels[chosen][:, None] == labels[chosen]
    return chosen[np.tril(same).sum(1) <= limit]


def _count_image(
    counts: np.ndarray, labels: tuple[np.ndarray, np.ndarray], crowd: np.ndarray, boxes: list, threshold: float
) -> None:
    """Add one image with objects; `labels` and `boxes` are those of (objects, detections), the best score first."""
    true, found = labels
    free, taken = ~crowd, np.full(len(found), -1)
    counted = np.ones(len(found), bool)
    if len(found):
        overlap = coco_mask.iou(np.array(boxes[1], float), np.array(boxes[0], float), crowd.astype(np.uint8))
        near, own = overlap >= threshold, found[:, None] == true
        _take(taken, free, overlap, near & own)
        counted = (taken >= 0) | ~(near & own & crowd).any(1)
        _take(taken, free, overlap, near & counted[:, None] & (taken < 0)[:, None])
    hit = taken >= 0
    np.add.at(counts, (true[taken[hit]], found[hit]), 1)
    np.add.at(counts[-1], found[counted & ~hit], 1)
    np.add.at(counts[:, -1], true[free], 1)


def _take(taken: np.ndarray, free: np.ndarray, overlap: np.ndarray, allowed: np.ndarray) -> None:
    """Each detection in turn takes the free object of largest overlap it is allowed; `taken`, `free` are changed."""
    for row in np.flatnonzero((allowed & free).any(1)):
        columns = np.flatnonzero(allowed[row] & free)[::-1]  # reversed: the last among equals
        if len(columns):
            taken[row] = columns[overlap[row, columns].argmax()]
            free[taken[row]] = False
