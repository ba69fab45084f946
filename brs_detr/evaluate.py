"""The evaluation, from top to bottom: `evaluate`. Started by `brs-detr eval`, `eval.py` or `-m brs_detr.evaluate`.

Prints COCO's figures, a table of classes and what is most often taken for what; writes `results.json` (COCO's result
format, the dataset's own category ids), `evaluation.json` (all figures), `per_class.csv`, `confusion.csv`,
`precision_recall.csv`, and images of them with detections and ground truth. The figures equal those that the training's
validation printed for these weights; where settings differ from the training's, that is said.

The arguments and the checks that need no torch are in `commands/evaluate.py`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from brs_detr import config as configuration
from brs_detr.cli import run_command
from brs_detr.config import Config
from brs_detr.data.build import open_val_set
from brs_detr.data.coco import CocoDetection
from brs_detr.data.issues import DROPPED, POLICY, DataError
from brs_detr.engine.predict import join_heads, limited, predict, predict_with_all_heads, require_all
from brs_detr.evaluation.calibration import Calibration, calibrated, fit_calibration
from brs_detr.evaluation.coco_eval import evaluate_coco, match_folds
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.reliability import assess, cross_fitted, merge
from brs_detr.evaluation.results import detections_to_results
from brs_detr.evaluation.summary import Summary
from brs_detr.exit_codes import ExitCode, Failure
from brs_detr.models.detector import Detector
from brs_detr.models.ensemble import MAX_JOINED, Ensemble
from brs_detr.run import setup
from brs_detr.run.dataset import require_same_categories, val_loader, with_source_of_evaluation
from brs_detr.run.drawings import report_path, write_evaluation
from brs_detr.run.launch import start_accelerator
from brs_detr.run.output_dir import require_writable
from brs_detr.run.training import Data, Run, Validated
from brs_detr.run.weights import folder_for_results
from brs_detr.user_files import complain, printable


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, and where they are saved; as text, what the command prints.

    Attributes:
        summary: every figure and table; None in all but the main process.
        folder: that was written to.
        weights: file of the weights.
        epoch: of the weights, "?" if unknown.
        annotations: file of the ground truth.
    """

    summary: Summary | None
    folder: Path
    weights: Path
    epoch: Any = "?"
    annotations: Path | None = None

    @property
    def stats(self) -> dict[str, float]:
        """Return COCO's figures and oLRP, each in [0, 1], or -1 where the dataset has no such object."""
        return {} if self.summary is None else self.summary.stats

    def __str__(self) -> str:
        if self.summary is None:
            return f"{self.weights}: the results are in the main process"
        head = f"{printable(self.weights)} (epoch {printable(self.epoch)}) on {printable(self.annotations)}"
        return f"{head}\n\n{self.summary.table()}\n\nsaved in {printable(self.folder)}"


def run_evaluation(
    weights: Path,
    overrides: list[str],
    out: Path | None = None,
    images: int = 0,
    score_thresholds: Sequence[float] = (),
) -> int:
    """Call `evaluate` with its arguments; turn what ends it early into a message and an exit code."""
    try:
        results = evaluate(weights, overrides, out, images, score_thresholds)
    except Failure as error:
        complain(error)
        return error.code
    if results.summary is not None:
        print(results)
    return ExitCode.OK


