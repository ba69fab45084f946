"""The objects of a batch in one list: labels and normalised boxes, with each picture's span kept on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from brs_detr.ops.images import Size


def pixel_scales(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """(h, w) of each picture -> (B, 4) float32 (w, h, w, h)."""
    return torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32).to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedTargets:
    """All objects of a batch.

    Attributes:
        labels: (G,) int64.
        boxes: (G, 4) float32 cxcywh in [0, 1] of the object's own picture (not of the padded batch).
        scales: (G, 4) float32 (w, h, w, h) in pixels of the object's picture.
        spans: first and one-past-last object of each picture, host integers.
    """

    labels: Tensor
    boxes: Tensor
    scales: Tensor
    spans: list[tuple[int, int]]

    @classmethod
    def pack(cls, targets: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> PackedTargets:
        """From one dict a picture, `boxes` (n, 4) xyxy pixels and `labels` (n,), and the pictures' (h, w)."""
        counts = [len(t["labels"]) for t in targets]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        device = targets[0]["boxes"].device
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        scales = pixel_scales(sizes, torch.device("cpu"))[rows].to(device, non_blocking=True)
        boxes = torch.cat([t["boxes"] for t in targets]).float().reshape(-1, 4)
        boxes = box_convert(boxes, "xyxy", "cxcywh") / scales
        labels = torch.cat([t["labels"] for t in targets]).long()
        return cls(labels, boxes, scales, list(zip([0, *ends[:-1]], ends, strict=True)))
