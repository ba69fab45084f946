"""Compute COCO's average precision and recall of boxes and masks with COCO's own code.

pycocotools is the reference; `faster-coco-eval`'s compiled version of the same algorithm runs instead (the numbers
agree to rounding, see the tests), or pycocotools itself where that package cannot be installed.

Detections are in COCO's result format, see `results.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from brs_detr.evaluation.federated import countable, frequency_means, incomplete_pairs
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.matching import ClassMatches, confusion_matrix, match_classes, optimal_lrp
from brs_detr.evaluation.reliability import FOLDS, fold_of_images
from brs_detr.evaluation.results import Result, check_results
from brs_detr.evaluation.summary import MASK, Summary

LRP_NAMES = ("oLRP", "oLRPloc", "oLRPfp", "oLRPfn")
DESCRIPTION = ("name", "category_id", "images", "objects")  # entries of a class's row that are no measures
SIZES = ("", "s", "m", "l")  # COCO's area ranges: all, under 32^2, under 96^2, above


def evaluate_coco(
    truth: GroundTruth,
    results: Sequence[Result] | Mapping[str, Any],
    *,
    image_ids: Sequence[int] | None = None,
    max_detections: Sequence[int] = (1, 10, 100),
    extended: bool = True,
    masks: bool = False,
    score_thresholds: Sequence[float] = (),
    backend: str = "auto",
) -> Summary:
    """Evaluate detections against ground truth as COCO does, and as LVIS does where it has its lists of categories.

    Args:
        truth: the ground truth, with masks if they are to be evaluated.
        results: COCO results with original category ids: a list of dicts, or columns `image_id`, `category_id`,
            `bbox` (n, 4) xywh, `score` and, for masks, `segmentation`.
        image_ids: images to evaluate; by default all of the ground truth.
        max_detections: maximum numbers of detections per image and class; AP uses the largest, AR is computed for each.
        extended: also match at IoU 0.5 for precision, recall and F1 at the best score, oLRP, the correlation of scores
            and IoUs, and the confusion matrix.
        masks: also evaluate masks; their figures begin with `mask_`.
        score_thresholds: also evaluate the detections above each of these scores. Since a detection suppresses only
            those of lower score, this equals a detector with that threshold before its NMS (RS Loss, Table S11).
        backend: `auto`, `pycocotools` or `faster`.

    Raises:
        ValueError: the results name unknown images or categories, or, for `masks`, they or the ground truth have none.
    """
    if masks and not truth.masks:
        raise ValueError("the ground truth was read without masks. Open the dataset with masks=True.")
    detections, num_invalid = check_results(results, truth.image_ids, truth.names, truth.sizes if masks else None)
    chosen = sorted(set(truth.image_ids if image_ids is None else image_ids))
    if unknown := set(chosen) - set(truth.image_ids):
        raise ValueError(f"image_ids: {len(unknown)} images are not in the annotations, such as {min(unknown)}")
    max_dets = sorted(int(number) for number in max_detections)
    selected = set(chosen)
    objects = [a for a in truth.dataset["annotations"] if a["image_id"] in selected]
    detections = [d for d in detections if d["image_id"] in selected]
    if truth.federated:
        detections = countable(truth, detections, max_dets[-1])
    measure = partial(_measure_all, truth, objects, image_ids=chosen, max_dets=max_dets, masks=masks, backend=backend)
    stats, per_class, curves = measure(detections, extended=extended)
    confusion = None
    if extended and not truth.federated:  # what an object of an unknown class was taken for is unknown too
        best = {row["category_id"]: row["score"] for row in per_class if row["f1"] > 0}
        confusion = confusion_matrix(objects, detections, truth.names, best, max_detections=max_dets[-1])
    study = []
    for threshold in score_thresholds:
        kept = [d for d in detections if d["score"] > threshold]
        row = {"score": threshold, "detections": len(kept) / max(len(chosen), 1)}
        study.append(row | measure(kept, extended=False)[0])
    notes = _notes(truth, chosen, max_dets[-1], num_invalid, len(detections))
    return Summary(stats, per_class, notes, curves, len(chosen), 0, len(detections), confusion, study)


def match_folds(
    truth: GroundTruth,
    results: Sequence[Result],
    category_ids: Sequence[int],
    image_ids: Sequence[int],
    max_detections: int,
) -> list[list[ClassMatches]]:
    """Match the boxes of detections at IoU 0.5, for each fold of the images and each class of `category_ids`.

    Args:
        truth: the ground truth.
        results: COCO results with original category ids.
        category_ids: the classes, in the order of the result.
        image_ids: the images that count.
        max_detections: maximum number of detections per image and class, the best ones.
    """
    detections, _ = check_results(results, truth.image_ids, truth.names)
    if truth.federated:
        detections = countable(truth, detections, max_detections)
    folds = fold_of_images(image_ids)
    sides: list[list[list[dict]]] = []
    for rows in (truth.dataset["annotations"], detections):
        parts: list[list[dict]] = [[] for _ in range(FOLDS)]
        for row in rows:
            if row["image_id"] in folds:
                parts[folds[row["image_id"]]].append(row)
        sides.append(parts)
    options: dict[str, Any] = {"max_detections": max_detections, "incomplete": incomplete_pairs(truth)}
    matched = [match_classes(own, found, category_ids, **options) for own, found in zip(*sides, strict=True)]
    return [[fold[category] for category in category_ids] for fold in matched]


Figures = tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]  # overall, of each class, curves


def _measure_all(
    truth: GroundTruth, objects: list[dict], detections: list[dict], *, masks: bool, **options: Any
) -> Figures:
    """Compute the figures of boxes and, if asked for, those of masks, whose names then begin with `mask_`."""
    stats, per_class, curves = _measure(truth, objects, detections, "bbox", **options)
    if masks:
        of_masks = [{**d, "area": float(coco_mask.area(d["segmentation"]))} for d in detections]
        mask_stats, mask_rows, _ = _measure(truth, objects, of_masks, "segm", **options)
        stats |= {MASK + name: value for name, value in mask_stats.items()}
        for row, mask_row in zip(per_class, mask_rows, strict=True):
            row |= {MASK + name: value for name, value in mask_row.items() if name not in DESCRIPTION}
    return stats, per_class, curves


def _measure(
    truth: GroundTruth,
    objects: list[dict],
    detections: list[dict],
    iou_type: str,
    *,
    image_ids: list[int],
    max_dets: list[int],
    extended: bool,
    backend: str,
) -> Figures:
    """Compute the figures of boxes ("bbox") or masks ("segm")."""
    precision, recall = _accumulate(truth, detections, image_ids, max_dets, iou_type, backend)
    matches = {}
    if extended:
        matches = match_classes(
            objects,
            detections,
            list(truth.names),
            max_detections=max_dets[-1],
            masks=iou_type == "segm",
            incomplete=incomplete_pairs(truth),
        )
    stats = _stats(precision, recall, max_dets)
    per_class = _per_class(truth, objects, precision, recall, matches)
    if truth.frequency:
        stats |= frequency_means(truth, per_class)
    if extended:
        stats["AP90"] = _mean(precision[8, ..., 0, -1])
        stats |= {name: _mean(np.array([row[name] for row in per_class])) for name in LRP_NAMES}
        correlations = [row["correlation"] for row in per_class if row["correlation"] is not None]
        if correlations:
            stats["correlation"] = float(np.mean(correlations))
    return stats, per_class, _curves(truth.names, precision)


def fast_backend_installed() -> bool:
    """Return True if `faster-coco-eval` can be imported."""
    return importlib.util.find_spec("faster_coco_eval") is not None


def _accumulate(
    truth: GroundTruth, detections: list[dict], image_ids: list[int], max_dets: list[int], iou_type: str, backend: str
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
            side.dataset = {
                "images": [
                    {"id": images[image], **_size(truth, image, iou_type), **_lists(truth, image, classes)}
                    for image in images
                ],
                "categories": [{"id": number, "frequency": "f"} for number in classes.values()],
                "annotations": copies,
            }
            side.createIndex()
            sides.append(side)
        fast = Evaluation.__module__.startswith("faster")
        evaluation = Evaluation(*sides, iou_type, **({"lvis_style": truth.federated} if fast else {}))
        evaluation.params.imgIds = list(images.values())
        evaluation.params.catIds = list(classes.values())
        evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        if truth.federated and not fast:
            _ignore_unmatched(evaluation, incomplete_pairs(truth), images, classes)
        evaluation.accumulate()
    # COCO's 10 IoU thresholds 0.5:0.05:0.95, 101 recalls 0:0.01:1, and 4 area ranges
    shape = (10, 101, len(truth.names), 4, len(max_dets))
    precision = np.asarray(evaluation.eval["precision"], np.float64).reshape(shape)
    return precision, np.asarray(evaluation.eval["recall"], np.float64).reshape(shape[0], *shape[2:])


def _size(truth: GroundTruth, image: int, iou_type: str) -> dict[str, int]:
    """Return the entries `height` and `width` of an image, which COCO's code needs for masks alone."""
    return dict(zip(("height", "width"), truth.sizes[image], strict=True)) if iou_type == "segm" else {}