def evaluate(
    weights_path: Path,
    overrides: list[str],
    out: Path | None = None,
    images: int = 0,
    score_thresholds: Sequence[float] = (),
) -> Evaluation:
    """Evaluate a run folder's best weights, or a weights file, on the val split of its config.

    Args:
        weights_path: run folder or weights file.
        overrides: `a.b=value` applied to the stored config.
        out: folder to write to; by default beside the weights.
        images: number of images to draw.
        score_thresholds: also evaluate the detections above each of these scores.
    """
    model, weights, config, file = setup.restore(weights_path, overrides)
    out = out or folder_for_results(file)
    require_writable(out, "--out")
    # prediction is in float32 whatever the training's precision, which this machine may not have
    accelerator = start_accelerator(replace(config, train=replace(config.train, precision="no")))
    config = with_source_of_evaluation(config, out, accelerator)
    dataset = open_val_set(config.data, config.model.has_masks, config.eval.test_scales)
    require_same_categories(weights.classes, weights.category_ids, dataset, str(file))
    loader = val_loader(dataset, config, accelerator)
    truth, listed = GroundTruth.read(dataset.ground_truth(), dataset.masks), dataset.report["images_listed"]
    with contextlib.closing(loader):
        model.to(accelerator.device)
        summary, results = score(
            model,
            weights.category_ids,
            truth,
            loader,
            config,
            accelerator,
            listed,
            model.predict_with,  # and not the one that is best on these images, which would be chosen on the test set
            calibrations=setup.stored_calibrations(weights, file) if config.eval.calibrate else None,
            score_thresholds=score_thresholds,
        )
    if summary is None:
        return Evaluation(None, out, file)
    calibration, uncalibrated = setup.calibration_of(model, weights, config, file)
    known = weights.extra.get("validated_on") == dataset.fingerprint()
    if summary.folds:
        summary.reliability = assess(summary.folds[model.predict_with], calibration, known)
    summary.notes += [f"{uncalibrated}."] if uncalibrated else []
    stored = configuration.from_dict(weights.config, str(file))
    summary.notes += [note] if (note := setup.unused_nms(model, config)) else []
    summary.notes += [*dataset_notes(dataset), *changed_settings(stored, config)]
    epoch = weights.extra.get("epoch", "?")
    about = {"weights": str(file), "epoch": epoch, "annotations": dataset.json_path}
    report = report_path(out, file.parent)
    write_evaluation(
        out, summary, results, dataset, about, run=file.parent, report=report, images=images, with_results=True
    )
    return Evaluation(summary, out, file, epoch, Path(dataset.json_path))


def changed_settings(stored: configuration.Config, used: configuration.Config) -> list[str]:
    """List the settings that bear on the figures and differ from those that the weights were validated with."""
    changes = [change for change in configuration.differences(stored, used) if change.startswith(setup.METRIC_SETTINGS)]
    return [f"not as in the training: {'; '.join(changes)}"] if changes else []


