"""Compute COCO's average precision and recall of boxes with COCO's own code.

pycocotools is the reference; `faster-coco-eval`'s compiled version of the same algorithm runs instead (the numbers
agree to rounding, see the tests), or pycocotools itself where that package cannot be installed.

Detections are in COCO's result format: `{"image_id", "category_id", "bbox" (x, y, w, h), "score"}`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brs_detr.evaluation.ground_truth import GroundTruth, parse_id
from brs_detr.evaluation.matching import ClassMatches, confusion_matrix, match_classes, optimal_lrp
from brs_detr.evaluation.summary import Summary

__all__ = ["GroundTruth", "Summary", "detections_to_results", "evaluate_coco"]

LRP_NAMES = ("oLRP", "oLRPloc", "oLRPfp", "oLRPfn")
SIZES = ("", "s", "m", "l")  # COCO's area ranges: all, under 32^2, under 96^2, above


def evaluate_coco(
    annotations: str | Path | dict[str, Any] | GroundTruth,
    results: Sequence[Result] | Mapping[str, np.ndarray],
    *,
    image_ids: Sequence[int] | None = None,
    max_detections: Sequence[int] = (1, 10, 100),
    extended: bool = True,
    backend: str = "auto",
) -> Summary:
    """Evaluate detections against annotations as COCO does.

    Args:
        annotations: a COCO json, its content, or a checked `GroundTruth` (saves reading it for every evaluation).
        results: COCO results with original category ids: a list of dicts, or columns `image_id`, `category_id`,
            `bbox` (n, 4) xywh and `score`.
        image_ids: images to evaluate; by default all of the annotation file.
        max_detections: maximum numbers of detections per image and class; AP uses the largest, AR is computed for each.
        extended: also match at IoU 0.5 for precision, recall and F1 at the best score, oLRP and the confusion matrix.
        backend: `auto`, `pycocotools` or `faster`.

    Raises:
        FileNotFoundError: there is no such annotation file.
        ValueError: the annotations are not in COCO's format, or the results name unknown images or categories.
    """
    truth = GroundTruth.read(annotations)
    detections, num_invalid = check_results(results, truth.image_ids, truth.names)
    chosen = sorted(set(truth.image_ids if image_ids is None else image_ids))
    if unknown := set(chosen) - set(truth.image_ids):
        raise ValueError(f"image_ids: {len(unknown)} images are not in the annotations, such as {min(unknown)}")
    max_dets = sorted(int(number) for number in max_detections)
    precision, recall = _accumulate(truth, detections, chosen, max_dets, backend)
    selected = set(chosen)
    boxes = [a for a in truth.dataset["annotations"] if a["image_id"] in selected]
    detections = [d for d in detections if d["image_id"] in selected]
    matches = match_classes(boxes, detections, list(truth.names), max_detections=max_dets[-1]) if extended else {}
    stats = _stats(precision, recall, max_dets)
    per_class = _per_class(truth, boxes, precision, recall, matches)
    confusion = None
    if extended:
        stats |= {name: _mean(np.array([row[name] for row in per_class])) for name in LRP_NAMES}
        score_thresholds = {row["category_id"]: row["score"] for row in per_class if row["f1"] > 0}
        confusion = confusion_matrix(boxes, detections, truth.names, score_thresholds, max_detections=max_dets[-1])
    notes = _notes(truth, chosen, max_dets[-1], num_invalid, len(detections))
    curves = _curves(truth.names, precision)
    return Summary(stats, per_class, notes, curves, len(chosen), 0, len(detections), confusion)


def fast_backend_installed() -> bool:
    """Return True if `faster-coco-eval` can be imported."""
    return importlib.util.find_spec("faster_coco_eval") is not None


def _accumulate(
    truth: GroundTruth, detections: list[dict], image_ids: list[int], max_dets: list[int], backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Run COCO's evaluation.

    Returns:
        precision (IoU, recall, class, area, max_dets) and recall (IoU, class, area, max_dets); -1 where undefined.
    """
    # Re-index ids: faster-coco-eval stores them as float64 and merges ids above 2^53.
    images = {image: number for number, image in enumerate(image_ids, 1)}
    classes = {category: number for number, category in enumerate(truth.names, 1)}
    if backend not in ("auto", "pycocotools", "faster"):
        raise ValueError(f"backend {backend}: unknown. Use auto, pycocotools or faster.")
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's code prints its progress
        if backend == "faster" or (backend == "auto" and fast_backend_installed()):
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as Evaluation
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval as Evaluation
        sides = []
        for annotations in (truth.dataset["annotations"], detections):
            side = COCO()
            # copies, since the evaluation adds entries of its own to the annotations
            copies = [
                {**row, "image_id": images[row["image_id"]], "category_id": classes[row["category_id"]]}
                for row in annotations
                if row["image_id"] in images
            ]
            lists = {"images": images.values(), "categories": classes.values()}
            side.dataset = {key: [{"id": number} for number in numbers] for key, numbers in lists.items()}
            side.dataset["annotations"] = copies
            side.createIndex()
            sides.append(side)
        evaluation = Evaluation(*sides, "bbox")
        evaluation.params.imgIds = list(images.values())
        evaluation.params.catIds = list(classes.values())
        evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        evaluation.accumulate()
    # COCO's 10 IoU thresholds 0.5:0.05:0.95, 101 recalls 0:0.01:1, and 4 area ranges
    shape = (10, 101, len(truth.names), 4, len(max_dets))
    precision = np.asarray(evaluation.eval["precision"], np.float64).reshape(shape)
    return precision, np.asarray(evaluation.eval["recall"], np.float64).reshape(shape[0], *shape[2:])


