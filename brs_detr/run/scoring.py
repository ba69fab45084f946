"""The score of a detector on a dataset: its detections, evaluated head by head, and notes on what the figures mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from brs_detr.config import Config
from brs_detr.data.coco import CocoDetection
from brs_detr.data.issues import DROPPED, POLICY, DataError
from brs_detr.engine.predict import join_heads, limited, predict, predict_with_all_heads, require_all
from brs_detr.evaluation.calibration import Calibration, calibrated
from brs_detr.evaluation.coco_eval import evaluate_coco, match_folds
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.results import detections_to_results
from brs_detr.evaluation.summary import Summary
from brs_detr.models.detector import Detector
from brs_detr.models.ensemble import MIN_LIMIT, Ensemble
from brs_detr.user_files import printable

COCO_LIMIT = 100  # detections of an image that COCO's AP counts
Scored = tuple[Summary | None, list[dict[str, Any]]]  # figures, and detections in COCO's result format


def score(
    model: nn.Module,
    category_ids: Sequence[int],
    truth: GroundTruth,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    images_listed: int = 0,
    head: str | None = None,
    learn: bool = False,
    calibrations: Mapping[str, Calibration] | None = None,
    score_thresholds: Sequence[float] = (),
) -> Scored:
    """Predict a dataset and evaluate the detections; with `eval.predict_with=auto` or `ensemble` those of every head.

    Args:
        model: the bare detector.
        category_ids: the dataset's id of each label of the detector.
        truth: of the dataset, checked once for all evaluations.
        loader: this process's batches of it.
        config: its `eval` section.
        accelerator: of the launch.
        images_listed: by the annotation file, those that were left out when it was read included.
        head: the one of several heads whose figures are returned; None: the one with the highest AP. With `ensemble`
            they are those of all heads joined.
        learn: learn from these images how the scores of the heads compare, as a training's validation does.
        calibrations: maps of the scores to precision by head; scores of a head without one stay raw.
        score_thresholds: also evaluate the detections above each of these scores.

    Returns:
        The figures and the detections in COCO's result format; (None, []) in all but the main process.

    Raises:
        DataError: no image could be read.
        Interruption: in every process, where the loader of one was interrupted.
    """
    evaluate_head = partial(
        score_detections,
        category_ids=category_ids,
        truth=truth,
        config=config,
        accelerator=accelerator,
        images_listed=images_listed,
        match=learn or config.eval.calibrate,
        score_thresholds=score_thresholds,
    )
    maps = calibrations or {}
    if config.eval.predict_with not in ("auto", "ensemble") or len(getattr(model, "heads", ())) < 2:
        return score_one_head(model, loader, config, accelerator, evaluate_head, maps)
    return score_all_heads(cast(Detector, model), loader, config, accelerator, evaluate_head, maps, head, learn)


def score_one_head(
    model: nn.Module,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    evaluate_head: Callable[..., Scored],
    calibrations: Mapping[str, Calibration],
) -> Scored:
    """Predict with the head that the detector predicts with, and evaluate its detections.

    Args:
        model, loader, config, accelerator, calibrations: as for `score`.
        evaluate_head: called with the detections, and the `name` and `calibration` of the head.
    """
    name = getattr(model, "predict_with", "detector")
    detections = predict(model, loader, accelerator, **_limits(config), progress=True)
    return evaluate_head(detections, name=name, calibration=calibrations.get(name))


def score_all_heads(
    detector: Detector,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    evaluate_head: Callable[..., Scored],
    calibrations: Mapping[str, Calibration],
    head: str | None,
    learn: bool,
) -> Scored:
    """Predict with every head at once, evaluate the detections of each and, with `ensemble`, those of all joined.

    Args:
        detector, loader, config, accelerator, calibrations, head, learn: as for `score`.
        evaluate_head: called with the detections, and the `name` and `calibration` of the head.
    """
    limits = _limits(config)
    # all of them, which `join_heads` needs; limited below
    by_head = predict_with_all_heads(detector, loader, accelerator, max_detections=None, progress=True)
    scored = {
        name: evaluate_head(limited(detections, **limits), name=name, calibration=calibrations.get(name))
        for name, detections in by_head.items()
    }
    summaries = {name: summary for name, (summary, _) in scored.items() if summary is not None}
    if not summaries:
        return None, []
    if learn:
        detector.ensemble = learn_ensemble(by_head, summaries)
    if config.eval.predict_with == "ensemble":
        assert detector.ensemble is not None  # of the weights, where it is not learned here
        joined = limited(join_heads(by_head, detector.ensemble, detector.join_iou), **limits)
        scored["ensemble"] = evaluate_head(joined, name="ensemble", calibration=calibrations.get("ensemble"))
        head = "ensemble"
    chosen = head or max(summaries, key=lambda name: summaries[name].stats["AP"])
    summary, results = scored[chosen]
    assert summary is not None  # as all are in the main process
    every = {name: one for name, (one, _) in scored.items() if one is not None}
    summary.head, summary.heads = chosen, {name: one.stats for name, one in every.items()}
    summary.head_thresholds = {name: one.thresholds() for name, one in every.items()}
    summary.folds = {name: folds for one in every.values() for name, folds in one.folds.items()}
    return summary, results


def _limits(config: Config) -> dict[str, Any]:
    """Return the limits on the detections of an image that are evaluated."""
    return {"score_threshold": config.eval.score_threshold, "max_detections": config.eval.max_detections}


def score_detections(
    detections: list[dict[str, Any]],
    category_ids: Sequence[int],
    truth: GroundTruth,
    config: Config,
    accelerator: Accelerator,
    images_listed: int = 0,
    name: str = "detector",
    calibration: Calibration | None = None,
    match: bool = True,
    score_thresholds: Sequence[float] = (),
) -> Scored:
    """Evaluate the detections of a dataset, those of all processes; arguments and result as for `score`.

    `calibration` is the map of the head `name`. It is applied here, after the cut to the best detections of an image,
    which compares classes: AP stays. `match` fills `Summary.folds`, from which calibration is learned and measured.
    """
    max_detections = config.eval.max_detections
    unreadable = [image["image_id"] for image in detections if image["unreadable"]]
    if len(unreadable) == len(detections):  # in every process, so that none waits for the others
        raise DataError("none of the images to evaluate can be read; `python -m brs_detr check-data` names the fault")
    if not accelerator.is_main_process:
        return None, []
    require_all(detections, truth.image_ids)

    def as_results(images: Sequence[Mapping[str, Any]]) -> list[dict]:
        return [result for image in images for result in detections_to_results(image["image_id"], image, category_ids)]

    raw = as_results(detections)
    results = raw if calibration is None else as_results(calibrated(detections, calibration))
    counted = (*(limit for limit in (1, 10) if limit < max_detections), max_detections)
    readable = sorted(set(truth.image_ids) - set(unreadable))
    masks = truth.masks and all("masks" in found for found in detections)
    summary = evaluate_coco(
        truth, results, image_ids=readable, max_detections=counted, masks=masks, score_thresholds=score_thresholds
    )
    if match:
        summary.folds = {name: match_folds(truth, raw, category_ids, readable, max_detections)}
    summary.images_listed = max(images_listed, len(truth.image_ids))
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        summary.notes.append(f"{len(unreadable)} image(s) cannot be read and are left out: image id {shown}")
    summary.notes += setting_notes(config, truth, readable, name)
    return summary, results


def learn_ensemble(by_head: Mapping[str, Sequence[dict[str, Any]]], summaries: Mapping[str, Summary]) -> Ensemble:
    """Learn from a validation how the scores of the heads compare."""
    scores = {
        head: torch.from_numpy(np.concatenate([image["scores"] for image in images]))
        for head, images in by_head.items()
    }
    any_summary = next(iter(summaries.values()))
    objects = sum(row["objects"] for row in any_summary.per_class)
    return Ensemble.learn(scores, {head: one.stats["AP"] for head, one in summaries.items()}, objects)


def setting_notes(config: Config, truth: GroundTruth, image_ids: Sequence[int], head: str) -> list[str]:
    """List the settings that make AP another measure than COCO's, or bound it for these images.

    Args:
        config: of the evaluation and the detector.
        truth: of the dataset.
        image_ids: of the images that are evaluated.
        head: whose detections are evaluated; "ensemble": those of all heads, of whose limits the largest counts.
    """
    notes, threshold, max_detections = [], config.eval.score_threshold, config.eval.max_detections
    if threshold > 0:
        notes.append(
            f"detections with a score of {threshold:g} or less are left out (eval.score_threshold): AP and recall are "
            "lower than without"
        )
    if max_detections != COCO_LIMIT:
        notes.append(
            f"all figures count the best {max_detections} detection(s) of an image (eval.max_detections), "
            f"COCO's are of {COCO_LIMIT}"
        )
    limits = config.model.detection_limits
    heads = [head] if head in limits else list(limits)
    setting, returned = " and ".join(limits[one][0] for one in heads), max(limits[one][1] for one in heads)
    if head == "ensemble":
        returned = max(returned, MIN_LIMIT)
    if max(returned, COCO_LIMIT) < max_detections:
        notes.append(f"the detector returns {returned} detections an image, not {max_detections}: raise {setting} too")
    objects, image = truth.max_objects(image_ids, by_class=False)
    if (
        objects > min(max_detections, returned) and truth.max_objects(image_ids)[0] <= max_detections
    ):  # else the summary says so itself
        notes.append(
            f"image {image} holds {objects} objects but at most {min(max_detections, returned)} detections of an "
            f"image count: its recall cannot reach 1; raise eval.max_detections and {setting}"
        )
    return notes


def dataset_notes(dataset: CocoDetection) -> list[str]:
    """List what of the annotation file is not evaluated, and why; not the crowds, which COCO leaves out too."""
    report, notes = dataset.report, []
    if not report["annotations_listed"]:
        notes.append(
            f"{printable(dataset.json_path)} has no annotations, so there are no figures; results.json has the "
            "detections to submit"
        )
    if report["images"] < report["images_listed"]:
        missing = report["images_listed"] - report["images"]
        notes.append(
            f"{missing:,} of {report['images_listed']:,} images of {printable(dataset.json_path)} are not evaluated"
        )
    for kind, count in report.items():
        action, explanation = POLICY.get(kind, ("", ""))
        if action == DROPPED and kind != "crowd":
            notes.append(f"{count:,} x {kind.replace('_', ' ')}: {explanation}")
    return notes
