"""The `predict` command: detect objects in a folder of images; write a json and images with boxes."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from brs_detr.data.build import build_eval_transforms
from brs_detr.data.image_io import ImageError, is_image_name, read_image
from brs_detr.engine.checkpoint import Weights, write_text
from brs_detr.evaluation.calibration import Calibration
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.masks import as_rles, decode_masks
from brs_detr.ops.rle import as_text
from brs_detr.run.launch import choose_device
from brs_detr.run.output_dir import require_writable
from brs_detr.run.setup import calibration_of, restore
from brs_detr.user_files import printable
from brs_detr.viz.boxes import draw_detections

MAX_NAME_BYTES = 255  # of a file name on common file systems


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    """Predict every image and return the exit code: 1 if no image could be read."""
    overrides = [*options.overrides, *(["eval.calibrate=false"] if options.raw_scores else [])]
    model, weights, config, file = restore(options.weights, overrides)
    device = choose_device(options.device)
    model.to(device)
    calibration, uncalibrated = calibration_of(model, weights, config, file)
    if uncalibrated and not options.raw_scores:
        print(printable(f"{uncalibrated}."))
    own = None if calibration is None or options.threshold is not None else calibration.thresholds
    thresholds = np.array(score_thresholds(model, weights, options.threshold) if own is None else own)
    transforms = build_eval_transforms(config.data)
    files = image_files(options.images)
    root = options.images if options.images.is_dir() else options.images.parent
    predictions: list[dict] = []
    drawings = drawing_names([path.relative_to(root) for path in files])
    require_writable(options.out, "--out")
    partial = options.out / "predictions.partial.jsonl"  # remains if this process is killed
    with open(partial, "w", encoding="utf-8") as lines:
        try:
            for path, drawing in zip(files, drawings, strict=True):
                try:
                    image = read_image(path, limits=config.data)
                except ImageError as error:
                    print(f"skipped: {error}")
                    continue
                empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
                resized, _ = transforms(image, empty)
                output = model(ImageBatch.from_list([resized], [(image.shape[1], image.shape[2])]).to(device), None)[0]
                kept, missed = select(output, calibration, thresholds, weights.classes)
                name = path.relative_to(root).as_posix()
                entry = {"file_name": name, "objects": describe(kept, weights.classes, weights.category_ids)}
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                predictions.append(entry)
                print(f"{printable(path)}: {len(kept['scores'])} objects{printable(missed)}")
                if "masks" in kept:
                    kept["masks"] = decode_masks(kept["masks"], (image.shape[1], image.shape[2]))
                drawing_image = Image.fromarray(image.permute(1, 2, 0).numpy())
                target = options.out / "detections" / drawing
                target.parent.mkdir(parents=True, exist_ok=True)
                draw_detections(drawing_image, kept, None, weights.classes, threshold=0.0).save(target)
        finally:  # also on an error or Ctrl-C: keep the predictions made so far
            save(predictions, options.out, partial)
    return 0 if predictions else 1


def select(
    output: dict[str, Any], calibration: Calibration | None, thresholds: np.ndarray, classes: list[str]
) -> tuple[dict[str, Any], str]:
    """Select the detections of an image from the threshold of their class on, the best first.

    Args:
        output: of the detector: `boxes` (n, 4), `scores` (n,) raw, `labels` (n,) and perhaps `masks`.
        calibration: map of the scores; None keeps them raw.
        thresholds: (K,) minimum score of each label.
        classes: names of the labels.

    Returns:
        The selected ones on the CPU, `scores` float64 and `masks` compressed; and, where none is, the best score there
        was, as the end of a sentence.
    """
    # float64 as the map and the thresholds: a detection at the threshold is selected
    scores, labels = output["scores"].double().cpu().numpy(), output["labels"].cpu().numpy()
    scores = scores if calibration is None else calibration.apply(scores, labels)
    order = np.argsort(-scores, kind="stable")
    chosen = order[scores[order] >= thresholds[labels[order]]]
    kept: dict[str, Any] = {key: output[key].cpu()[torch.from_numpy(chosen)] for key in ("boxes", "labels")}
    kept["scores"] = torch.from_numpy(scores[chosen])
    if "masks" in output:
        masks = as_rles(output["masks"])
        kept["masks"] = [masks[index] for index in chosen.tolist()]
    if len(chosen):
        return kept, ""
    if not len(order):
        return kept, "; the detector returned none"
    best = labels[order[0]]
    return kept, (
        f"; the best score is {scores[order[0]]:.3g}, of {classes[best]}, below its threshold {thresholds[best]:.3g}. "
        "--threshold sets another"
    )


def save(predictions: list[dict], out: Path, partial: Path) -> None:
    """Write predictions.json, remove the partial file, and print the folder."""
    write_text(out / "predictions.json", json.dumps(predictions, indent=1))
    partial.unlink(missing_ok=True)
    print(f"saved in {printable(out)}")


def score_thresholds(model: Detector, weights: Weights, threshold: float | None) -> list[float]:
    """Return the minimum raw score of each class: `threshold`, or that of the best F1 of the head that predicts.

    The F1 is that of the last validation. A head that it did not score, and weights without a validation (converted
    ones), get 0.3; a class without a true positive in validation gets 1.
    """
    stored = None if threshold is not None else stored_thresholds(model, weights)
    if not stored:
        return [0.3 if threshold is None else threshold] * len(weights.classes)
    return [stored.get(name, 1.0) for name in weights.classes]


def stored_thresholds(model: Detector, weights: Weights) -> dict[str, float] | None:
    """Return what the validation of the weights stored for the head that predicts; None if it did not score it."""
    extra = weights.extra
    by_head: dict[str, dict[str, float]] = extra.get("head_thresholds", {})
    # of a validation of one head, which is then not named, or of the best one
    scored = extra.get("predict_with", weights.config.get("eval", {}).get("predict_with", "auto"))
    alone = {model.heads[0] if scored == "auto" else scored: extra.get("thresholds")}
    return by_head.get(model.predict_with, alone.get(model.predict_with))


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or every file under a folder with an image's ending, sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such image or folder")
    Image.init()
    files = sorted(file for file in path.rglob("*") if is_image_name(file.name))
    if not files:
        raise FileNotFoundError(f"{path}: no image in this folder")
    return files


def drawing_names(files: list[Path]) -> list[Path]:
    """Choose a unique name for the drawing of each file; the same files always get the same names.

    a/b.jpg -> a/b.png, or a/b.jpg.png if there is also a/b.gif. A name that is too long for the file system or already
    taken is truncated and ends in a hash of the file name.
    """
    stems = Counter(file.with_suffix("") for file in files)
    plain = [file.with_suffix(".png") if stems[file.with_suffix("")] == 1 else Path(f"{file}.png") for file in files]
    uses = Counter(plain)
    taken: set[Path] = set()
    names: list[Path] = []
    for file, name in zip(files, plain, strict=True):
        if uses[name] > 1 or len(os.fsencode(name.name)) > MAX_NAME_BYTES:
            name = next(name for name in _hashed_names(file) if name not in uses and name not in taken)
        taken.add(name)
        names.append(name)
    return names


def _hashed_names(file: Path) -> Iterable[Path]:
    """Iterate over truncated names that end in a hash, another one in each attempt."""
    for attempt in range(1000):
        digest = hashlib.sha256(os.fsencode(file) + b"\0" * attempt).hexdigest()[:16]
        start = os.fsencode(file.name)[: MAX_NAME_BYTES - len(digest) - len("-.png")].decode("utf-8", "ignore")
        yield file.with_name(f"{start}-{digest}.png")


def describe(output: dict[str, Any], classes: list[str], category_ids: list[int]) -> list[dict]:
    """Convert detections to dictionaries with class names and category ids; boxes are (x, y, w, h) in image pixels.

    Masks, if there are any, become COCO's compressed run lengths, `segmentation`.
    """
    objects = []
    for (x1, y1, x2, y2), score, label in zip(
        *(output[key].tolist() for key in ("boxes", "scores", "labels")), strict=True
    ):
        box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        objects.append(
            {"name": classes[label], "category_id": category_ids[label], "score": round(score, 4), "bbox": box}
        )
    for entry, rle in zip(objects, output.get("masks", ()), strict=False):  # without masks there are none to add
        entry["segmentation"] = as_text(rle)
    return objects
