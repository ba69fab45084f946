"""The validation of a training: figures after an epoch, what is learned for the weights, and the best one's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from brs_detr.data.image_io import read_image
from brs_detr.data.issues import DataError
from brs_detr.engine.trainer import BEST
from brs_detr.evaluation.calibration import Calibration, fit_calibration
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.reliability import cross_fitted, merge
from brs_detr.evaluation.summary import Summary
from brs_detr.run.drawings import calibrated_results, write_evaluation
from brs_detr.run.scoring import score
from brs_detr.run.weights import EVALUATION

if TYPE_CHECKING:  # `training.py` imports this module
    from brs_detr.run.training import Data, Run

EXAMPLES = 12  # images drawn of a validation
SHOWN_IN_TRACKERS = ("detections", "confusion", "precision_recall", "reliability")


@dataclass(frozen=True)
class Validated:
    """A validation that has ended, in the main process.

    Attributes:
        summary: its figures.
        results: the detections in COCO's format, with the detector's own scores.
        calibration: the map of their scores that was fitted to them; None where there is too little to fit.
    """

    summary: Summary
    results: list[dict[str, Any]]
    calibration: Calibration | None


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
    truth, reported = GroundTruth.from_dataset(dataset.ground_truth(), dataset.masks), set()
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


def report_best(run: Run, data: Data, metadata: Mapping[str, Any]) -> None:
    """Write the figures, images and report of the last validation; whatever fails is a warning, the weights are safe.

    Args:
        run, data: of the training.
        metadata: stored with the weights: "epoch" and "step".
    """
    found, out = data.validated[-1], run.folder / EVALUATION
    summary, results = found.summary, found.results
    if found.calibration is not None and run.config.eval.calibrate:
        summary, results = calibrated_results(summary, results, found.calibration, data.val_set.category_ids)
    report = run.folder / "report.html"
    if not report.exists():
        run.log.say(f"each best validation: figures and images in {out}, all in one page in {report}")
    about = {"weights": BEST, "epoch": metadata["epoch"], "annotations": data.val_set.json_path}
    try:
        write_evaluation(out, summary, results, data.val_set, about, run=run.folder, report=report, images=EXAMPLES)
        drawn = {name: out / f"{name}.png" for name in SHOWN_IN_TRACKERS}
        images = {name: read_image(path).permute(1, 2, 0).numpy() for name, path in drawn.items() if path.is_file()}
        run.log.images(images, metadata["step"])
    except Exception as error:  # an image is no reason to end a training
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        run.log.say(f"warning: {out}: the report of the best validation is incomplete ({reason}). The run continues.")
