"""What an evaluation shows: example pictures with found and true boxes, the run's curves, precision over recall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from brs_detr.data.coco import CocoDetection
from brs_detr.data.pictures import PictureError
from brs_detr.evaluation.curves import draw_curves, draw_precision_recall
from brs_detr.evaluation.matrix import draw_confusion
from brs_detr.evaluation.pictures import contact_sheet, draw_detections
from brs_detr.evaluation.summary import Summary


def write_pictures(
    out: Path, dataset: CocoDetection, results: list[dict[str, Any]], count: int, thresholds: Mapping[str, float]
) -> list[Path]:
    """Draw evenly spaced pictures of a dataset with what was found and what is true.

    Args:
        out: folder; gets `pictures/IMAGE_ID.png` and one sheet of them all, `pictures.png`.
        dataset: opened with `train=False`.
        results: detections in COCO's format.
        count: number of pictures; 0 for none.
        thresholds: by class name the lowest score that is drawn; nothing of a class without one.

    Returns:
        The sheet's path and those of the pictures; empty for none.
    """
    step = max(1, len(dataset) // count) if count else 0
    chosen = range(0, len(dataset), step)[:count] if step else range(0)
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    least = {category: thresholds.get(name, math.inf) for category, name in zip(dataset.category_ids, dataset.classes)}
    results = [result for result in results if result["score"] >= least[result["category_id"]]]
    paths, drawn = [], []
    for index in chosen:
        try:
            image, target = dataset.load(index)
        except PictureError:  # the evaluation has counted it
            continue
        found = [result for result in results if result["image_id"] == target["image_id"]]
        boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
        detections = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "scores": torch.tensor([result["score"] for result in found]),
            "labels": torch.tensor([labels[result["category_id"]] for result in found], dtype=torch.long),
        }
        title = dataset.file_name(index)
        drawn.append(draw_detections(image, detections, target, dataset.classes, threshold=0.0, title=title))
        paths.append(out / "pictures" / f"{target['image_id']}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        drawn[-1].save(paths[-1])
    if drawn:
        paths.insert(0, out / "pictures.png")
        contact_sheet(drawn).save(paths[0])
    return paths


def write_curves(out: Path, summary: Summary, metrics: Path) -> list[Path]:
    """Draw the confusion matrix, precision over recall and, where metrics.jsonl is at hand, the training curves."""
    paths = []
    if summary.confusion is not None:
        paths.append(out / "confusion.png")
        draw_confusion(summary.confusion, paths[-1])
    if summary.curves:
        paths.append(out / "precision_recall.png")
        draw_precision_recall(summary.curves, paths[-1])
    if metrics.is_file():
        paths.append(out / "curves.png")
        draw_curves(metrics, paths[-1])
    return paths
