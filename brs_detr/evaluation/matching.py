"""Match detections with ground truth at IoU 0.5, for precision, recall, F1, the confusion matrix and LRP.

In the confusion matrix (at the scores where each class has its best F1) each class is first matched with its own
objects, as COCO does at IoU 0.5; only the rest can be confused. So the diagonal divided by the sum of its row is the
recall of the class table, and divided by the sum of its column the precision.

LRP is the Localization Recall Precision error (Oksuz et al., 2018 and 2021): one number for false negatives, false
positives and inaccurate boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class over all images, best score first, without those on ignored regions.

    Attributes:
        scores: (D,) descending.
        matched: (D,) bool, True if the detection is matched with an object (a true positive).
        ious: (D,) IoU with that object; 0 if not matched.
        num_objects: number of ground-truth objects, without crowds.
    """

    scores: np.ndarray
    matched: np.ndarray
    ious: np.ndarray
    num_objects: int

    def rank_correlation(self) -> float | None:
        """Correlate the scores and the IoUs of the true positives by rank (Spearman).

        It is Pearson's coefficient of the two rankings, of classification and of localization, as in Oksuz et al., "A
        Ranking-based, Balanced Loss Function" (aLRP Loss), section 5; equal values share their mean rank.

        Returns:
            the coefficient in [-1, 1]; None with fewer than two true positives, or if all scores or IoUs are equal.
        """
        scores, ious = (_ranks(values[self.matched]) for values in (self.scores, self.ious))
        scores, ious = scores - scores.mean() if len(scores) else scores, ious - ious.mean() if len(ious) else ious
        spread = np.sqrt((scores**2).sum() * (ious**2).sum())
        return float((scores * ious).sum() / spread) if spread > 0 else None

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute precision and recall (D,) of the first 1, 2, ..., D detections, not interpolated."""
        hits = np.cumsum(self.matched)
        return hits / np.maximum(np.arange(1, len(hits) + 1), 1), hits / max(self.num_objects, 1)

    def best_f1(self) -> dict[str, float]:
        """Compute the best F1 = 2PR / (P + R) and its score, precision and recall; all 0 without detections."""
        precision, recall = self.precision_recall()
        last = _ends_of_ties(self.scores)  # a threshold cannot separate detections of equal score
        if self.num_objects == 0 or not len(last):
            return {"score": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
        f1 = 2 * precision[last] * recall[last] / np.maximum(precision[last] + recall[last], 1e-12)
        best = int(last[f1.argmax()])
        return {
            "score": float(self.scores[best]),
            "precision": float(precision[best]),
            "recall": float(recall[best]),
            "f1": float(f1.max()),
        }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank (n,) of each value from 1, smallest first; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _ends_of_ties(scores: np.ndarray) -> np.ndarray:
    """Return the index of the last detection of each distinct score."""
    return np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, int)


def match_classes(
    truths: Sequence[dict[str, Any]],
    detections: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    *,
    threshold: float = 0.5,
    max_detections: int = 100,
    masks: bool = False,
    incomplete: Collection[tuple[int, int]] = (),
) -> dict[int, ClassMatches]:
    """Match detections with objects as COCO does: by descending score, each to its best free object.

    Args:
        truths: COCO annotations with `image_id`, `category_id`, `bbox` xywh and `iscrowd`.
        detections: COCO results with the same and `score`.
        category_ids: the classes to report.
        threshold: minimum IoU of a match; for a crowd, minimum fraction of the detection inside it.
        max_detections: maximum number of detections per image and class, the best ones.
        masks: match by the IoU of their `segmentation`, checked run lengths, instead of that of the boxes.
        incomplete: (image id, category id) where not all objects are annotated: detections without one do not count.
    """
    truth_of, detected = _grouped(truths), _grouped(detections)
    parts: dict[int, list[tuple[np.ndarray, ...]]] = defaultdict(list)
    objects = dict.fromkeys(category_ids, 0)
    for (_, category), group in truth_of.items():
        if category in objects:
            objects[category] += sum(not truth["iscrowd"] for truth in group)
    for (image, category), group in detected.items():
        if category in objects:
            objects_here = truth_of.get((image, category), [])
            columns = _match_image(objects_here, group, threshold, max_detections, masks)
            if (image, category) in incomplete:
                columns = tuple(column[columns[1]] for column in columns)
            parts[category].append(columns)
    matches = {}
    for category in category_ids:
        empty = (np.zeros(0), np.zeros(0, bool), np.zeros(0))
        scores, matched, ious = (np.concatenate(column) for column in zip(empty, *parts[category]))
        order = np.argsort(-scores, kind="stable")  # as in COCO's code: precision depends on the order of ties
        matches[category] = ClassMatches(scores[order], matched[order], ious[order], objects[category])
    return matches


def _grouped(annotations: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Group annotations by (image id, category id)."""
    groups = defaultdict(list)
    for annotation in annotations:
        groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    return groups


