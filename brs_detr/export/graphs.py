"""The path from pixels to the detections of one head, with the sizes of the images as a tensor instead of integers.

Each head's own methods compute its predictions; what `suppress` does with them, image by image, `suppression.py` does
for a batch of any number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from brs_detr.evaluation.calibration import Calibration
from brs_detr.export.suppression import (
    NOTHING,
    best_of_any_number,
    best_rows,
    clip,
    keep_best,
    keep_in_order,
    suppress_within,
)
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.config import HardNMS
from brs_detr.models.detector import Detector
from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.models.heads.pooling import map_of
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.one_stage import OneStageDetector
from brs_detr.models.rcnn import TwoStageDetector
from brs_detr.models.transformer.attention import use_sampling
from brs_detr.models.transformer.decoder import Predictions, best_pairs
from brs_detr.models.transformer.encoder import Memory
from brs_detr.models.transformer.two_stage import TwoStageHead
from brs_detr.ops.deform_attn_gather import gathered_attention
from brs_detr.ops.images import CANVAS_COLOR, padding_mask


class ExportError(ValueError):
    """A detector that cannot be exported with the given options; the message says what to change."""


def require_exportable(model: Detector) -> None:
    """Refuse a detector whose detections no graph of this file computes.

    Raises:
        ExportError: what it has that a graph has not.
    """
    if model.predict_with == "ensemble":
        raise ExportError(
            "eval.predict_with=ensemble: one head can be exported, not several. "
            f"Set eval.predict_with to auto, the best one in validation, or to one of {', '.join(model.heads)}."
        )
    if model.test_flip or model.test_scales:
        raise ExportError(
            "eval.test_scales and eval.test_flip: a graph has one view of an image, not several. "
            "Add eval.test_scales=[] eval.test_flip=false."
        )
    if isinstance(model, BRSDETR):
        return
    if isinstance(model, OneStageDetector):
        head = type(model.head)
        # a head with its own way to its detections: masks, score voting
        if isinstance(model.head, DenseHead) and head.predict is DenseHead.predict and head.detect is DenseHead.detect:
            return
    elif isinstance(model, TwoStageDetector) and isinstance(model.roi, RoIHead) and model.mask is None:
        return
    raise ExportError(
        "model.name: this detector cannot be exported, only brs_detr, co_detr, brs_dino, co_dino, retinanet, foveabox, "
        "atss and faster_rcnn can: masks, score voting and cascades have no graph."
    )


class CalibratedScores(nn.Module):
    """Piecewise linear maps, one for each label: the sum of the rises of their pieces, each as far as it is passed.

    A search of the piece would need operators that runtimes lack; the sum takes one clamp.

    Args:
        calibration: with K pieces in the longest map; shorter ones are filled up with pieces that rise by 0.
    """

    start: Tensor
    low: Tensor
    width: Tensor
    rise: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        pieces = max(len(curve.scores) for curve in calibration.curves) - 1
        tables = np.zeros((3, len(calibration.curves), pieces))
        tables[1] = 1.0  # the width of a piece that does not rise
        for number, curve in enumerate(calibration.curves):
            count = len(curve.scores) - 1
            tables[:, number, :count] = curve.scores[:-1], np.diff(curve.scores), np.diff(curve.precisions)
        start = np.array([curve.precisions[0] for curve in calibration.curves])
        of_label = list(calibration.of_label)
        for name, table in zip(("start", "low", "width", "rise"), (start, *tables), strict=True):
            self.register_buffer(name, torch.from_numpy(table[of_label]).float())

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Map raw scores (B, n) of detections with these labels (B, n); -1, no detection, stays."""
        passed = ((scores[..., None] - self.low[labels]) / self.width[labels]).clamp(0, 1)
        mapped = self.start[labels] + (passed * self.rise[labels]).sum(dim=-1)
        return torch.where(scores < 0, scores, mapped)


