"""Files of an evaluation: its figures, images with detections and ground truth, diagrams, and the report of the run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brs_detr.data.coco import CocoDetection
from brs_detr.data.image_io import ImageError
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.storage import write_text, writing
from brs_detr.evaluation.calibration import Calibration
from brs_detr.evaluation.results import finite_results
from brs_detr.evaluation.summary import Summary
from brs_detr.ops.masks import decode_masks
from brs_detr.run.report import write_report
from brs_detr.run.weights import EVALUATION
from brs_detr.viz.boxes import contact_sheet, draw_detections

OPTIONAL = (
    *("confusion.csv", "confusion.png", "precision_recall.csv", "precision_recall.png", "detections.png", "curves.png"),
    *("score_thresholds.csv", "score_thresholds.png", "reliability.csv", "reliability.png"),
)
OTHERS = ("evaluation.json", "per_class.csv", "results.json")
IMAGES = "evaluated"  # folder of the drawings: `predict` with the same --out has its own in `detections/`


def write_evaluation(
    out: Path,
    summary: Summary,
    results: list[dict[str, Any]],
    dataset: CocoDetection,
    about: Mapping[str, Any],
    *,
    run: Path,
    report: Path,
    images: int,
    with_results: bool = False,
) -> None:
    """Write figures, tables, images, diagrams and the report of an evaluation, in place of those of an earlier one.

    Args:
        out: folder for all but the report.
        summary: the figures.
        results: the detections in COCO's format; those from the scores of `summary.thresholds()` on are drawn.
        dataset: opened with `train=False`.
        about: which weights and data these are of, for the json.
        run: folder of the training.
        report: the HTML file.
        images: number of images to draw.
        with_results: also write the detections, as `results.json`.

    Raises:
        StorageError: a file cannot be written.
    """
    with writing(out):
        remove_evaluation(out, OPTIONAL)  # of an evaluation before, which may have had more to draw
        if with_results:
            write_text(out / "results.json", json.dumps(finite_results(results), allow_nan=False))
        summary.save(out, about)
        write_images(out, dataset, results, images, summary.thresholds())
        write_curves(out, summary, run / "metrics.jsonl")
        write_report(run, out, report)


def remove_evaluation(out: Path, names: Sequence[str] = (*OPTIONAL, *OTHERS)) -> None:
    """Remove what an evaluation has written to a folder, which may hold files of the user, too.

    Args:
        out: the folder; it need not exist.
        names: of the files; the drawings in `evaluated/` are removed as well.
    """
    for name in names:
        (out / name).unlink(missing_ok=True)
    for drawing in (out / IMAGES).glob("*.png"):
        if re.fullmatch(r"-?\d+", drawing.stem):  # an image id
            drawing.unlink(missing_ok=True)


def write_images(
    out: Path, dataset: CocoDetection, results: list[dict[str, Any]], count: int, thresholds: Mapping[str, float]
) -> list[Path]:
    """Draw evenly spaced images of a dataset with their detections and ground truth.

    Args:
        out: folder; gets `evaluated/IMAGE_ID.png` and one sheet of them all, `detections.png`.
        dataset: opened with `train=False`.
        results: detections in COCO's format.
        count: number of images; 0 for none.
        thresholds: by class name the lowest score that is drawn; nothing of a class without one.

    Returns:
        The sheet's path and those of the images; empty for none.
    """
    count = min(count, len(dataset))
    chosen = [number * len(dataset) // count for number in range(count)]  # evenly spaced to the end
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    score_thresholds = {
        category: thresholds.get(name, math.inf) for category, name in zip(dataset.category_ids, dataset.classes)
    }
    results = [result for result in results if result["score"] >= score_thresholds[result["category_id"]]]
    paths, drawn = [], []
    for index in chosen:
        try:
            image, target = dataset.load(index)
        except ImageError:  # the evaluation has counted it
            continue
        own = [result for result in results if result["image_id"] == target["image_id"]]
        boxes = torch.tensor([result["bbox"] for result in own]).reshape(-1, 4)
        detections: dict[str, Any] = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "scores": torch.tensor([result["score"] for result in own]),
            "labels": torch.tensor([labels[result["category_id"]] for result in own], dtype=torch.long),
        }
        # a detection is in the frame of the json, which may have another size than the file
        if own and "segmentation" in own[0] and target["original_size"] == tuple(image.shape[1:]):
            detections["masks"] = decode_masks([result["segmentation"] for result in own], target["original_size"])
        title = dataset.file_name(index)
        drawn.append(draw_detections(image, detections, target, dataset.classes, threshold=0.0, title=title))
        paths.append(out / IMAGES / f"{target['image_id']}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        drawn[-1].save(paths[-1])
    if drawn:
        paths.insert(0, out / "detections.png")
        contact_sheet(drawn).save(paths[0])
    return paths


def write_curves(out: Path, summary: Summary, metrics: Path) -> list[Path]:
    """Draw the confusion matrix, precision over recall, AP over scores and, from metrics.jsonl, the training curves."""
    # here, since a training needs no matplotlib
    from brs_detr.viz.plots import (
        draw_confusion,
        draw_curves,
        draw_precision_recall,
        draw_reliability,
        draw_score_study,
    )

    paths = []
    if summary.confusion is not None:
        paths.append(out / "confusion.png")
        draw_confusion(summary.confusion, paths[-1])
    if summary.curves:
        paths.append(out / "precision_recall.png")
        draw_precision_recall(summary.curves, paths[-1])
    if summary.score_study:
        paths.append(out / "score_thresholds.png")
        draw_score_study(summary.score_study, paths[-1])
    if summary.reliability is not None:
        paths.append(out / "reliability.png")
        draw_reliability(summary.reliability.bins, paths[-1])
    if metrics.is_file():
        paths.append(out / "curves.png")
        draw_curves(read_metrics(metrics), paths[-1])
    return paths


def report_path(out: Path, run: Path) -> Path:
    """Return where the report of an evaluation goes: into the run's folder, or beside figures that went elsewhere."""
    return (run if out == run / EVALUATION else out) / "report.html"


def calibrated_results(
    summary: Summary, results: Sequence[dict[str, Any]], calibration: Calibration, category_ids: Sequence[int]
) -> tuple[Summary, list[dict[str, Any]]]:
    """Return an evaluation of raw scores with the scores of its detections and of its thresholds mapped to precisions.

    Args:
        summary: of the raw scores; its order-based figures stay, and the thresholds of classes that have none.
        results: detections in COCO's format.
        calibration: the map.
        category_ids: the dataset's id of each label.
    """
    labels = {category: label for label, category in enumerate(category_ids)}
    numbers = np.array([labels[result["category_id"]] for result in results], int)
    scores = calibration.apply(np.array([result["score"] for result in results]), numbers)
    mapped = [result | {"score": score} for result, score in zip(results, scores.tolist(), strict=True)]
    rows = [
        row | {"score": calibration.thresholds[labels[row["category_id"]]]} if row.get("f1", -1) > 0 else row
        for row in summary.per_class
    ]
    return replace(summary, per_class=rows), mapped
