"""The detector as one graph of tensors, from pixels to detections, written as an ONNX file.

Only the path of the decoder's detections goes into the file: backbone, neck, encoder, proposals, decoder. Deformable
attention reads its samples by plain Gathers (`ops/deform_attn_gather.py`), since GridSample is missing or wrong in some
runtimes.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from brs_detr.models.backbones.swin import SwinBackbone
from brs_detr.models.brs_detr import BRSDETR, best_pairs
from brs_detr.models.transformer.attention import use_sampling
from brs_detr.models.transformer.decoder import Predictions
from brs_detr.ops.deform_attn_gather import gathered_sampling
from brs_detr.ops.images import Size

DESCRIPTION = """\
Object detector.
pixels (batch, 3, height, width): RGB, 0..255, each image resized with its aspect ratio kept (short_side and long_side
in the metadata say how large) and padded at the right and at the bottom, with anything.
sizes (batch, 2): height and width of each image without its padding.
boxes (batch, n, 4): x1, y1, x2, y2 in pixels of the input; divide by the factor of the resizing.
scores (batch, n), descending; labels (batch, n), rows of classes and category_ids in the metadata.
No suppression of overlapping boxes is needed. A label's detections below its entry of thresholds are rarely right."""


OLDEST_OPSET = 18


class ExportError(ValueError):
    """A detector that cannot be exported as asked; the message says what to change."""


class DetectorGraph(nn.Module):
    """A detector's decoder path with the images' sizes as a tensor instead of host integers.

    Args:
        model: copied; the copy is put in eval mode and reads its samples by Gathers.
    """

    def __init__(self, model: BRSDETR) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        use_sampling(self.model, gathered_sampling)
        self.eval()

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            pixels: (B, 3, H, W) RGB in 0..255, uint8 or float.
            sizes: (B, 2) int64 (height, width) of each image inside its padding.

        Returns:
            boxes (B, n, 4) xyxy in pixels of the input, scores (B, n), labels (B, n), best first.
        """
        model = self.model
        height, width = pixels.shape[-2:]
        below = torch.arange(height, device=sizes.device) >= sizes[:, :1]
        beside = torch.arange(width, device=sizes.device) >= sizes[:, 1:]
        padding = below[:, :, None] | beside[:, None, :]
        memory = model.encode(model.normalize(pixels, padding), padding)
        layers = model.decode(memory, model.proposals(memory).references)
        last = Predictions(layers.logits[-1], layers.boxes[-1])
        boxes, scores, labels = best_pairs(last, model.detections_per_image)
        extents = sizes.flip(1).repeat(1, 2).to(boxes.dtype)
        return boxes * extents[:, None], scores, labels


def write_onnx(
    model: BRSDETR,
    path: Path,
    size: Size,
    *,
    any_size: bool = False,
    opset: int = OLDEST_OPSET,
    pixels: torch.dtype = torch.uint8,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a detector as one ONNX file with inputs `pixels`, `sizes` and outputs `boxes`, `scores`, `labels`.

    Args:
        model: on the CPU.
        path: file to write.
        size: (H, W) of the input; under `any_size` of the example that is traced.
        any_size: height and width are free; the number of images always is.
        opset: version of ONNX's operators.
        pixels: torch.uint8 or torch.float32, the type of the input.
        metadata: facts to store in the file, each as JSON.

    Raises:
        ExportError: torch cannot follow the model, or cannot write it in that opset.
    """
    if opset < OLDEST_OPSET:
        raise ExportError(f"--opset={opset}: torch's exporter writes opset {OLDEST_OPSET} and newer ones")
    if any_size and isinstance(model.backbone, SwinBackbone):
        raise ExportError(
            "--any-size: a Swin backbone cuts its maps into windows, which ties the graph to one size; "
            "give --height and --width instead"
        )
    example = torch.zeros(2, 3, *size, dtype=pixels), torch.tensor([size, size])
    batch, free = Dim("batch"), {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {}
    names = {"pixels": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}}
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                DetectorGraph(model),
                example,
                dynamic_shapes={"pixels": {0: batch, **free}, "sizes": {0: batch}},
                strict=False,
            )
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["pixels", "sizes"],
                output_names=["boxes", "scores", "labels"],
                dynamic_shapes=names,
                verbose=False,
            )
    except Exception as error:  # the exporters raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        mend = "give --height and --width instead of --any-size" if any_size else "try another --height and --width"
        raise ExportError(
            f"torch {torch.__version__} cannot export this detector ({reason}); {mend}, or newer onnx and onnxscript"
        ) from error
    if (got := written.model.opset_imports[""]) != opset:
        raise ExportError(f"--opset={opset}: torch {torch.__version__} could only write opset {got}; leave out --opset")
    for node in written.model.graph:
        node.metadata_props.clear()  # stack traces with this machine's paths
    written.model.doc_string = DESCRIPTION
    written.model.metadata_props.update({key: json.dumps(value) for key, value in (metadata or {}).items()})
    written.save(path, external_data=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' remarks about their own optimizations from the terminal; errors still pass."""
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
