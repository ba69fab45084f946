"""Run an exported file on images: onnxruntime, and the file's own metadata. Needs no weights file and no onnx."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brs_detr.evaluation.calibration import NEVER, Calibration
from brs_detr.export.graphs import ExportError
from brs_detr.export.onnx import RAW_SCORES
from brs_detr.ops.images import ImageBatch, Size, pad_to

METADATA = (
    "classes",
    "category_ids",
    "head",
    "thresholds",
    "calibration",
    "size",
    "short_side",
    "long_side",
    "antialias",
)


class ExportedFile:
    """A file of `brs-detr export` as a detector of the stored images.

    Args:
        path: of the file.
        device: "cpu", or "cuda" or "cuda:1" where onnxruntime has it; None: a GPU if this onnxruntime has one.
        threads: that one operation may use; 0: torch's number.

    Attributes:
        metadata: all of it; the most used entries are attributes of their own.
        classes, category_ids: of label 0, 1, ...
        head: the one that was exported.
        precision: fp32, fp16 or int8.
        size: (H, W) of the input; None: images may have any size.
        short_side, long_side: limits of an image's sides before it is padded.
        antialias: how it is resized.
        has_canvas: the detector sees what lies beside the image as a part of it.
        calibration: the maps in the graph; None: scores are raw.

    Raises:
        ExportError: onnxruntime is not installed, has no such device, or the file is not one of `brs-detr export`.
    """

    def __init__(self, path: Path, device: str | None = None, threads: int = 0) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ExportError(f"{path}: needs the package onnxruntime. Install it with: pip install onnxruntime")
        self.path, self.providers, self.threads = path, _providers(device), threads
        self.session = open_session(path, providers=self.providers, threads=threads)
        self._raw_session: Any = None
        self.metadata = metadata = self._read_metadata()
        self.classes: list[str] = metadata["classes"]
        self.category_ids: list[int] = metadata["category_ids"]
        self.head, self.precision = str(metadata["head"]), str(metadata.get("precision", "fp32"))
        self.size: Size | None = (
            None if metadata["size"] is None else (int(metadata["size"][0]), int(metadata["size"][1]))
        )
        self.short_side, self.long_side = int(metadata["short_side"]), int(metadata["long_side"])
        self.antialias = bool(metadata["antialias"])
        self._thresholds = [float(value) for value in metadata["thresholds"]]
        self.has_canvas = metadata.get("canvas") is not None  # files of before there were canvases have no such entry
        stored = metadata["calibration"]
        try:
            self.calibration = None if stored is None else Calibration.from_dict(stored, len(self.classes))
        except ValueError as error:
            raise ExportError(f"{path}: {error}. Export it again.") from None
        self.dtype = np.uint8 if self.session.get_inputs()[0].type == "tensor(uint8)" else np.float32

    def thresholds(self, raw_scores: bool = False) -> np.ndarray:
        """Return the minimum score (K,) of each class, calibrated as the file's scores are, or raw."""
        values = np.array(self._thresholds)
        if self.calibration is None or not raw_scores:
            return values
        curves = [self.calibration.curves[number] for number in self.calibration.of_label]
        raw = [np.interp(value, curve.precisions, curve.scores) for value, curve in zip(values, curves, strict=True)]
        return np.where(values >= NEVER, NEVER, raw)

    def __call__(self, batch: ImageBatch, raw_scores: bool = False) -> list[dict[str, Any]]:
        """Detect objects in a batch; returns for each image `boxes` in pixels of the stored image, `scores`, `labels`.

        Args:
            batch: of images that fit into the file's input.
            raw_scores: scores as the detector's, where the file's are calibrated.
        """
        results = []
        for boxes, scores, labels, (h, w), (full_h, full_w) in zip(
            *self.run(batch, raw_scores), batch.sizes, batch.original_sizes, strict=True
        ):
            found = scores >= 0  # -1 fills up an image with fewer detections
            scale = np.array([full_w / w, full_h / h] * 2, np.float32)
            own = boxes[found] * scale
            if self.has_canvas:  # the file has boxes beside the image, too
                own = own.clip(0, np.array([full_w, full_h] * 2, np.float32))
            columns = {"boxes": own, "scores": scores[found], "labels": labels[found]}
            results.append({name: torch.from_numpy(value) for name, value in columns.items()})
        return results

    def run(self, batch: ImageBatch, raw_scores: bool = False) -> list[np.ndarray]:
        """Return boxes (B, n, 4) in pixels of the input, scores (B, n) and labels (B, n) as the file has them."""
        pixels = pad_to(batch.pixels.cpu(), self.size or batch.padded_size).numpy().astype(self.dtype, copy=False)
        inputs = {"pixels": pixels, "sizes": np.array(batch.sizes, np.int64)}
        if raw_scores and self.calibration is not None:
            outputs: list[np.ndarray] = self.open_raw_scores().run(["boxes", RAW_SCORES, "labels"], inputs)
        else:
            outputs = self.session.run(["boxes", "scores", "labels"], inputs)
        return outputs

    def open_raw_scores(self) -> Any:
        """Open a calibrated file a second time, with the scores before the calibration as an output.

        Raises:
            ExportError: onnx is not installed, or the file has no raw scores.
        """
        if self._raw_session is None:
            session = open_session(self.path, [RAW_SCORES], providers=self.providers, threads=self.threads)
            if RAW_SCORES not in [output.name for output in session.get_outputs()]:
                raise ExportError(f"{self.path}: has no raw scores. Export the weights again.")
            self._raw_session = session
        return self._raw_session

    def _read_metadata(self) -> dict[str, Any]:
        stored = self.session.get_modelmeta().custom_metadata_map
        try:
            metadata: dict[str, Any] = {name: json.loads(text) for name, text in stored.items()}
            if any(name not in metadata for name in METADATA):
                raise KeyError
            count = len(metadata["classes"])
            if not len(metadata["category_ids"]) == len(metadata["thresholds"]) == count > 0:
                raise ValueError
        except (KeyError, ValueError, TypeError, RecursionError):
            raise ExportError(
                f"{self.path}: lacks the metadata that `brs-detr export` writes (classes, thresholds, image size). "
                "Export the weights again."
            ) from None
        return metadata


