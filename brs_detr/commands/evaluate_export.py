"""`eval FILE.onnx`: the figures of an exported file, beside those of the detector that it was made from.

The images are those of the validation set, resized as the file's metadata says and run in onnxruntime. AP needs the
order of the raw scores, which the file holds: where its calibration is flat, float32 rounds different scores to one.
They are mapped here, in float64 and with the file's own map, as the evaluation of weights does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from brs_detr import config as configuration
from brs_detr.config import Config, ConfigError
from brs_detr.data.build import open_val_set
from brs_detr.data.coco import CocoDetection
from brs_detr.data.transforms import EvalTransforms
from brs_detr.engine.predict import predict
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.reliability import assess
from brs_detr.evaluation.summary import Summary, text_table
from brs_detr.exit_codes import ExitCode, Failure
from brs_detr.export.runtime import ExportedFile
from brs_detr.ops.images import ImageBatch, resized_size
from brs_detr.run.dataset import require_same_categories, val_loader, with_source_of_evaluation
from brs_detr.run.drawings import write_evaluation
from brs_detr.run.launch import start_accelerator
from brs_detr.run.output_dir import require_writable
from brs_detr.run.scoring import dataset_notes, score_detections
from brs_detr.user_files import complain, printable

COMPARED = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl", "AR100")


class RawDetector(nn.Module):
    """An exported file as `engine.predict.predict` calls a detector, with its raw scores."""

    def __init__(self, file: ExportedFile) -> None:
        super().__init__()
        self.file = file
        if file.calibration is not None:
            file.open_raw_scores()  # now, and not after the images have been opened

    def forward(self, images: ImageBatch, targets: None = None) -> list[dict[str, Any]]:
        """Return the detections of each image in pixels of the stored image."""
        return self.file(images, raw_scores=True)


def run_evaluation(path: Path, overrides: list[str], out: Path | None, images: int) -> int:
    """Call `evaluate_file` with its arguments; turn what ends it early into a message and an exit code."""
    try:
        evaluate_file(path, overrides, out, images)
    except Failure as error:
        complain(error)
        return error.code
    return ExitCode.OK


def evaluate_file(path: Path, overrides: list[str], out: Path | None = None, images: int = 0) -> Summary | None:
    """Evaluate an exported file on the val split of its settings, or of the command line's.

    Args:
        path: ONNX file.
        overrides: `data.root=...` and what else is not fixed in the file.
        out: folder to write to; by default `NAME-evaluation` beside the file.
        images: number of images to draw.

    Returns:
        The figures; None in all but the main process.

    Raises:
        ConfigError: the dataset is missing, or its categories are not the file's.
    """
    file = ExportedFile(path, "cpu")
    detector = RawDetector(file)
    config = settings(path, file.metadata, overrides)
    out = out or path.with_name(f"{path.stem}-evaluation")
    require_writable(out, "--out")
    accelerator = start_accelerator(config)
    config, _ = with_source_of_evaluation(config, out, accelerator)
    dataset = open_val_set(config.data)
    dataset.transforms = EvalTransforms(file.short_side, file.long_side, file.antialias, within=file.size)
    require_same_categories(file.classes, file.category_ids, dataset, str(path))
    loader = val_loader(dataset, config, accelerator)
    limits: dict[str, Any] = {
        "score_threshold": config.eval.score_threshold,
        "max_detections": config.eval.max_detections,
    }
    with contextlib.closing(loader):
        detections = predict(detector, loader, accelerator, **limits, progress=True)
    truth, listed = GroundTruth.from_dataset(dataset.ground_truth(), dataset.masks), dataset.report["images_listed"]
    summary, results = score_detections(
        detections,
        file.category_ids,
        truth,
        config,
        accelerator,
        listed,
        name=file.head,
        calibration=file.calibration,
    )
    if summary is None:
        return None
    validated_on = (file.metadata.get("validation") or {}).get("images")
    summary.reliability = assess(summary.folds[file.head], file.calibration, validated_on == dataset.fingerprint())
    summary.notes = [note for note in summary.notes if "the detector returns" not in note]
    summary.notes += [*dataset_notes(dataset), *file_notes(file, dataset)]
    table = comparison(file.metadata, summary, dataset)
    about: dict[str, Any] = {"file": str(path), "precision": file.precision, "annotations": dataset.json_path}
    about["original"] = file.metadata.get("validation")
    report = out / "report.html"
    write_evaluation(out, summary, results, dataset, about, run=out, report=report, images=images, with_results=True)
    print(f"{printable(path)} ({file.precision}, head {file.head}) on {printable(dataset.json_path)}\n")
    print(f"{summary.table()}\n\n{table}\n\nsaved in {printable(out)}")
    return summary


def settings(path: Path, metadata: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return the settings of an evaluation: the file's, changed as the command line says.

    Raises:
        ConfigError: neither says where the images are.
    """
    stored = metadata.get("config", {})
    config = configuration.apply_overrides(configuration.from_dict(stored, str(path)), overrides)
    given = set(configuration.override_names(overrides))
    held = {f"data.{name}" for name in stored.get("data", {})}
    missing = [name for name in ("data.root", "data.val_json", "data.val_images") if name not in given | held]
    if missing and config.data.source is None:
        raise ConfigError(
            f"{path}: does not hold {' and '.join(missing)}: an exported file carries no absolute path of the machine "
            f"it was made on. Add {' '.join(f'{name}=...' for name in missing)}, or data=FOLDER."
        )
    return config


def file_notes(file: ExportedFile, dataset: CocoDetection) -> list[str]:
    """List what makes the figures others than those of the detector in torch."""
    if file.size is None or file.has_canvas:  # on its canvas torch saw the same
        return []
    height, width = file.size
    sizes = [
        resized_size(h, w, file.short_side, file.long_side, file.size) for h, w in dataset.packed.image_sizes.tolist()
    ]
    padded = sum(size != file.size for size in sizes)
    return [
        f"{padded:,} images are padded to the file's {height}x{width}, which torch did not do (--any-size does not)"
    ]


def comparison(metadata: dict[str, Any], summary: Summary, dataset: CocoDetection) -> str:
    """Format the figures in percent below those of the original, or say why there are none."""
    validation = metadata.get("validation")
    if not validation:
        return "The file holds no figures of the original: its weights had no validation with these settings."
    original = validation["figures"]
    own_stats = summary.stats
    names = [name for name in COMPARED if min(original.get(name, -1), own_stats.get(name, -1)) >= 0]
    if not names:
        return "There are no figures to compare."
    own = [own_stats[name] for name in names]
    rows = [
        ["original", *(f"{100 * original[name]:.2f}" for name in names)],
        ["this file", *(f"{100 * value:.2f}" for value in own)],
        ["difference", *(f"{100 * (value - original[name]):+.2f}" for name, value in zip(names, own))],
    ]
    table = text_table(["", *names], rows)
    if validation["images"] is None:
        table += "\nThe weights do not say on which images the original's figures are."
    elif validation["images"] != dataset.fingerprint():
        table += "\nThe original's figures are of other images or annotations: they cannot be compared."
    return table
