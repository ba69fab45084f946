"""Adaptive Training Sample Selection (Zhang et al., CVPR 2020, Algorithm 1).

Each object takes the anchors nearest to its center on every level as candidates, and keeps those whose IoU exceeds the
candidates' own mean plus standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brs_detr.assign.max_iou import BACKGROUND

MIN_MARGIN = 0.01  # pixels by which an anchor's center has to lie inside its object, as in the official code


def atss_assign(anchors: Tensor, level_counts: Sequence[int], objects: Tensor, *, topk: int = 9) -> Tensor:
    """Assign anchors to objects by an IoU threshold of each object's own.

    Args:
        anchors: (N, 4) xyxy pixels, level after level.
        level_counts: anchors of each level; they sum to N.
        objects: (M, 4) xyxy pixels; M may be 0.
        topk: candidates per level and object (fewer where the level is smaller).

    Returns:
        (N,) int64: object index or BACKGROUND. An anchor accepted by several objects goes to the one it overlaps most.
    """
    if objects.shape[0] == 0 or anchors.shape[0] == 0:
        return torch.full((anchors.shape[0],), BACKGROUND, dtype=torch.int64, device=anchors.device)
    centers = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    # (K, M) tables of candidates instead of (N, M) of all anchors, up to the final maximum.
    candidates = _nearest(centers, level_counts, objects, topk)
    overlap = _overlap(anchors[candidates], objects)
    accepted = (overlap >= _threshold(overlap)) & _inside(centers[candidates], objects)
    table = anchors.new_full((anchors.shape[0], objects.shape[0]), -1.0)
    table.scatter_(0, candidates, torch.where(accepted, overlap, -1.0))
    best, index = table.max(dim=1)
    return torch.where(best >= 0, index, BACKGROUND)


@dataclass(frozen=True)
class ATSSAssigner:
    """`atss_assign` as a dense head calls it.

    Attributes:
        topk: candidates per level and object.
    """

    topk: int = 9
    may_ignore: ClassVar[bool] = False

    def __call__(self, anchors: Tensor, level_counts: Sequence[int], objects: Tensor) -> Tensor:
        """Assign (N, 4) anchors, `level_counts` of each level, to (M, 4) objects; returns (N,) int64."""
        return atss_assign(anchors, level_counts, objects, topk=self.topk)


def _nearest(centers: Tensor, level_counts: Sequence[int], objects: Tensor, topk: int) -> Tensor:
    """Return (K, M) indices of the topk anchors of every level nearest to each object's center."""
    middle = (objects[:, :2] + objects[:, 2:]) * 0.5
    chosen, start = [], 0
    for level in centers.split(list(level_counts)):
        if level.shape[0]:
            distance = (level[:, None, 0] - middle[:, 0]).square() + (level[:, None, 1] - middle[:, 1]).square()
            nearest = distance.topk(min(topk, level.shape[0]), dim=0, largest=False).indices
            chosen.append(nearest + start)
        start += level.shape[0]
    return torch.cat(chosen)


def _overlap(boxes: Tensor, objects: Tensor) -> Tensor:
    """Compute the IoU (K, M) of candidate boxes (K, M, 4) with their object (M, 4)."""
    low = torch.maximum(boxes[..., :2], objects[:, :2])
    high = torch.minimum(boxes[..., 2:], objects[:, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (objects[:, 2:] - objects[:, :2]).prod(-1) - intersection
    return intersection / union.clamp(min=1e-6)


def _threshold(overlap: Tensor) -> Tensor:
    """Compute mean plus unbiased standard deviation (M,) over the candidates; a single one is its own threshold."""
    # The deviation of a single value is NaN.
    mean = overlap.mean(dim=0)
    return mean + overlap.std(dim=0) if overlap.shape[0] > 1 else mean


def _inside(centers: Tensor, objects: Tensor) -> Tensor:
    """Return (K, M) bool, True where candidate centers (K, M, 2) lie inside their object (M, 4)."""
    margin = torch.cat([centers - objects[:, :2], objects[:, 2:] - centers], dim=-1)
    return margin.amin(dim=-1) > MIN_MARGIN