def _mean(values: np.ndarray) -> float:
    """Average the entries that are defined; COCO marks others (classes without objects) with -1."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _stats(precision: np.ndarray, recall: np.ndarray, max_dets: list[int]) -> dict[str, float]:
    """Compute COCO's overall figures; IoU index 0 is 0.50, index 5 is 0.75."""
    stats = {"AP": _mean(precision[..., 0, -1])}
    stats |= {"AP50": _mean(precision[0, ..., 0, -1]), "AP75": _mean(precision[5, ..., 0, -1])}
    stats |= {f"AP{size}": _mean(precision[..., area, -1]) for area, size in enumerate(SIZES) if size}
    stats |= {f"AR{number}": _mean(recall[..., 0, column]) for column, number in enumerate(max_dets)}
    return stats | {f"AR{size}": _mean(recall[..., area, -1]) for area, size in enumerate(SIZES) if size}


def _per_class(
    truth: GroundTruth,
    boxes: list[dict],
    precision: np.ndarray,
    recall: np.ndarray,
    matches: dict[int, ClassMatches],
) -> list[dict[str, Any]]:
    """Compute one row of measures per class, in the order of the category ids."""
    objects = Counter(a["category_id"] for a in boxes if not a["iscrowd"])
    images = Counter(category for _, category in {(a["image_id"], a["category_id"]) for a in boxes})
    rows = []
    for k, (category, name) in enumerate(truth.names.items()):
        row: dict[str, Any] = {
            "name": name,
            "category_id": category,
            "images": images[category],
            "objects": objects[category],
        }
        row |= {"AP": _mean(precision[:, :, k, 0, -1]), "AP50": _mean(precision[0, :, k, 0, -1])}
        row["AP75"] = _mean(precision[5, :, k, 0, -1])
        row |= {f"AP{size}": _mean(precision[:, :, k, area, -1]) for area, size in enumerate(SIZES) if size}
        row["AR"] = _mean(recall[:, k, 0, -1])
        if category in matches:
            match = matches[category]
            undefined = {"score": -1.0, "precision": -1.0, "recall": -1.0, "f1": -1.0}
            error = optimal_lrp(match)
            row |= match.best_f1() if match.objects else undefined
            parts = (error.error, error.localization, error.false_positives, error.false_negatives)
            row |= dict(zip(LRP_NAMES, parts, strict=True))
        rows.append(row)
    return rows


def _curves(names: Mapping[int, str], precision: np.ndarray) -> dict[str, list[float]]:
    """Return precision at IoU 0.5 over COCO's 101 recalls of each class with objects; equal names get their id."""
    times = Counter(names.values())
    curves: dict[str, list[float]] = {}
    for k, (category, name) in enumerate(names.items()):
        if precision[0, 0, k, 0, -1] > -1:
            curves[name if times[name] == 1 else f"{name} ({category})"] = precision[0, :, k, 0, -1].tolist()
    return curves


