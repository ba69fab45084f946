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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from brs_detr import config as configuration
from brs_detr.cli import run_command
from brs_detr.data.build import open_val_set
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.reliability import assess
from brs_detr.evaluation.summary import Summary
from brs_detr.exit_codes import ExitCode, Failure
from brs_detr.run import setup
from brs_detr.run.dataset import require_same_categories, val_loader, with_source_of_evaluation
from brs_detr.run.drawings import report_path, write_evaluation
from brs_detr.run.launch import start_accelerator
from brs_detr.run.output_dir import require_writable
from brs_detr.run.scoring import dataset_notes, score
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
    config, divided = with_source_of_evaluation(config, out, accelerator)
    dataset = open_val_set(config.data, config.model.has_masks, config.eval.test_scales)
    require_same_categories(weights.classes, weights.category_ids, dataset, str(file))
    loader = val_loader(dataset, config, accelerator)
    truth, listed = GroundTruth.from_dataset(dataset.ground_truth(), dataset.masks), dataset.report["images_listed"]
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
    summary.notes += [] if divided else trained_on(stored, config, listed)
    epoch = weights.extra.get("epoch", "?")
    about = {"weights": str(file), "epoch": epoch, "annotations": dataset.json_path}
    report = report_path(out, file.parent)
    write_evaluation(
        out, summary, results, dataset, about, run=file.parent, report=report, images=images, with_results=True
    )
    return Evaluation(summary, out, file, epoch, Path(dataset.json_path))


def trained_on(stored: configuration.Config, used: configuration.Config, images: int) -> list[str]:
    """Note that a dataset without splits is measured as a whole, where the training held out a part of its own.

    Args:
        stored: the settings of the training.
        used: those of the evaluation.
        images: number of images of the dataset.
    """
    fraction = stored.data.val_fraction
    if fraction is None or used.data.val_fraction is not None:
        return []
    return [
        f"all {images:,} images of data={printable(used.data.source)} are measured, and the training held out "
        f"data.val_fraction={fraction:g} of its dataset: if it is the same one, most of these images were trained on "
        f"and the figures are too good; add data.val_fraction={fraction:g}"
    ]


def changed_settings(stored: configuration.Config, used: configuration.Config) -> list[str]:
    """List the settings that bear on the figures and differ from those that the weights were validated with."""
    changes = [change for change in configuration.differences(stored, used) if setup.changes_figures(change)]
    return [f"not as in the training: {'; '.join(changes)}"] if changes else []


main = partial(run_command, "eval")  # the command line

if __name__ == "__main__":  # accelerate launch -m brs_detr.evaluate
    sys.exit(main())
