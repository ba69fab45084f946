"""Write the detector as a file of torch.export: the same graph as the ONNX file, loaded with torch and torchvision.

Suppression is a custom operator while the detector is traced, which other programs do not have; here it becomes one
call of torchvision's `nms` for all images and groups, so that loading the file does not need this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brs_detr.evaluation.calibration import Calibration
from brs_detr.export.graphs import DetectorGraph, ExportError
from brs_detr.export.onnx import OUTPUTS, PROPOSALS, RAW_SCORES, TWO_STAGE, description, quiet, trace
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch, Size

METADATA, DESCRIPTION_FILE = "metadata.json", "description.txt"  # extra files of the archive


def write_torch(
    model: Detector,
    path: Path,
    size: Size,
    *,
    any_size: bool = False,
    pixels: torch.dtype = torch.uint8,
    metadata: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a detector as a `.pt2` file; arguments and errors as for `write_onnx`.

    The program returns boxes, scores, labels, and then the values of `inner_outputs`.
    """
    graph = DetectorGraph(model, calibration).requires_grad_(False)
    program = trace(graph, size, any_size=any_size, pixels=pixels)
    try:
        with torch.no_grad(), quiet():
            program = program.run_decompositions({torch.ops.brs_detr.keep_best.default: keep_best_by_torchvision})
            extra = {METADATA: json.dumps(dict(metadata or {})), DESCRIPTION_FILE: description(model)}
            with path.open("wb") as file:  # a path would have to end in .pt2
                torch.export.save(program, file, extra_files=extra)
    except Exception as error:  # as in `trace`
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__}: cannot save this detector ({reason}). Use --format onnx."
        ) from error


def inner_outputs(model: Detector, calibration: Calibration | None) -> list[str]:
    """Return the names of what a detector's graph returns after its `OUTPUTS`."""
    inside = [PROPOSALS] if model.predict_with in TWO_STAGE else []
    return inside + ([RAW_SCORES] if calibration is not None else [])


def keep_best_by_torchvision(boxes: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    """Return what `suppression.keep_best` returns, from one suppression of all images and groups.

    Each group is moved away from the others, so that only boxes of one group overlap; in float64, which holds the
    coordinates of thousands of groups to a millionth of a pixel.
    """
    images, groups, count = scores.shape
    rows = boxes[:, None].expand(-1, groups, -1, -1).double()
    number = torch.arange(images * groups, device=boxes.device, dtype=torch.float64).view(images, groups, 1, 1)
    apart = (rows + number * (rows.amax() - rows.amin() + 1)).reshape(-1, 4)
    flat = scores.reshape(-1)
    index = (flat >= 0).nonzero()[:, 0]
    selected = torch.ops.torchvision.nms(apart[index], flat[index].double(), nms_iou)
    kept = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, index[selected], True)
    return kept.view(images, groups, count)


class TorchFile:
    """A file of `write_torch` on the CPU.

    Args:
        path: of the file.
        inside: names of what it returns after `OUTPUTS`.
    """

    def __init__(self, path: Path, inside: list[str]) -> None:
        with path.open("rb") as file:
            self.program = torch.export.load(file).module()
        self.names = [*OUTPUTS, *inside]

    @torch.no_grad()
    def __call__(self, images: ImageBatch) -> dict[str, Tensor]:
        """Run a batch, as `parity.ExportedDetector` does."""
        return dict(zip(self.names, self.program(images.pixels, torch.tensor(images.sizes)), strict=True))
