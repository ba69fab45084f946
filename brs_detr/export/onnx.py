"""Write the detector as an ONNX file: one graph from pixels to detections.

Only the path of one head's detections is exported (`graphs.py`). Deformable attention samples with plain Gathers
(`ops/deform_attn_gather.py`), since GridSample is missing or wrong in some runtimes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from brs_detr.evaluation.calibration import Calibration
from brs_detr.export.graphs import DetectorGraph, ExportError
from brs_detr.export.suppression import translations
from brs_detr.models.backbones.deformable import DeformableConv
from brs_detr.models.backbones.swin import SwinBackbone
from brs_detr.models.backbones.vit import ViTBackbone
from brs_detr.models.config import SoftNMS
from brs_detr.models.detector import Detector
from brs_detr.models.heads.dense import DenseHead
from brs_detr.ops.images import Size

DESCRIPTION = """\
Object detector.
pixels (batch, 3, height, width): RGB, 0..255, each image resized with its aspect ratio kept (to short_side and
long_side in the metadata) and padded at the right and at the bottom, with any values.
sizes (batch, 2): height and width of each image without its padding.
boxes (batch, n, 4): x1, y1, x2, y2 in pixels of the input; divide by the resizing factor.
scores (batch, n), of each class descending, and labels (batch, n), indices into classes and category_ids in the
metadata. Where the metadata has a calibration, a score is the precision at IoU 0.5 of such detections.
An entry of score -1 is no detection: an image may have fewer than n. Non-maximum suppression is not needed after this
graph. Detections below their label's entry of thresholds are rarely correct."""
WITHOUT_SOFT_NMS = """
These are the detections before Soft-NMS, which runtimes lack: afterwards, a detection of a class that overlaps a better
one by {iou:g} or more has its score multiplied by 1 - overlap, and is dropped below a score of {min_score:g} (soft_nms
in the metadata). Published and validated figures are those with it."""

OUTPUTS = ("boxes", "scores", "labels")
PROPOSALS = "proposals"
"""Name of the value inside the graph that the second stage of a two-stage head looks at (see `DetectorGraph`)."""
RAW_SCORES = "raw_scores"
"""Name of the value inside the graph that calibrated scores are computed from; its order is that of the outputs."""
TWO_STAGE = ("decoder", "roi")  # heads that have one
MIN_OPSET = 18  # the oldest that torch's dynamo-based exporter writes


def write_onnx(
    model: Detector,
    path: Path,
    size: Size,
    *,
    any_size: bool = False,
    opset: int = MIN_OPSET,
    pixels: torch.dtype = torch.uint8,
    metadata: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a detector as an ONNX file with inputs `pixels`, `sizes` and outputs `boxes`, `scores`, `labels`.

    Args:
        model: the detector, on the CPU.
        path: file to write.
        size: (H, W) of the input; with `any_size` of the example that is traced.
        any_size: make height and width dynamic; the batch size always is.
        opset: ONNX opset version.
        pixels: dtype of the input, torch.uint8 or torch.float32.
        metadata: entries to store in the file, each as JSON.
        calibration: maps of the scores to precision, applied in the graph; None keeps them raw.

    Raises:
        ExportError: the detector has no graph, torch cannot trace it, or cannot write it in that opset.
    """
    if opset < MIN_OPSET:
        raise ExportError(f"--opset={opset}: torch's exporter writes opset {MIN_OPSET} and newer.")
    # torch's exporter would write DeformConv, which came with opset 19, into a file of opset 18
    if opset < 19 and any(isinstance(module, DeformableConv) for module in model.modules()):
        raise ExportError(f"--opset={opset}: has no deformable convolutions. Give --opset 19 or a newer one.")
    graph, inside = DetectorGraph(model, calibration), [PROPOSALS] if model.predict_with in TWO_STAGE else []
    inside += [RAW_SCORES] if calibration is not None else []
    names = {"pixels": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}}
    if any_size:  # a map with one cell a side would be written as one of that size
        strides = [stride for head in graph.modules() if isinstance(head, DenseHead) for stride in head.strides]
        size = max(size[0], 2 * max(strides)), max(size[1], 2 * max(strides))
    program = trace(graph, size, any_size=any_size, pixels=pixels)
    try:
        with torch.no_grad(), quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["pixels", "sizes"],
                output_names=[*OUTPUTS, *inside],
                custom_translation_table=translations(),
                dynamic_shapes=names,
                verbose=False,
            )
    except Exception as error:  # the exporter raises a dozen types
        raise _refusal(error, any_size) from error
    if written is None:
        raise ExportError(f"torch {torch.__version__}: its exporter returned no program. Try another version of torch.")
    # the exporter falls back to another opset with no more than a log line
    if (actual := written.model.opset_imports[""]) != opset:
        raise ExportError(
            f"--opset={opset}: torch {torch.__version__} could only write opset {actual}. Leave out --opset."
        )
    del written.model.graph.outputs[len(OUTPUTS) :]  # what is inside keeps its name, by which `parity.py` reads it
    for node in written.model.graph:
        node.metadata_props.clear()  # stack traces with paths of this machine
    written.model.doc_string = description(model)
    written.model.metadata_props.update({key: json.dumps(value) for key, value in (metadata or {}).items()})
    written.save(path, external_data=False)


def description(model: Detector) -> str:
    """Return what the inputs and outputs of a detector's graph are, and what of its detections is not in it."""
    left_out = soft_nms_of(model)
    return DESCRIPTION if left_out is None else DESCRIPTION + WITHOUT_SOFT_NMS.format(**left_out)


def soft_nms_of(model: Detector) -> dict[str, float] | None:
    """Return IoU and minimum score of the Soft-NMS that a detector's head applies and its graph does not, or None."""
    if not isinstance(model.nms, SoftNMS) or model.predict_with not in model.overlapping:
        return None
    return {"iou": model.nms.iou, "min_score": model.nms.min_score}


def trace(graph: DetectorGraph, size: Size, *, any_size: bool, pixels: torch.dtype) -> torch.export.ExportedProgram:
    """Trace a detector's graph for batches of any number; arguments and errors as for `write_onnx`."""
    if any_size and isinstance(graph.model.backbone, SwinBackbone | ViTBackbone):
        raise ExportError(
            "--any-size: a Swin or EVA-02 divides its maps into windows, which fixes the size of the graph. "
            "Give --height and --width instead."
        )
    # two images: torch.export specializes on dimensions of size 1
    example = torch.zeros(2, 3, *size, dtype=pixels), torch.tensor([size, size])
    batch, dynamic = Dim("batch"), {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {}
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                graph,
                example,
                dynamic_shapes={"pixels": {0: batch, **dynamic}, "sizes": {0: batch}},
                strict=False,
            )
    except Exception as error:  # the exporter raises a dozen types
        raise _refusal(error, any_size) from error


def _refusal(error: Exception, any_size: bool) -> ExportError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    advice = "Give --height and --width instead of --any-size" if any_size else "Try another --height and --width"
    return ExportError(
        f"torch {torch.__version__}: cannot export this detector ({reason}). {advice}, or newer onnx and onnxscript."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings about their own optimizations; errors are still shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