def _notes(truth: GroundTruth, image_ids: list[int], max_dets: int, num_invalid: int, detections: int) -> list[str]:
    """List what a reader of the figures should know."""
    notes = [f"{count:,} x {issue}" for issue, count in sorted(truth.issues.items())]
    max_objects, image = truth.max_objects(image_ids)
    if max_objects > max_dets:
        notes.append(
            f"image {image} has {max_objects} objects of one class but only {max_dets} detection(s) of a class count: "
            "its recall cannot reach 1. Raise max_detections (the last number)."
        )
    if not max_objects:
        notes.append("none of the images has an object that counts: there is nothing to measure")
    if num_invalid:
        notes.append(f"{num_invalid:,} detections with NaN or infinity were left out")
    if not detections:
        notes.append("there are no detections")
    return notes


Result = dict[str, Any]


def detections_to_results(
    image_id: int, detections: Mapping[str, Tensor | np.ndarray], category_ids: Sequence[int]
) -> list[Result]:
    """Convert the detections of one image to COCO results.

    Args:
        image_id: id of the image in the annotation file.
        detections: `boxes` (n, 4) xyxy pixels of the original image, `scores` (n,), `labels` (n,) int 0..C-1.
        category_ids: original category id of each label.

    Raises:
        ValueError: a label has no category id.
    """
    boxes = torch.as_tensor(detections["boxes"]).detach().double().cpu().reshape(-1, 4)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels = torch.as_tensor(detections["labels"]).tolist()
    scores = torch.as_tensor(detections["scores"]).float().tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: labels {min(labels)}..{max(labels)} for {len(category_ids)} category ids. "
            "Check that the model was trained on these classes."
        )
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for label, box, score in zip(labels, xywh, scores, strict=True)
    ]


def check_results(
    results: Sequence[Result] | Mapping[str, np.ndarray], known_images: Iterable[int], known_categories: Iterable[int]
) -> tuple[list[Result], int]:
    """Convert COCO results to numbered annotations with areas, for COCO's evaluation code.

    Args:
        results: a list of results, or columns `image_id` (n,), `category_id` (n,), `bbox` (n, 4) and `score` (n,).
        known_images: ids of the annotation file.
        known_categories: ids of the annotation file.

    Returns:
        the annotations, and the number of results that were dropped because a value was not finite.

    Raises:
        ValueError: an image or category id is not in the annotation file.
    """
    columns = results if isinstance(results, Mapping) else _columns(results)
    images, categories = (_ids(columns[name]) for name in ("image_id", "category_id"))
    boxes = np.asarray(columns["bbox"], np.float64).reshape(-1, 4)
    scores = np.asarray(columns["score"], np.float64)
    for what, ids, known in (("image", images, known_images), ("category", categories, known_categories)):
        unknown = set(ids.tolist()) - set(known)
        if unknown:
            raise ValueError(
                f"results: {len(unknown)} {what} ids are not in the annotations (such as "
                f"{sorted(unknown, key=str)[:3]}). Check that they belong to this annotation file."
            )
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
    rows = zip(images[finite].tolist(), categories[finite].tolist(), boxes[finite].tolist(), scores[finite].tolist())
    # ids from 1: COCO's code treats a match with id 0 as unmatched
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "score": s, "area": b[2] * b[3], "iscrowd": 0}
        for n, (i, c, b, s) in enumerate(rows, 1)
    ]
    return annotations, int((~finite).sum())


def finite_results(results: Iterable[Result]) -> list[Result]:
    """Select the results without NaN or infinity, which are neither evaluated nor valid in a json."""
    return [result for result in results if all(map(math.isfinite, (*result["bbox"], result["score"])))]


def _ids(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Convert ids to (n,) integers: unless it is an integer array already, of any size, and quoted ones too."""
    array = np.asarray(values)
    return array if array.dtype.kind in "iu" else np.array([parse_id(value) for value in values], object)


def _columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    return {key: [result[key] for result in results] for key in ("image_id", "category_id", "bbox", "score")}
