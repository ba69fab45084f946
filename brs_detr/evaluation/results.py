"""Detections in COCO's result format: made from a detector's output, and checked before COCO's code reads them.

`{"image_id", "category_id", "bbox" (x, y, w, h), "score"}`, for masks also `"segmentation"`, compressed run lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from brs_detr.ops.rle import RLE, as_text, checked_runs

Result = dict[str, Any]


def detections_to_results(image_id: int, detections: Mapping[str, Any], category_ids: Sequence[int]) -> list[Result]:
    """Convert the detections of one image to COCO results.

    Args:
        image_id: id of the image in the annotation file.
        detections: `boxes` (n, 4) xyxy pixels of the original image, `scores` (n,), `labels` (n,) int 0..C-1, and
            perhaps `masks`, n compressed run lengths of that image.
        category_ids: original category id of each label.

    Raises:
        ValueError: a label has no category id.
    """
    boxes = torch.as_tensor(detections["boxes"]).detach().double().cpu().reshape(-1, 4)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels = torch.as_tensor(detections["labels"]).tolist()
    scores = torch.as_tensor(detections["scores"]).double().tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: labels {min(labels)}..{max(labels)} for {len(category_ids)} category ids. "
            "Check that the model was trained on these classes."
        )
    results: list[Result] = [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for label, box, score in zip(labels, xywh, scores, strict=True)
    ]
    if "masks" in detections:
        for result, rle in zip(results, detections["masks"], strict=True):
            result["segmentation"] = as_text(rle)
    return results


def check_results(
    results: Sequence[Result] | Mapping[str, Any],
    known_images: Iterable[int],
    known_categories: Iterable[int],
    sizes: Mapping[int, tuple[int, int]] | None = None,
) -> tuple[list[Result], int]:
    """Convert COCO results to numbered annotations with areas, for COCO's evaluation code.

    Args:
        results: a list of results, or columns `image_id` (n,), `category_id` (n,), `bbox` (n, 4) and `score` (n,), and
            `segmentation` n run lengths, if `sizes` are given.
        known_images: ids of the annotation file.
        known_categories: ids of the annotation file.
        sizes: (h, w) by image id, to keep the masks and check that they fit; None drops them.

    Returns:
        the annotations, and the number of results that were dropped because a value was not finite.

    Raises:
        ValueError: an image or category id is not in the annotation file, or a mask is not that of its image.
    """
    columns = results if isinstance(results, Mapping) else _columns(results)
    masks = None if sizes is None else _masks(results, columns)
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
    if masks is not None:
        assert sizes is not None
        kept = (rle for rle, use in zip(masks, finite.tolist(), strict=True) if use)
        for annotation, rle in zip(annotations, kept, strict=True):
            annotation["segmentation"] = _check_mask(rle, sizes[annotation["image_id"]], annotation["image_id"])
    return annotations, int((~finite).sum())


def _masks(results: Sequence[Result] | Mapping[str, Any], columns: Mapping[str, Any]) -> Sequence[Any]:
    """Return the segmentation of every result."""
    try:
        if isinstance(results, Mapping):
            listed: Sequence[Any] = columns["segmentation"]
            return listed
        return [result["segmentation"] for result in results]
    except KeyError:
        raise ValueError("results: a detection has no `segmentation`, so masks cannot be evaluated.") from None


def _check_mask(rle: Any, size: tuple[int, int], image: int) -> RLE:
    """Return run lengths of a detection, checked: pycocotools ends the process on damaged ones."""
    stated = rle.get("size") if isinstance(rle, dict) else None
    if stated is None or tuple(stated) != tuple(size) or checked_runs(rle.get("counts"), *size) is None:
        raise ValueError(
            f"results: a mask of image {image} is not run lengths of {size[1]}x{size[0]} pixels (its size: {stated}). "
            "Detections are reported in the size of the annotation file."
        )
    return as_text(rle)


def finite_results(results: Iterable[Result]) -> list[Result]:
    """Select the results without NaN or infinity, which are neither evaluated nor valid in a json."""
    return [result for result in results if all(map(math.isfinite, (*result["bbox"], result["score"])))]


def _ids(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Convert ids to (n,) integers: unless it is an integer array already, of any size, and quoted ones too."""
    array = np.asarray(values)
    return array if array.dtype.kind in "iu" else np.array([_as_int(value) for value in values], object)


def _as_int(value: Any) -> int | None:
    """Return an id as int, which some tools quote or write as 3.0; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if is_number and value == value // 1 else None


def _columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    return {key: [result[key] for result in results] for key in ("image_id", "category_id", "bbox", "score")}
