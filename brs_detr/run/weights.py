"""Find and read the weights that a user names, official checkpoints too, and what a validation stored with them."""

from __future__ import annotations

import os
from pathlib import Path

from brs_detr.checkpoints.official import from_official
from brs_detr.engine.checkpoint import Weights, find_weights, load_weights
from brs_detr.exit_codes import CheckpointError
from brs_detr.hub.sources import in_cache, local_path
from brs_detr.models.backbones.weights_io import read_official
from brs_detr.models.detector import Detector
from brs_detr.run.inputs import OTHERS
from brs_detr.user_files import UserFileError, read_start

EVALUATION = "evaluation"  # folder of an evaluation in that of a run
DEFAULT_THRESHOLD = 0.3  # of raw scores, where no validation has found a better one
PICKLES = (".pth", ".pt", ".pkl", ".bin")


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the weights file of a run folder, of a name that is downloaded at its first use, or the file itself.

    Raises:
        CheckpointError: there is no such file.
        SourceError: it is no name of weights either.
        DownloadError: they cannot be downloaded.
    """
    return find_weights(local_path(source))


def read(file: Path, *, names_required: bool = True) -> Weights:
    """Read a weights file, or an official checkpoint (`.pth`), of which nothing is executed.

    Args:
        file: see `locate`.
        names_required: refuse an official checkpoint whose classes have no names, as of Objects365; False: a training
            only begins from it, and no class of its own is one of them.

    Raises:
        CheckpointError: it cannot be used.
    """
    if advice := OTHERS.get(file.suffix.lower()):
        raise CheckpointError(f"{file}: {advice}")
    try:
        start = read_start(file, 15)
    except (OSError, UserFileError):  # the readers below say why
        start = b""
    if start.lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{file}: this is a web page, not a weights file. Download the file itself.")
    if file.suffix.lower() in PICKLES or start[:2] == b"PK":
        return from_official(read_official(file), str(file), names_required=names_required)[0]
    return load_weights(file)


def folder_for_results(file: Path) -> Path:
    """Return where an evaluation is written: beside the weights, or in the working directory for downloaded ones."""
    return Path(EVALUATION) if in_cache(file) else file.parent / EVALUATION


def score_thresholds(model: Detector, weights: Weights, threshold: float | None) -> list[float]:
    """Return the minimum raw score of each class: `threshold`, or that of the best F1 of the head that predicts.

    The F1 is that of the last validation. A head that it did not score, and weights without a validation (converted
    ones), get 0.3; a class without a true positive in validation gets 1.
    """
    stored = None if threshold is not None else stored_thresholds(model, weights)
    if not stored:
        return [DEFAULT_THRESHOLD if threshold is None else threshold] * len(weights.classes)
    return [stored.get(name, 1.0) for name in weights.classes]


def stored_thresholds(model: Detector, weights: Weights) -> dict[str, float] | None:
    """Return what the validation of the weights stored for the head that predicts; None if it did not score it."""
    extra = weights.extra
    by_head: dict[str, dict[str, float]] = extra.get("head_thresholds", {})
    # of a validation of one head, which is then not named, or of the best one
    scored = extra.get("predict_with", weights.config.get("eval", {}).get("predict_with", "auto"))
    alone = {model.heads[0] if scored == "auto" else scored: extra.get("thresholds")}
    return by_head.get(model.predict_with, alone.get(model.predict_with))
