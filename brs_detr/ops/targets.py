"""Checks of the targets, and the ground truth of a batch in one list, with each image's span kept on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from brs_detr.exit_codes import Failure
from brs_detr.ops.images import Size


class TargetError(Failure, ValueError):
    """Ground truth that no detector can learn; the message names the image and the value."""


def check_targets(targets: Sequence[dict[str, Any]], num_classes: int) -> None:
    """Raise if targets would train the wrong class or give a meaningless loss.

    Shapes and types are always checked. Values are checked on a CPU, where reading them costs nothing, so check before
    the targets are sent to a GPU: there one device-side assertion covers all values and cannot name one.

    Args:
        targets: one dict per image, `boxes` (n, 4) xyxy pixels, `labels` (n,) in 0..K-1, and if known `image_id`.
        num_classes: K.

    Raises:
        TargetError: shapes differ, labels are not int64 or out of range, a box is not finite or its corners are
            swapped. A box of area 0 is allowed.
    """
    for position, target in enumerate(targets):
        where = f"image {int(target['image_id'])}" if "image_id" in target else f"the batch's image {position}"
        boxes, labels = target["boxes"], target["labels"]
        if labels.dtype != torch.int64 or labels.ndim != 1:
            shape = tuple(labels.shape)
            raise TargetError(f"labels of {where}: {labels.dtype} of shape {shape}. Give one torch.int64 per box.")
        if not boxes.is_floating_point() or boxes.shape != (len(labels), 4):
            shape = tuple(boxes.shape)
            raise TargetError(
                f"boxes of {where}: {boxes.dtype} of shape {shape}. Give a float ({len(labels)}, 4), one per label."
            )
        if labels.device.type == "cpu" and boxes.device.type == "cpu":
            _check_values(where, boxes, labels, num_classes)
    if any(target["labels"].device.type == "cuda" for target in targets):  # one assertion for the batch
        labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        valid = _valid_labels(labels, num_classes).all() & _valid_boxes(boxes).all()
        torch._assert_async(valid, "brs_detr: a label is out of range, or a box is not finite or has swapped corners")


def _valid_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return (n,) bool."""
    return (labels >= 0) & (labels < num_classes)


def _valid_boxes(boxes: Tensor) -> Tensor:
    """Return (n,) bool; a NaN compares as False."""
    return (boxes[:, 2:] >= boxes[:, :2]).all(1) & boxes.isfinite().all(1)


def _check_values(where: str, boxes: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise a `TargetError` that names the first invalid label or box of an image."""
    if not (valid := _valid_labels(labels, num_classes)).all():
        value = int(labels[~valid][0])
        raise TargetError(
            f"label of {where}: {value} is out of range for {num_classes} classes. Number the classes from 0 to "
            f"{num_classes - 1}, without background."
        )
    if not (valid := _valid_boxes(boxes)).all():
        box = [round(value, 2) for value in boxes[~valid][0].tolist()]
        raise TargetError(
            f"box of {where}: {box} is not finite or has x2 < x1 or y2 < y1. Give corners (x1, y1, x2, y2) in pixels."
        )


def pixel_scales(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Convert (h, w) of each image to (B, 4) float32 (w, h, w, h), which scales normalized boxes to pixels."""
    return torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32).to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedTargets:
    """The ground truth of a batch.

    Attributes:
        labels: (G,) int64.
        boxes: (G, 4) float32 cxcywh in [0, 1] of the object's own image (not of the padded batch).
        scales: (G, 4) float32 (w, h, w, h) in pixels of the object's image.
        images: (G,) int64, the object's image.
        spans: first and one-past-last object of each image, host integers.
    """

    labels: Tensor
    boxes: Tensor
    scales: Tensor
    images: Tensor
    spans: list[tuple[int, int]]

    @classmethod
    def pack(cls, targets: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> PackedTargets:
        """Pack one dict per image, `boxes` (n, 4) xyxy pixels and `labels` (n,), with the images' (h, w)."""
        counts = [len(t["labels"]) for t in targets]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        device = targets[0]["boxes"].device
        # On the host, since the counts are there: on a GPU, repeat_interleave would wait for their sum.
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        scales = pixel_scales(sizes, torch.device("cpu"))[rows].to(device, non_blocking=True)
        boxes = torch.cat([t["boxes"] for t in targets]).float().reshape(-1, 4)
        boxes = box_convert(boxes, "xyxy", "cxcywh") / scales
        labels = torch.cat([t["labels"] for t in targets]).long()
        return cls(
            labels, boxes, scales, rows.to(device, non_blocking=True), list(zip([0, *ends[:-1]], ends, strict=True))
        )