def open_session(
    path: Path,
    extra_outputs: Sequence[str] = (),
    *,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    threads: int = 0,
) -> Any:
    """Open an ONNX file in onnxruntime.

    Args:
        path: of the file.
        extra_outputs: names of values inside the graph that become outputs; those that it lacks are left out.
        providers: onnxruntime's names of the devices.
        threads: that one operation may use; 0: torch's number.

    Raises:
        ExportError: onnxruntime cannot open the file, or further outputs are wanted and onnx is not installed.
    """
    import onnxruntime

    model = _with_outputs(path, extra_outputs) if extra_outputs else str(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own types, one per cause
        reason = " ".join(str(error).split())[:160]
        raise ExportError(f"{path}: onnxruntime cannot open it ({reason}). Export the weights again.") from None


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """Return an ONNX file whose outputs are also those of `names` that its graph computes."""
    try:
        import onnx
    except ImportError:
        what = ", ".join(names)
        raise ExportError(
            f"{path}: the outputs {what} need the package onnx. Install it with: pip install onnx"
        ) from None
    model = onnx.load(path)
    computed = {output for node in model.graph.node for output in node.output}
    for name in names:
        if name in computed:
            model.graph.output.add().CopyFrom(onnx.ValueInfoProto(name=name))
    content: bytes = model.SerializeToString()
    return content


def _providers(device: str | None) -> list[Any]:
    """Return onnxruntime's names of a device and of the CPU.

    Raises:
        ExportError: this onnxruntime lacks the device.
    """
    import onnxruntime

    known, cuda = onnxruntime.get_available_providers(), "CUDAExecutionProvider"
    if device in (None, "cpu"):
        return [*([cuda] if device is None and cuda in known else []), "CPUExecutionProvider"]
    kind, _, number = str(device).partition(":")
    if kind == "cuda" and cuda in known and (not number or number.isdecimal()):
        return [(cuda, {"device_id": number or "0"}), "CPUExecutionProvider"]
    raise ExportError(f"device={device}: this onnxruntime has {', '.join(known)}. Leave it out, or write cpu.")
