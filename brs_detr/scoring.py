"""A detector's figures on a dataset: prediction in all processes, COCO's evaluation in the main one.

What makes the figures others than COCO's on the whole dataset is said in the summary's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from brs_detr.config import Config
from brs_detr.data.coco import CocoDetection
from brs_detr.data.faults import DROPPED, POLICY, DataError
from brs_detr.engine.evaluate import predict, require_all
from brs_detr.evaluation.coco import GroundTruth, Summary, detections_to_results, evaluate_coco
from brs_detr.user_files import printable

COCO_LIMIT = 100  # detections of a picture that COCO's AP counts


def score(
    model: nn.Module,
    category_ids: Sequence[int],
    truth: GroundTruth,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    images_listed: int = 0,
    **options,
) -> tuple[Summary | None, list[dict]]:
    """Predict a dataset and evaluate what was found.

    Args:
        model: the bare detector.
        category_ids: the dataset's id of each label of the detector.
        truth: of the dataset, checked once for all evaluations.
        loader: this process's batches of it.
        config: its `eval` section.
        accelerator: of the launch.
        images_listed: by the annotation file, those that were left out when it was read included.
        options: handed to `evaluate_coco`.

    Returns:
        The figures and the detections in COCO's result format; (None, []) in all but the main process.

    Raises:
        DataError: no picture could be read.
        Interruption: in every process, where the loader of one was interrupted.
    """
    most = config.eval.max_detections
    limits = {"score_threshold": config.eval.score_threshold, "max_detections": most}
    detections = predict(model, loader, accelerator, progress=True, **limits)
    unreadable = [found["image_id"] for found in detections if found["unreadable"]]
    if len(unreadable) == len(detections):  # in every process, so that none waits for the others
        raise DataError("none of the pictures to evaluate can be read; `python -m brs_detr check-data` names the fault")
    if not accelerator.is_main_process:
        return None, []
    require_all(detections, truth.image_ids)
    results = [
        result for found in detections for result in detections_to_results(found["image_id"], found, category_ids)
    ]
    counted = (*(limit for limit in (1, 10) if limit < most), most)
    readable = sorted(set(truth.image_ids) - set(unreadable))
    summary = evaluate_coco(truth, results, image_ids=readable, max_detections=counted, **options)
    summary.images_listed = max(images_listed, len(truth.image_ids))
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        summary.notes.append(f"{len(unreadable)} picture(s) cannot be read and are left out: image id {shown}")
    summary.notes += setting_notes(config, truth, readable)
    return summary, results


def setting_notes(config: Config, truth: GroundTruth, image_ids: Sequence[int]) -> list[str]:
    """What of the settings makes AP another measure than COCO's, or bounds it for these pictures."""
    notes, threshold, most = [], config.eval.score_threshold, config.eval.max_detections
    if threshold > 0:
        notes.append(
            f"detections with a score of {threshold:g} or less are left out (eval.score_threshold): AP and recall are "
            "lower than without"
        )
    if most != COCO_LIMIT:
        notes.append(
            f"all figures count the best {most} detection(s) of a picture (eval.max_detections), "
            f"COCO's are of {COCO_LIMIT}"
        )
    returned = config.model.detections_per_image
    if max(returned, COCO_LIMIT) < most:
        notes.append(
            f"the detector returns {returned} detections a picture, not {most}: raise model.detections_per_image too"
        )
    objects, image = truth.most_objects(image_ids, by_class=False)
    if objects > min(most, returned) and truth.most_objects(image_ids)[0] <= most:  # else the summary says so itself
        notes.append(
            f"image {image} holds {objects} objects but at most {min(most, returned)} detections of a picture count: "
            "its recall cannot reach 1; raise eval.max_detections and model.detections_per_image"
        )
    return notes


def dataset_notes(dataset: CocoDetection) -> list[str]:
    """What of the annotation file is not evaluated, and why; not the crowds, which COCO leaves out too."""
    report, notes = dataset.report, []
    if report["images"] < report["images_listed"]:
        missing = report["images_listed"] - report["images"]
        notes.append(
            f"{missing:,} of {report['images_listed']:,} pictures of {printable(dataset.json_path)} are not evaluated"
        )
    for kind, count in report.items():
        action, explanation = POLICY.get(kind, ("", ""))
        if action == DROPPED and kind != "crowd":
            notes.append(f"{count:,} x {kind.replace('_', ' ')}: {explanation}")
    return notes


def validator(
    category_ids: Sequence[int],
    dataset: CocoDetection,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    say: Callable[[str], None],
    thresholds: dict[str, float],
) -> Callable[[nn.Module], dict[str, float]]:
    """What the trainer calls after an epoch: a function from a detector to its figures, {} outside the main process.

    Besides COCO's figures these are "images" and "images_left_out", the numbers of images measured and not.

    Args:
        category_ids, loader, config, accelerator: as for `score`.
        dataset: opened with `train=False`; its annotations are checked once, here.
        say: told each note of an evaluation the first time it comes up.
        thresholds: filled by each validation with the score of every class's best F1.

    Raises:
        DataError: the dataset holds no object, so that no validation could tell good weights from bad ones.
    """
    truth, told = GroundTruth.read(dataset.ground_truth()), set()
    if not truth.most_objects(truth.image_ids)[0]:
        raise DataError(
            f"{dataset.json_path}: none of its {len(dataset):,} pictures holds an object that counts, so validation "
            "has nothing to measure; point data.val_json and data.val_images at annotated pictures"
        )

    def validate(module: nn.Module) -> dict[str, float]:
        listed = dataset.report["images_listed"]
        summary, _ = score(module, category_ids, truth, loader, config, accelerator, listed)
        thresholds.clear()
        thresholds.update({} if summary is None else summary.thresholds())
        for note in summary.notes if summary is not None else []:
            if note not in told:
                say(f"note: {note}")
                told.add(note)
        if summary is None:
            return {}
        return summary.stats | {"images": summary.images, "images_left_out": summary.images_left_out}

    return validate