def _match_image(
    truths: list[dict], detections: list[dict], threshold: float, max_detections: int, masks: bool
) -> tuple[np.ndarray, ...]:
    """Match one image and class; return (scores, matched, ious) of the detections that count."""
    order = np.argsort([-d["score"] for d in detections], kind="stable")[:max_detections]
    scores = np.array([detections[i]["score"] for i in order])
    if not truths:
        return scores, np.zeros(len(scores), bool), np.zeros(len(scores))
    crowd = np.array([bool(truth["iscrowd"]) for truth in truths])
    shapes = ([detections[i] for i in order], truths)
    sides: list[Any] = [
        [row["segmentation"] for row in rows] if masks else np.array([row["bbox"] for row in rows], np.float64)
        for rows in shapes
    ]
    overlap = coco_mask.iou(*sides, crowd.astype(np.uint8))
    free, matched, counted = ~crowd, np.zeros(len(scores), bool), np.ones(len(scores), bool)
    ious = np.zeros(len(scores))
    for row, overlaps in enumerate(overlap):
        open_overlaps = np.where(free, overlaps, -1.0)
        # among equal overlaps COCO takes the last object
        best = len(truths) - 1 - int(open_overlaps[::-1].argmax())
        if open_overlaps[best] >= threshold:
            matched[row], ious[row], free[best] = True, open_overlaps[best], False
        elif crowd.any() and overlaps[crowd].max() >= threshold:
            counted[row] = False  # on a crowd: neither a true nor a false positive
    return scores[counted], matched[counted], ious[counted]