def _lists(truth: GroundTruth, image: int, classes: Mapping[int, int]) -> dict[str, list[int]]:
    """Return LVIS's lists of an image with the classes' numbers, for faster-coco-eval."""
    lists = {"neg_category_ids": truth.negative, "not_exhaustive_category_ids": truth.not_exhaustive}
    return {name: [classes[c] for c in of.get(image, ()) if c in classes] for name, of in lists.items()}


def _ignore_unmatched(
    evaluation: Any, incomplete: set[tuple[int, int]], images: Mapping[int, int], classes: Mapping[int, int]
) -> None:
    """Let pycocotools ignore detections without an object where not all objects are annotated."""
    pairs = {(images[image], classes[c]) for image, c in incomplete if image in images and c in classes}
    for image in evaluation.evalImgs:
        if image is not None and (image["image_id"], image["category_id"]) in pairs:
            image["dtIgnore"] = np.logical_or(image["dtIgnore"], image["dtMatches"] == 0)


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
            row |= match.best_f1() if match.num_objects else undefined
            parts = (error.error, error.localization, error.false_positives, error.false_negatives)
            row |= dict(zip(LRP_NAMES, parts, strict=True))
            row["AP90"] = _mean(precision[8, :, k, 0, -1])
            row["correlation"] = match.rank_correlation()
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
    notes = []
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
