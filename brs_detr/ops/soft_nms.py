"""Soft-NMS: a box that overlaps a better one of its class keeps a part of its score, instead of none.

Bodla et al., "Soft-NMS -- Improving Object Detection With One Line of Code", ICCV 2017, Fig. 2. The paper's loop goes
over the boxes that are kept; here all images, classes and pairs of one round are computed at once, and nothing waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brs_detr.ops.boxes import iou_within


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    iou: float,
    min_score: float = 0.001,
    sigma: float | None = None,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decay the scores of overlapping boxes in one image.

    Args:
        boxes, scores, labels, iou, sigma, max_detections: as for `decay`, without the dimension of the images.
        min_score: boxes whose score falls below it are dropped, as are those that overlap nothing but begin below it.

    Returns:
        (m,) rows of the boxes kept, in the order of their new scores, and these scores (m,).
    """
    rows, decayed = decay(boxes[None], scores[None], labels[None], iou=iou, sigma=sigma, max_detections=max_detections)
    kept = survives(decayed[0], min_score)
    return rows[0][kept], decayed[0][kept]


def decay(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    iou: float,
    sigma: float | None = None,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the best box of each image again and again, and lower the scores of those of its class that overlap it.

    Args:
        boxes: (B, n, 4) xyxy pixels.
        scores: (B, n) at least 0; below 0 where an image has fewer boxes.
        labels: (B, n); boxes of different labels do not change each other.
        iou: overlap from which on a score s becomes s (1 - overlap) (Eq. 4).
        sigma: instead, every score becomes s exp(-overlap^2 / sigma), whatever the overlap (Eq. 5).
        max_detections: most boxes to choose; None: all.

    Returns:
        (B, m) rows and (B, m) new scores of the boxes in the order they were chosen, the best first; see `survives`.
    """
    live = scores if scores.dtype == torch.float64 else scores.float()
    factors = _factors(boxes.to(live.dtype), labels, iou, sigma)
    # A chosen box has the factor 0 itself. Scores only fall, so one below a minimum never comes back, and need not be
    # removed to change no other: whatever it would change is below the minimum too.
    factors.diagonal(dim1=1, dim2=2).zero_()
    images, count = scores.shape
    rows, decayed = [], []
    first = torch.arange(images, device=scores.device)
    for _ in range(count if max_detections is None else min(count, max_detections)):
        score, row = live.max(dim=1)
        rows.append(row)
        decayed.append(score)
        live = live * factors[first, row]
    if not rows:
        return labels.new_zeros(images, 0, dtype=torch.long), live.new_zeros(images, 0)
    return torch.stack(rows, dim=1), torch.stack(decayed, dim=1)


def survives(scores: Tensor, min_score: float) -> Tensor:
    """Return where new scores (..., m) are those of boxes to keep: at least the minimum, and above 0."""
    return (scores >= min_score) & (scores > 0)


def _factors(boxes: Tensor, labels: Tensor, iou: float, sigma: float | None) -> Tensor:
    """Return the factor (B, n, n) of each box's score where another one is chosen; 1 between labels."""
    overlap = iou_within(boxes)
    factors = torch.where(overlap >= iou, 1 - overlap, 1.0) if sigma is None else (-overlap.square() / sigma).exp()
    return factors.masked_fill_(labels[:, :, None] != labels[:, None], 1.0)