BACKGROUND, MISSED = "background", "missed"


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix at IoU 0.5.

    Attributes:
        classes: C names, in ascending order of category ids.
        counts: (C + 1, C + 1) int. [i, j]: objects of class i detected as class j; [i, C]: objects of class i that
            were missed; [C, j]: detections of class j without an object (false positives and duplicates); [C, C]: 0.
    """

    classes: list[str]
    counts: np.ndarray

    def most_frequent(self, number: int) -> list[str]:
        """Format the `number` largest confusions, such as `ring found as disc: 7 of 82`, without those of 0."""
        confused = self.counts[:-1, :-1].copy()
        np.fill_diagonal(confused, 0)
        order = np.argsort(-confused, axis=None, kind="stable")[:number]
        pairs = [divmod(int(index), len(confused)) for index in order]
        return [
            f"{self.classes[true]} found as {self.classes[predicted]}: {confused[true, predicted]:,} of "
            f"{self.counts[true].sum():,}"
            for true, predicted in pairs
            if confused[true, predicted]
        ]

    def table(self) -> list[list[Any]]:
        """Return a header and one row per true class, with names, for a csv file."""
        content = self.as_dict()
        rows = zip(content["true"], content["counts"], strict=True)
        return [["true / found", *content["found"]], *([name, *row] for name, row in rows)]

    def as_dict(self) -> dict[str, Any]:
        """Return the names of rows (`true`) and columns (`found`), and the `counts`, for a json."""
        names = {"true": [*self.classes, BACKGROUND], "found": [*self.classes, MISSED]}
        return {**names, "counts": self.counts.tolist()}


def confusion_matrix(
    truths: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    score_thresholds: Mapping[int, float],
    *,
    threshold: float = 0.5,
    max_detections: int = 100,
) -> Confusion:
    """Count the predicted class of each object.

    In every image, the best score first: (1) a detection is matched with the free object of its own class with the
    largest overlap, at least `threshold`, the last one among equals, as in COCO's evaluation; (2) of the others, a
    detection mostly inside a crowd of its class is ignored; (3) each of the rest is matched with the free object of any
    class with the largest overlap, at least `threshold`. The remaining objects are missed, the remaining detections
    are false positives on background.

    Args:
        truths: COCO annotations with `image_id`, `category_id`, `bbox` xywh and `iscrowd`; crowds are not counted.
        detections: COCO results with `image_id`, `category_id`, `bbox` and `score`.
        names: name by category id, in the order of rows and columns.
        score_thresholds: minimum score of a detection by category id; detections of a class without an entry are not
            counted.
        threshold: minimum IoU; for a crowd, minimum fraction of the detection inside it.
        max_detections: maximum number of detections per image and class, the best ones.
    """
    label_of = {category: label for label, category in enumerate(names)}
    truths = [truth for truth in truths if truth["category_id"] in label_of]
    detections = [d for d in detections if d["score"] >= score_thresholds.get(d["category_id"], np.inf)]
    detections.sort(key=lambda detection: -detection["score"])
    labels = [np.array([label_of[row["category_id"]] for row in rows], int) for rows in (truths, detections)]
    counts = np.zeros((len(names) + 1, len(names) + 1), int)
    groups = _by_image(detections)
    for image, objects in _by_image(truths).items():
        kept = _best_of_each_class(groups.pop(image, []), labels[1], max_detections)
        _count_image(
            counts,
            (labels[0][objects], labels[1][kept]),
            np.array([bool(truths[row]["iscrowd"]) for row in objects]),
            ([truths[row]["bbox"] for row in objects], [detections[row]["bbox"] for row in kept]),
            threshold,
        )
    for rows in groups.values():  # images without objects
        np.add.at(counts[-1], labels[1][_best_of_each_class(rows, labels[1], max_detections)], 1)
    return Confusion(list(names.values()), counts)


def _by_image(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Group row numbers by image id, in order."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["image_id"], []).append(number)
    return groups


def _best_of_each_class(rows: list[int], labels: np.ndarray, max_detections: int) -> np.ndarray:
    """Select the first `max_detections` of each label among the rows of one image, best score first."""
    chosen = np.array(rows, int)
    if len(rows) <= max_detections:
        return chosen
    same = labels[chosen][:, None] == labels[chosen]
    return chosen[np.tril(same).sum(1) <= max_detections]


def _count_image(
    counts: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray],
    crowd: np.ndarray,
    boxes: tuple[list, list],
    threshold: float,
) -> None:
    """Add an image with objects to `counts`; `labels` and `boxes` are of (objects, detections), best score first."""
    true, predicted = labels
    free, match = ~crowd, np.full(len(predicted), -1)
    counted = np.ones(len(predicted), bool)
    if len(predicted):
        overlap = coco_mask.iou(np.array(boxes[1], float), np.array(boxes[0], float), crowd.astype(np.uint8))
        near, same_class = overlap >= threshold, predicted[:, None] == true
        # the own class first, so that a confusion never takes an object from a correct detection of lower score
        _match_greedily(match, free, overlap, near & same_class)
        counted = (match >= 0) | ~(near & same_class & crowd).any(1)
        _match_greedily(match, free, overlap, near & counted[:, None] & (match < 0)[:, None])
    hit = match >= 0
    # add.at, since += counts a repeated pair of indices once
    np.add.at(counts, (true[match[hit]], predicted[hit]), 1)
    np.add.at(counts[-1], predicted[counted & ~hit], 1)
    np.add.at(counts[:, -1], true[free], 1)


def _match_greedily(match: np.ndarray, free: np.ndarray, overlap: np.ndarray, allowed: np.ndarray) -> None:
    """Match each detection in turn with the allowed free object of largest overlap; updates `match` and `free`."""
    for row in np.flatnonzero((allowed & free).any(1)):
        columns = np.flatnonzero(allowed[row] & free)[::-1]  # reversed: the last among equals
        if len(columns):
            match[row] = columns[overlap[row, columns].argmax()]
            free[match[row]] = False


@dataclass(frozen=True)
class OptimalLRP:
    """The minimum LRP error over score thresholds, 0 best and 1 worst; -1 for a class without objects.

    Attributes:
        error: oLRP.
        localization: mean 1 - IoU of the true positives at that threshold.
        false_positives: 1 - precision at that threshold.
        false_negatives: 1 - recall at that threshold.
        score: the optimal threshold.
    """

    error: float
    localization: float
    false_positives: float
    false_negatives: float
    score: float


def optimal_lrp(matches: ClassMatches, threshold: float = 0.5) -> OptimalLRP:
    """Compute oLRP of a class: min over scores of (sum_TP (1 - IoU) / (1 - threshold) + FP + FN) / (TP + FP + FN).

    Args:
        matches: computed at the same `threshold`.
        threshold: minimum IoU of a true positive.

    Raises:
        ValueError: threshold is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"LRP needs an IoU threshold in [0, 1), not {threshold}")
    if matches.num_objects == 0:
        return OptimalLRP(-1.0, -1.0, -1.0, -1.0, -1.0)
    hits = np.cumsum(matches.matched)
    if not len(hits) or not hits[-1]:
        return OptimalLRP(1.0, 1.0, 1.0, 1.0, 1.0)
    false = np.arange(1, len(hits) + 1) - hits
    missed = matches.num_objects - hits
    loose = np.cumsum(np.where(matches.matched, 1 - matches.ious, 0.0))
    errors = (loose / (1 - threshold) + false + missed) / (hits + false + missed)
    last = _ends_of_ties(matches.scores)  # a threshold cannot separate detections of equal score
    best = int(last[errors[last].argmin()])
    return OptimalLRP(
        float(errors[best]),
        float(loose[best] / hits[best]) if hits[best] else 1.0,
        float(false[best] / (best + 1)),
        float(missed[best] / matches.num_objects),
        float(matches.scores[best]),
    )
