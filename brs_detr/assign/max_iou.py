"""Maximum-IoU assignment of reference boxes to objects (Faster R-CNN, section 3.1.2).

An assignment is one integer per reference box: the index of its object, or one of the two marks below.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORED = -2
LARGEST_TABLE = 1 << 23  # entries of one block of the (object, box) IoU table: 32 MiB in float32


def max_iou_assign(
    boxes: Tensor,
    objects: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
) -> Tensor:
    """Give every box the object it overlaps most, if it overlaps enough.

    Args:
        boxes: (N, 4) xyxy anchors or proposals.
        objects: (M, 4) xyxy ground truth in the same unit; M may be 0.
        positive: a box with best IoU >= positive belongs to that object.
        negative: a box with best IoU < negative is background; between the two it is ignored.
        low_quality: when given, every object whose own best IoU reaches this value also receives all boxes with exactly
            that IoU, later objects overriding earlier ones and everything decided before.

    Returns:
        (N,) int64: object index, BACKGROUND or IGNORED. All background when there is no object.
    """
    count = boxes.shape[0]
    best = boxes.new_zeros(count)
    index = torch.zeros(count, dtype=torch.int64, device=boxes.device)
    claimed = torch.full_like(index, BACKGROUND)
    if objects.shape[0] == 0 or count == 0:
        return claimed
    block = max(1, LARGEST_TABLE // count)
    for start in range(0, objects.shape[0], block):
        iou = box_iou(objects[start : start + block], boxes)
        value, which = iou.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, which + start, index)
        if low_quality is not None:
            claimed = torch.maximum(claimed, _claims(iou, low_quality, start))
    assigned = torch.where(best >= positive, index, IGNORED)
    assigned = torch.where(best < negative, BACKGROUND, assigned)
    return torch.where(claimed >= 0, claimed, assigned)


def _claims(iou: Tensor, low_quality: float, start: int) -> Tensor:
    """(N,) last object of this block whose best box is this one, BACKGROUND where there is none."""
    top = iou.amax(dim=1, keepdim=True)
    mine = (iou == top) & (top >= low_quality)
    number = torch.arange(start, start + iou.shape[0], device=iou.device)[:, None]
    return torch.where(mine, number, BACKGROUND).amax(dim=0)