class DetectorGraph(nn.Module):
    """A detector whose image sizes are a tensor.

    Args:
        model: the detector; a copy of it is used, in eval mode and with sampling by Gathers.
        calibration: maps of the scores to precision; None keeps them raw.

    Raises:
        ExportError: see `require_exportable`.
    """

    def __init__(self, model: Detector, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.calibrated = None if calibration is None else CalibratedScores(calibration)
        require_exportable(model)
        # contiguous: a graph has no memory layouts, only steps that change them
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        use_sampling(self.model, gathered_attention)
        for module in self.model.modules():
            if isinstance(module, DenseHead):
                module.best = best_of_any_number
            elif isinstance(module, TwoStageHead):
                module.keep = keep_in_order
        self.eval()

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            pixels: (B, 3, H, W) RGB in 0..255, uint8 or float.
            sizes: (B, 2) int64 (height, width) of each image without its padding.

        Returns:
            boxes (B, n, 4) xyxy in pixels of the input, scores (B, n), labels (B, n), best raw score first; entries of
            score -1 are no detections. Also, of two-stage heads, what their second stage looks at: the indices (B, Q)
            of the proposals that the decoder begins with, or with `query_boxes=rpn` their boxes (B, Q, 4); or the
            proposals (B, m, 6) of the RoI head: box, score, level. Then, where scores are calibrated, the raw
            ones (B, n).
        """
        boxes, scores, labels, *rest = self.detect(pixels, sizes)
        if self.calibrated is None:
            return boxes, scores, labels, *rest
        return boxes, self.calibrated(scores, labels), labels, *rest, scores

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect objects with raw scores; arguments and the rest of the result as for `forward`."""
        model: Any = self.model
        height, width = pixels.shape[-2:]
        padding = padding_mask(sizes, height, width)
        if model.test_canvas is not None:  # what lies beside the image is a part of it, in gray
            pixels, padding = pixels.masked_fill(padding[:, None], CANVAS_COLOR), torch.zeros_like(padding)
            sizes = torch.ones_like(sizes) * torch.tensor([height, width], device=sizes.device)
        features = model.encode(model.normalize(pixels, padding), padding)
        if model.predict_with == "decoder":
            return decoder_detections(model, features, sizes)
        maps = model.pyramid(features) if isinstance(model, BRSDETR) else features
        if model.predict_with == "roi":
            return region_detections(model.rpn, model.roi, maps, sizes)
        head: Any = model.atss if isinstance(model, BRSDETR) else model.head
        return dense_detections(head, head(maps), sizes)[:3]


def decoder_detections(model: BRSDETR, memory: Memory, sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the detections of the decoder, and the indices or, with `query_boxes=rpn`, the boxes of its proposals."""
    proposals = model.proposals(memory)
    references, looked_at = proposals.references, proposals.chosen
    if model.query_boxes == "rpn":
        assert model.rpn is not None
        rois, objectness, *_ = dense_detections(model.rpn, model.rpn(model.pyramid(memory)), sizes)
        extents = sizes.flip(1).repeat(1, 2).to(rois.dtype)[:, None]
        regions = box_convert(rois, "xyxy", "cxcywh") / extents
        references = looked_at = model.proposals.with_regions(regions, objectness >= 0, references)
    layers = model.decode(memory, references)
    last = Predictions(layers.logits[-1], layers.boxes[-1])
    boxes, scores, labels = best_pairs(last, model.num_candidates)
    boxes = boxes * sizes.flip(1).repeat(1, 2).to(boxes.dtype)[:, None]
    if isinstance(model.nms, HardNMS):
        scores = suppress_within(boxes, scores, labels, model.num_classes, model.nms.iou)
        scores, boxes, labels = best_rows(scores, model.detections_per_image, boxes, labels)
    return boxes, scores, labels, looked_at


def dense_detections(head: DenseHead, output: DenseOutput, sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the detections of a dense head, as `DenseHead.predict` does, and their groups in suppression."""
    before_nms, max_detections = head.limits()
    found = head.candidates(output, before_nms)
    boxes = clip(found.boxes, sizes)
    kept = found.kept & (found.scores >= 0)
    if head.drop_empty:
        kept = kept & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    scores = torch.where(kept, found.scores, NOTHING)
    num_groups = head.num_classes if head.nms_within == "class" else len(head.strides)
    scores = suppress_within(boxes, scores, found.groups, num_groups, head.nms_iou)
    scores, boxes, labels, groups = best_rows(scores, max_detections, boxes, found.labels, found.groups)
    return boxes, scores, labels, groups


def region_detections(rpn: RPNHead, roi: RoIHead, maps: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the detections of a RoI head, as `RoIHead.predict` does, and the proposals (B, m, 6) it looked at."""
    rois, objectness, _, level = dense_detections(rpn, rpn(maps), sizes)
    classes, count = roi.num_classes, rois.shape[1]
    logits, deltas = roi.classify(pool(roi, maps, rois))
    scores = roi.scores(logits).unflatten(0, (-1, count))
    boxes = roi.coder.decode(rois.flatten(0, 1)[:, None], deltas).expand(-1, classes, 4).unflatten(0, (-1, count))
    boxes = clip(boxes, sizes)
    kept = (scores > roi.score_threshold) & (objectness >= 0)[..., None]
    # every class has boxes of its own: (B, m, C, ...) -> (B, C, m, ...)
    scores, boxes = torch.where(kept, scores, NOTHING).transpose(1, 2), boxes.transpose(1, 2)
    best = keep_best(boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], roi.nms_iou)
    scores = torch.where(best.unflatten(0, (-1, classes))[:, :, 0], scores, NOTHING)
    labels = torch.arange(classes, device=scores.device)[:, None].expand_as(scores)
    columns = boxes.flatten(1, 2), labels.flatten(1, 2)
    scores, boxes, labels = best_rows(scores.flatten(1, 2), roi.max_detections, *columns)
    return boxes, scores, labels, torch.cat([rois, objectness[..., None], level[..., None].to(rois.dtype)], dim=-1)


def pool(roi: RoIHead, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Pool RoIs (B, m, 4), each on the map of its size: (B * m, dim, side, side)."""
    batch, count = rois.shape[:2]
    image = torch.arange(batch, device=rois.device)[:, None].expand(-1, count).flatten()
    boxes = rois.flatten(0, 1)
    level = map_of(boxes, roi.strides)
    pooled = []
    for index, (x, stride) in enumerate(zip(maps, roi.strides)):
        # RoIs of other maps become empty: pooling one reads no cell and returns zeros
        own = torch.where((level == index)[:, None], boxes, 0.0)
        regions = torch.cat([image[:, None].to(own.dtype), own], dim=1)
        scale = 1 / stride
        pooled.append(roi_align(x.float(), regions, roi.pool, spatial_scale=scale, sampling_ratio=0, aligned=True))
    return torch.stack(pooled).sum(dim=0)
