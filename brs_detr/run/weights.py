"""Find and read the weights that a user names: of this project, or an official checkpoint, converted in memory."""

from __future__ import annotations

import os
from pathlib import Path

from brs_detr.checkpoints.official import from_official
from brs_detr.engine.checkpoint import CheckpointError, Weights, find_weights, load_weights
from brs_detr.hub.sources import in_cache, local_path
from brs_detr.models.backbones.weights_io import read_official
from brs_detr.user_files import read_start

EVALUATION = "evaluation"  # folder of an evaluation in that of a run
PICKLES = (".pth", ".pt", ".pkl", ".bin")
OTHERS = {
    ".json": "this is a json, not a weights file. Give a run folder, a .safetensors or an official .pth.",
    ".yaml": "this is a recipe, not a weights file. Give a run folder, a .safetensors or an official .pth.",
    ".onnx": "this is an exported file, not a weights file. Give the weights that it was made from.",
}
"""What the user has probably mixed up, by the ending of a file."""


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the weights file of a run folder, of a name that is downloaded at its first use, or the file itself.

    Raises:
        CheckpointError: there is no such file.
        SourceError: it is no name of weights either.
        DownloadError: they cannot be downloaded.
    """
    return find_weights(local_path(source))


def read(file: Path) -> Weights:
    """Read a weights file, or an official Co-DETR or BRS-DETR checkpoint (`.pth`), of which nothing is executed.

    Raises:
        CheckpointError: it cannot be used.
    """
    if advice := OTHERS.get(file.suffix.lower()):
        raise CheckpointError(f"{file}: {advice}")
    if file.suffix.lower() in PICKLES or read_start(file, 2) == b"PK":
        return from_official(read_official(file), str(file))[0]
    return load_weights(file)


def folder_for_results(file: Path) -> Path:
    """Return where an evaluation is written: beside the weights, or in the working directory for downloaded ones."""
    return Path(EVALUATION) if in_cache(file) else file.parent / EVALUATION
