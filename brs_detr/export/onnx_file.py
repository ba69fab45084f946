"""A file of `export` in onnxruntime as a detector: images in, detections of the stored images out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brs_detr.export.graphs import ExportError
from brs_detr.export.onnx import RAW_SCORES
from brs_detr.ops.images import ImageBatch, Size

NEEDED = ("classes", "category_ids", "head", "size", "short_side", "long_side", "antialias")
PIXEL_TYPES = {"tensor(uint8)": torch.uint8, "tensor(float)": torch.float32}


class OnnxDetector(nn.Module):
    """An exported detector; it is called as a `Detector` is in eval mode.

    Args:
        path: ONNX file of `export`.
        raw_scores: return the scores from before the calibration, which are inside the file; needs onnx.
        providers: of onnxruntime; by default the CPU's.
        threads: that one operation may use; by default torch's number.

    Attributes:
        facts: the file's metadata.
        canvas: (H, W) of the input; None if it is free.

    Raises:
        ExportError: onnxruntime is missing or cannot read the file, or it is not a file of `export`.
    """

    def __init__(
        self, path: Path, *, raw_scores: bool = False, providers: list[str] | None = None, threads: int = 0
    ) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise ExportError(f"{path}: needs onnxruntime. Install with: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors; narrowed graphs give warnings about their casts
        try:
            self.session = onnxruntime.InferenceSession(
                with_raw_scores(path) if raw_scores else str(path),
                options,
                providers=providers or ["CPUExecutionProvider"],
            )
        except Exception as error:  # onnxruntime has a type for each of its status codes
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"{path}: onnxruntime cannot read this file ({reason}). Export it again.") from None
        self.facts = read_facts(path, self.session.get_modelmeta().custom_metadata_map)
        outputs = [output.name for output in self.session.get_outputs()]
        self.outputs = ["boxes", RAW_SCORES if RAW_SCORES in outputs else "scores", "labels"]
        self.pixel_type = PIXEL_TYPES[self.session.get_inputs()[0].type]
        self.canvas: Size | None = tuple(self.facts["size"]) if self.facts["size"] else None  # type: ignore[assignment]

    def forward(self, images: ImageBatch, targets: None = None) -> list[dict[str, Tensor]]:
        """Return the detections of each image in the frame of the stored image, as `Detector.predict` does."""
        boxes, scores, labels = self.run(images)
        found = []
        for row, ((height, width), (full_height, full_width)) in enumerate(zip(images.sizes, images.original_sizes)):
            kept = (scores[row] >= 0).nonzero()[:, 0]
            factor = torch.tensor([full_width / width, full_height / height] * 2)
            found.append({"boxes": boxes[row][kept] * factor, "scores": scores[row][kept], "labels": labels[row][kept]})
        return found

    def run(self, images: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (B, n, 4), scores and labels (B, n) as the file has them."""
        pixels = images.pixels.cpu().to(self.pixel_type)
        if self.canvas is not None and self.canvas != images.padded_size:
            larger = pixels.new_zeros(*pixels.shape[:2], *self.canvas)
            larger[:, :, : pixels.shape[2], : pixels.shape[3]] = pixels
            pixels = larger
        inputs = {"pixels": pixels.numpy(), "sizes": np.asarray(images.sizes, np.int64)}
        boxes, scores, labels = map(torch.from_numpy, self.session.run(self.outputs, inputs))
        return boxes, scores, labels

    def input_size(self, size: Size) -> Size:
        """Return (h, w) to which an image of (h, w) is resized for this file."""
        short, long = self.facts["short_side"], self.facts["long_side"]
        factor = min(long / max(size), short / min(size))
        if self.canvas is not None:
            factor = min(factor, self.canvas[0] / size[0], self.canvas[1] / size[1])
        height, width = (max(1, math.floor(side * factor + 0.5)) for side in size)
        return height, width


def with_raw_scores(path: Path) -> bytes:
    """Return the content of a file with its raw scores as an output too, if it has any.

    Raises:
        ExportError: onnx is missing.
    """
    try:
        import onnx
    except ImportError:
        raise ExportError(f"{path}: needs onnx to read its raw scores. Install with: pip install onnx") from None
    model = onnx.load(path)
    if any(RAW_SCORES in node.output for node in model.graph.node):
        model.graph.output.add().CopyFrom(onnx.ValueInfoProto(name=RAW_SCORES))
    content: bytes = model.SerializeToString()
    return content


def read_facts(path: Path, entries: dict[str, str]) -> dict[str, Any]:
    """Parse the metadata of a file.

    Raises:
        ExportError: it lacks an entry, or one is damaged.
    """
    try:
        facts = {name: json.loads(text) for name, text in entries.items()}
    except ValueError:
        facts = {}
    if missing := [name for name in NEEDED if name not in facts]:
        raise ExportError(
            f"{path}: is not a file of `brs-detr export`: its metadata lacks {', '.join(missing)}. Export the detector."
        )
    return facts
