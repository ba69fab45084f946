"""Detections in COCO's result format: `{"image_id", "category_id", "bbox" (x, y, w, h), "score"}`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brs_detr.evaluation.ground_truth import whole_id

Result = dict[str, Any]


def detections_to_results(
    image_id: int, detections: Mapping[str, Tensor | np.ndarray], category_ids: Sequence[int]
) -> list[Result]:
    """The detections of one image as COCO results.

    Args:
        image_id: as in the annotation file.
        detections: `boxes` (n, 4) xyxy pixels of the original image, `scores` (n,), `labels` (n,) int 0..C-1.
        category_ids: original category id of each label.

    Raises:
        ValueError: a label has no category id.
    """
    boxes = torch.as_tensor(detections["boxes"]).detach().double().cpu().reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels = torch.as_tensor(detections["labels"]).tolist()
    scores = torch.as_tensor(detections["scores"]).float().tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: labels {min(labels)}..{max(labels)} for {len(category_ids)} category ids; "
            "was the model trained on other classes?"
        )
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes, scores, strict=True)
    ]


def check_results(
    results: Sequence[Result] | Mapping[str, np.ndarray], known_images: Iterable[int], known_categories: Iterable[int]
) -> tuple[list[Result], int]:
    """COCO results as numbered annotations with areas, for COCO's evaluation code.

    Args:
        results: a list of results, or columns `image_id` (n,), `category_id` (n,), `bbox` (n, 4) and `score` (n,).
        known_images: ids of the annotation file.
        known_categories: ids of the annotation file.

    Returns:
        The annotations, and how many results were dropped because a number in them was not finite.

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
                f"the results name {len(unknown)} {what} ids that the annotations lack "
                f"(such as {sorted(unknown, key=str)[:3]}); "
                "do they belong to another annotation file?"
            )
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
    rows = zip(images[finite].tolist(), categories[finite].tolist(), boxes[finite].tolist(), scores[finite].tolist())
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "score": s, "area": b[2] * b[3], "iscrowd": 0}
        for n, (i, c, b, s) in enumerate(rows, 1)
    ]
    return annotations, int((~finite).sum())


def finite_results(results: Iterable[Result]) -> list[Result]:
    """The results that the evaluation counts: those without NaN or infinity, which no json can hold either."""
    return [result for result in results if all(map(math.isfinite, (*result["bbox"], result["score"])))]


def _ids(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(n,) whole numbers; of any size, and quoted ones too, where they are not an integer array already."""
    array = np.asarray(values)
    return array if array.dtype.kind in "iu" else np.array([whole_id(value) for value in values], object)


def _columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    return {key: [result[key] for result in results] for key in ("image_id", "category_id", "bbox", "score")}
