"""Which detection found which object at IoU 0.5, class by class: the raw material of precision, recall and LRP."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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


def _match_image(truths: list[dict], detections: list[dict], threshold: float, limit: int) -> tuple[np.ndarray, ...]:
    """(scores, found, ious) of the counted detections of one image and class."""
    order = np.argsort([-d["score"] for d in detections], kind="stable")[:limit]
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