COCO_LIMIT = 100  # detections of an image that COCO's AP counts


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
    **options: Any,
) -> tuple[Summary | None, list[dict]]:
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
        options: handed to `score_detections`.

    Returns:
        The figures and the detections in COCO's result format; (None, []) in all but the main process.

    Raises:
        DataError: no image could be read.
        Interruption: in every process, where the loader of one was interrupted.
    """
    limits: dict[str, Any] = {
        "score_threshold": config.eval.score_threshold,
        "max_detections": config.eval.max_detections,
    }
    maps = calibrations or {}
    options["match"] = learn or config.eval.calibrate
    if config.eval.predict_with not in ("auto", "ensemble") or len(getattr(model, "heads", ())) < 2:
        detections = predict(model, loader, accelerator, **limits, progress=True)
        own = getattr(model, "predict_with", "detector")
        options |= {"name": own, "calibration": maps.get(own)}
        return score_detections(detections, category_ids, truth, config, accelerator, images_listed, **options)
    detector, shared = cast(Detector, model), (category_ids, truth, config, accelerator, images_listed)
    # what `join_heads` needs, limited below
    most = max(MAX_JOINED, config.eval.max_detections)
    by_head = predict_with_all_heads(detector, loader, accelerator, max_detections=most, progress=True)
    scored = {
        name: score_detections(limited(detections, **limits), *shared, name=name, calibration=maps.get(name), **options)
        for name, detections in by_head.items()
    }
    summaries = {name: summary for name, (summary, _) in scored.items() if summary is not None}
    if not summaries:
        return None, []
    if learn:
        detector.ensemble = learn_ensemble(by_head, summaries)
    if config.eval.predict_with == "ensemble":
        assert detector.ensemble is not None  # of the weights, where it is not learned here
        joined = join_heads(by_head, detector.ensemble, detector.join_iou)
        options |= {"name": "ensemble", "calibration": maps.get("ensemble")}
        scored["ensemble"] = score_detections(limited(joined, **limits), *shared, **options)
        head = "ensemble"
    chosen = head or max(summaries, key=lambda name: summaries[name].stats["AP"])
    summary, results = scored[chosen]
    assert summary is not None  # as all are in the main process
    every = {name: one for name, (one, _) in scored.items() if one is not None}
    summary.head, summary.heads = chosen, {name: one.stats for name, one in every.items()}
    summary.head_thresholds = {name: one.thresholds() for name, one in every.items()}
    summary.folds = {name: folds for one in every.values() for name, folds in one.folds.items()}
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
    **options: Any,
) -> tuple[Summary | None, list[dict]]:
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
    summary = evaluate_coco(truth, results, image_ids=readable, max_detections=counted, masks=masks, **options)
    if match:
        summary.folds = {name: match_folds(truth, raw, category_ids, readable, max_detections)}
    summary.images_listed = max(images_listed, len(truth.image_ids))
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        summary.notes.append(f"{len(unreadable)} image(s) cannot be read and are left out: image id {shown}")
    summary.notes += setting_notes(config, truth, readable)
    return summary, results


def setting_notes(config: Config, truth: GroundTruth, image_ids: Sequence[int]) -> list[str]:
    """List the settings that make AP another measure than COCO's, or bound it for these images."""
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
    setting, returned = config.model.detection_limit
    if max(returned, COCO_LIMIT) < max_detections:
        notes.append(f"the detector returns {returned} detections an image, not {max_detections}: raise {setting} too")
    objects, image = truth.max_objects(image_ids, by_class=False)
    if (
        objects > min(max_detections, returned) and truth.max_objects(image_ids)[0] <= max_detections
    ):  # else the summary says so itself
        notes.append(
            f"image {image} holds {objects} objects but at most {min(max_detections, returned)} detections of a "
            "image count: "
            f"its recall cannot reach 1; raise eval.max_detections and {setting}"
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


def validator(run: Run, data: Data) -> Callable[[nn.Module], dict[str, Any]]:
    """Build what the trainer calls after an epoch: detector -> its figures, {} outside the main process.

    Besides COCO's figures these are "images" and "images_left_out", the numbers of images measured and not, and "head",
    the best of several heads. Each note of an evaluation is logged the first time it occurs; `data.thresholds` gets the
    score of every class's best F1, `data.chosen` the best head and the map of scores to precision of each,
    `data.validated` what was found.

    Raises:
        DataError: the dataset holds no object, so that no validation could tell good weights from bad ones.
    """
    dataset, category_ids, thresholds = data.val_set, data.train_set.category_ids, data.thresholds
    truth, reported = GroundTruth.read(dataset.ground_truth(), dataset.masks), set()
    if not truth.max_objects(truth.image_ids)[0]:
        raise DataError(
            f"{dataset.json_path}: none of its {len(dataset):,} images holds an object that counts, so validation "
            "has nothing to measure; point data.val_json and data.val_images at annotated images"
        )

    def validate(module: nn.Module) -> dict[str, Any]:
        data.validated.clear()  # the detections of a large dataset are not kept twice
        listed = dataset.report["images_listed"]
        summary, results = score(
            module, category_ids, truth, data.val_loader, run.config, run.accelerator, listed, learn=True
        )
        thresholds.clear()
        thresholds.update({} if summary is None else summary.thresholds())
        for note in summary.notes if summary is not None else []:
            if note not in reported:
                run.log.say(f"note: {note}")
                reported.add(note)
        if summary is None:
            return {}
        data.chosen.clear()
        if summary.head is not None:
            data.chosen.update(predict_with=summary.head, head_thresholds=summary.head_thresholds)
        ensemble = getattr(module, "ensemble", None)
        if ensemble is not None:
            data.chosen["ensemble"] = ensemble.as_dict()
        chosen = summary.head or next(iter(summary.folds))
        maps = {head: fit_calibration(merge(folds), summary.images) for head, folds in summary.folds.items()}
        if stored := {head: one.as_dict() for head, one in maps.items() if one is not None}:
            data.chosen["calibration"] = stored
        summary.reliability = cross_fitted(summary.folds[chosen])
        data.validated[:] = [Validated(summary, results, maps[chosen])]
        heads = {f"{head}_AP": stats["AP"] for head, stats in summary.heads.items()}
        images = {"images": summary.images, "images_left_out": summary.images_left_out}
        errors = summary.reliability.as_metrics() if summary.reliability else {}
        best = {} if summary.head in (None, "ensemble") else {"head": summary.head}
        return summary.stats | heads | errors | images | best

    return validate


main = partial(run_command, "eval")  # the command line

if __name__ == "__main__":  # accelerate launch -m brs_detr.evaluate
    sys.exit(main())
