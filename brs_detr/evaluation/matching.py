"""Which detection found which object at IoU 0.5, class by class: the raw material of precision, recall and LRP.

The confusion matrix: as which class objects are found, at the scores where each class has its best F1.

Each class first takes its own objects, as COCO matches them at IoU 0.5; only what is left over can be a confusion. So
the diagonal over the sum of its row is the recall of the class table, and over the sum of its column the precision.

Localization Recall Precision error (Oksuz et al., 2018 and 2021): one number for missed, false and loose boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class over all images, best score first; those on ignored regions are left out.

    Attributes:
        scores: (D,) descending.
        found: (D,) bool, whether the detection is matched with an object.
        ious: (D,) IoU with that object; 0 where not found.
        objects: number of true objects, crowds not counted.
    """

    scores: np.ndarray
    found: np.ndarray
    ious: np.ndarray
    objects: int

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall (D,) each when the first 1, 2, ..., D detections are taken; not interpolated."""
        hits = np.cumsum(self.found)
        return hits / np.maximum(np.arange(1, len(hits) + 1), 1), hits / max(self.objects, 1)

    def best_f1(self) -> dict[str, float]:
        """F1 = 2PR / (P + R) at its best score, with that score, precision and recall; all 0 without detections."""
        precision, recall = self.precision_recall()
        last = _ends_of_ties(self.scores)  # a threshold takes all detections of one score or none
        if self.objects == 0 or not len(last):
            return {"score": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
        f1 = 2 * precision[last] * recall[last] / np.maximum(precision[last] + recall[last], 1e-12)
        best = int(last[f1.argmax()])
        return {
            "score": float(self.scores[best]),
            "precision": float(precision[best]),
            "recall": float(recall[best]),
            "f1": float(f1.max()),
        }


def _ends_of_ties(scores: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, int)


def match_classes(
    truths: Sequence[dict[str, Any]],
    detections: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    *,
    threshold: float = 0.5,
    max_detections: int = 100,
) -> dict[int, ClassMatches]:
    """Match detections with objects as COCO does: by descending score, each to its best free object.

    Args:
        truths: COCO annotations with `image_id`, `category_id`, `bbox` xywh and `iscrowd`.
        detections: COCO results with the same and `score`.
        category_ids: the classes to report.
        threshold: least IoU of a match; for a crowd, least share of the detection inside it.
        max_detections: best detections kept for each image and class.
    """
    truth_of, detected = _grouped(truths), _grouped(detections)
    parts: dict[int, list[tuple[np.ndarray, ...]]] = defaultdict(list)
    objects = dict.fromkeys(category_ids, 0)
    for (_, category), group in truth_of.items():
        if category in objects:
            objects[category] += sum(not truth["iscrowd"] for truth in group)
    for (image, category), group in detected.items():
        if category in objects:
            parts[category].append(_match_image(truth_of.get((image, category), []), group, threshold, max_detections))
    matches = {}
    for category in category_ids:
        empty = (np.zeros(0), np.zeros(0, bool), np.zeros(0))
        scores, found, ious = (np.concatenate(column) for column in zip(empty, *parts[category]))
        order = np.argsort(-scores, kind="stable")
        matches[category] = ClassMatches(scores[order], found[order], ious[order], objects[category])
    return matches


def _grouped(annotations: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for annotation in annotations:
        groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    return groups


def _match_image(
    truths: list[dict], detections: list[dict], threshold: float, max_detections: int
) -> tuple[np.ndarray, ...]:
    """(scores, found, ious) of the counted detections of one image and class."""
    order = np.argsort([-d["score"] for d in detections], kind="stable")[:max_detections]
    scores = np.array([detections[i]["score"] for i in order])
    if not truths:
        return scores, np.zeros(len(scores), bool), np.zeros(len(scores))
    crowd = np.array([bool(truth["iscrowd"]) for truth in truths])
    overlap = coco_mask.iou(
        np.array([detections[i]["bbox"] for i in order], np.float64),
        np.array([truth["bbox"] for truth in truths], np.float64),
        crowd.astype(np.uint8),
    )
    free, found, counted = ~crowd, np.zeros(len(scores), bool), np.ones(len(scores), bool)
    ious = np.zeros(len(scores))
    for row, overlaps in enumerate(overlap):
        open_overlaps = np.where(free, overlaps, -1.0)
        # among equal overlaps COCO takes the last object
        best = len(truths) - 1 - int(open_overlaps[::-1].argmax())
        if open_overlaps[best] >= threshold:
            found[row], ious[row], free[best] = True, open_overlaps[best], False
        elif crowd.any() and overlaps[crowd].max() >= threshold:
            counted[row] = False
    return scores[counted], found[counted], ious[counted]


BACKGROUND, MISSED = "background", "missed"


@dataclass(frozen=True)
class Confusion:
    """Counts of objects and detections at IoU 0.5.

    Attributes:
        classes: C names, in ascending order of category ids.
        counts: (C + 1, C + 1) int. [i, j] objects of class i were found as class j; [i, C] objects of class i were
            missed; [C, j] detections of class j have no object of their own, false positives and duplicates; [C, C] is
            0.
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
    score_thresholds: Mapping[int, float],
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
        score_thresholds: by category id, the lowest score of a detection that counts; a class without an entry has
            none.
        threshold: least IoU; for a crowd, least share of the detection inside it.
        max_detections: best detections kept for each image and class.
    """
    label_of = {category: label for label, category in enumerate(names)}
    truths = [truth for truth in truths if truth["category_id"] in label_of]
    detections = [d for d in detections if d["score"] >= score_thresholds.get(d["category_id"], np.inf)]
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


def _best_of_each_class(rows: list[int], labels: np.ndarray, max_detections: int) -> np.ndarray:
    """The first `max_detections` of each label among the rows of one image, best score first."""
    chosen = np.array(rows, int)
    if len(rows) <= max_detections:
        return chosen
    same = labels[chosen][:, None] == labels[chosen]
    return chosen[np.tril(same).sum(1) <= max_detections]


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


@dataclass(frozen=True)
class OptimalLRP:
    """The LRP error at the score that makes it least, 0 best and 1 worst; -1 for a class without objects.

    Attributes:
        error: oLRP.
        localization: mean 1 - IoU of the found objects there.
        false_positives: 1 - precision there.
        false_negatives: 1 - recall there.
        score: the optimal threshold.
    """

    error: float
    localization: float
    false_positives: float
    false_negatives: float
    score: float


def optimal_lrp(matches: ClassMatches, threshold: float = 0.5) -> OptimalLRP:
    """oLRP of one class: min over scores of (sum_TP (1 - IoU) / (1 - threshold) + FP + FN) / (TP + FP + FN).

    Args:
        matches: made at the same `threshold`.
        threshold: IoU from which an object counts as found.

    Raises:
        ValueError: threshold is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"LRP needs an IoU threshold in [0, 1), not {threshold}")
    if matches.objects == 0:
        return OptimalLRP(-1.0, -1.0, -1.0, -1.0, -1.0)
    hits = np.cumsum(matches.found)
    if not len(hits) or not hits[-1]:
        return OptimalLRP(1.0, 1.0, 1.0, 1.0, 1.0)
    false = np.arange(1, len(hits) + 1) - hits
    missed = matches.objects - hits
    loose = np.cumsum(np.where(matches.found, 1 - matches.ious, 0.0))
    errors = (loose / (1 - threshold) + false + missed) / (hits + false + missed)
    # a threshold takes all detections of one score or none
    last = np.flatnonzero(np.append(matches.scores[1:] != matches.scores[:-1], True))
    best = int(last[errors[last].argmin()])
    found = max(int(hits[best]), 1)
    return OptimalLRP(
        float(errors[best]),
        float(loose[best] / found) if hits[best] else 1.0,
        float(false[best] / (best + 1)),
        float(missed[best] / matches.objects),
        float(matches.scores[best]),
    )
