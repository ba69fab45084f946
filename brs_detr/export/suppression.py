"""Non-maximum suppression inside an exported graph, where every tensor has as many rows as its neighbors need.

Eager code drops the boxes that are suppressed. A graph for batches of any number cannot: each image would keep another
number. So nothing is dropped here; candidates that take no part, or are suppressed, get the score `NOTHING`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import nms

NOTHING = -1.0
"""Score of an entry that is no detection; those of detections are in [0, 1]."""


@torch.library.custom_op("brs_detr::keep_best", mutates_args=())
def keep_best(boxes: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    """Find the boxes that suppression keeps; one node in ONNX, NonMaxSuppression.

    Args:
        boxes: (B, n, 4) xyxy.
        scores: (B, G, n) of each box in each group; in a group where it is negative, the box takes no part.
        nms_iou: of two boxes of a group that overlap more, the one with the higher score is kept.

    Returns:
        (B, G, n) bool.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for own_boxes, image, own_kept in zip(boxes, scores, kept, strict=True):
        for group, row in zip(image, own_kept, strict=True):
            index = (group >= 0).nonzero()[:, 0]
            row[index[nms(own_boxes[index], group[index], nms_iou)]] = True
    return kept


@keep_best.register_fake
def _(boxes: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch's exporter writes for the operators of this file."""
    import onnxscript

    op: Any = onnxscript.opset18

    def keep_best_in_onnx(boxes: Any, scores: Any, nms_iou: float) -> Any:
        count = op.Shape(boxes, start=1, end=2)  # the operator's own default is to select nothing
        selected = op.NonMaxSuppression(
            boxes, scores, count, op.Constant(value_floats=[nms_iou]), op.Constant(value_floats=[NOTHING / 2])
        )
        nowhere = op.Cast(op.Mul(scores, op.Constant(value_float=0.0)), to=9)  # BOOL
        there = op.Cast(op.ConstantOfShape(op.Shape(selected, start=0, end=1)), to=9)
        return op.ScatterND(nowhere, selected, op.Not(there))

    return {torch.ops.brs_detr.keep_best.default: keep_best_in_onnx}


def best_of_any_number(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return as `best_scores` does, but always `count` columns: where there are fewer, of score `NOTHING`."""
    columns = scores.shape[1]
    best, index = pad(scores, (0, count), value=NOTHING).topk(count, dim=1)
    return best, index.clamp(max=columns - 1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (B, ..., 4) xyxy to images of (B, 2) height and width."""
    limits = sizes.flip(1).repeat(1, 2).to(boxes.dtype)
    limits = limits.reshape(-1, *(1,) * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def suppress_within(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, nms_iou: float) -> Tensor:
    """Give the candidates that are suppressed the score `NOTHING`.

    Args:
        boxes: (B, n, 4) xyxy. scores: (B, n). groups: (B, n) int64, below `num_groups`.
        nms_iou: as for `keep_best`.
    """
    member = groups[:, None] == torch.arange(num_groups, device=groups.device)[:, None]
    of_group = torch.where(member, scores[:, None], NOTHING)
    return torch.where(keep_best(boxes, of_group, nms_iou).any(dim=1), scores, NOTHING)


def keep_in_order(boxes: Tensor, nms_iou: float) -> Tensor:
    """Return which boxes (B, n, 4) xyxy of each image, best first, overlap no better one by more: (B, n)."""
    falling = torch.arange(boxes.shape[1], 0, -1, device=boxes.device, dtype=boxes.dtype)
    return keep_best(boxes, falling.expand(boxes.shape[:2])[:, None], nms_iou)[:, 0]


def best_rows(scores: Tensor, count: int, *columns: Tensor) -> tuple[Tensor, ...]:
    """Choose the `count` best entries of each image.

    Args:
        scores: (B, n). columns: (B, n) or (B, n, 4) each.
        count: entries of an image; all n where there are fewer.

    Returns:
        Scores (B, count) descending, and the rows of the columns; those of no detection are 0.
    """
    best, index = scores.topk(min(count, scores.shape[1]), dim=1)
    chosen = []
    for column in columns:
        wide = column.dim() == 3
        rows = column.gather(1, index[..., None].expand(-1, -1, 4) if wide else index)
        chosen.append(rows.masked_fill((best < 0)[..., None] if wide else best < 0, 0))
    return best, *chosen
