"""Maximum-IoU assignment of reference boxes to objects, and random sampling of it (Faster R-CNN, 3.1.2 and 3.1.3).

An assignment is one integer per reference box: the index of its object, or one of the two constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORED = -2
MAX_TABLE = 1 << 23  # entries of one block of the (object, box) IoU table: 32 MiB in float32


def max_iou_assign(
    boxes: Tensor,
    objects: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
    first_best: bool = False,
) -> Tensor:
    """Assign every box to the object it overlaps most, if it overlaps enough.

    Args:
        boxes: (N, 4) xyxy anchors or proposals.
        objects: (M, 4) xyxy ground truth in the same unit; M may be 0.
        positive: a box with best IoU >= positive belongs to that object.
        negative: a box with best IoU < negative is background; between the two it is ignored.
        low_quality: when given, every object whose own best IoU reaches this value also receives all boxes with exactly
            that IoU, later objects overriding earlier ones and everything decided before.
        first_best: of these boxes the object receives the first only, as in YOLACT.

    Returns:
        (N,) int64: object index, BACKGROUND or IGNORED. All background when there is no object.
    """
    count = boxes.shape[0]
    best = boxes.new_zeros(count)
    index = torch.zeros(count, dtype=torch.int64, device=boxes.device)
    claimed = torch.full_like(index, BACKGROUND)
    if objects.shape[0] == 0 or count == 0:
        return claimed
    block = max(1, MAX_TABLE // count)
    for start in range(0, objects.shape[0], block):
        iou = box_iou(objects[start : start + block], boxes)
        value, which = iou.max(dim=0)
        better = value > best  # strictly: of equal objects the first is taken
        best = torch.where(better, value, best)
        index = torch.where(better, which + start, index)
        if low_quality is not None:
            claimed = torch.maximum(claimed, _claims(iou, low_quality, start, first_best))
    assigned = torch.where(best >= positive, index, torch.where(best < negative, BACKGROUND, IGNORED))
    return torch.where(claimed >= 0, claimed, assigned)


def _claims(iou: Tensor, low_quality: float, start: int, first_best: bool) -> Tensor:
    """Return, for each box (N,), the last object of this block that overlaps it most of all boxes, else BACKGROUND."""
    top, first = iou.max(dim=1, keepdim=True)  # of equal values the first
    if first_best:
        best = torch.arange(iou.shape[1], device=iou.device) == first
    else:
        best, low_quality = iou == top, max(low_quality, torch.finfo(iou.dtype).tiny)  # no overlap, no claim
    claimed = best & (top >= low_quality)
    index = torch.arange(start, start + iou.shape[0], device=iou.device)[:, None]
    # The maximum, since later objects override earlier ones.
    return torch.where(claimed, index, BACKGROUND).amax(dim=0)


def random_permutation(count: int, device: torch.device) -> Tensor:
    """Return a random permutation (count,) of 0..count-1."""
    return torch.randperm(count, device=device)


@dataclass(frozen=True)
class RandomSampler:
    """A sampler that keeps at most `count` entries of an assignment and ignores the rest.

    Attributes:
        count: entries to keep; background fills what the positives leave free.
        positive_fraction: at most this share of `count` are positives.
        permute: makes the order in which entries are considered; tests replace it by `torch.arange`.
    """

    count: int
    positive_fraction: float
    permute: Callable[[int, torch.device], Tensor] = random_permutation

    def __call__(self, assigned: Tensor) -> Tensor:
        """Set the entries of an assignment (N,) that are not drawn to IGNORED, without waiting for the device."""
        order = self.permute(assigned.shape[0], assigned.device)
        shuffled = assigned[order]
        positive = _first(shuffled >= 0, int(self.count * self.positive_fraction))
        background = _first(shuffled == BACKGROUND, self.count - positive.sum())
        kept = torch.empty_like(positive)
        kept[order] = positive | background
        return torch.where(kept, assigned, IGNORED)


@dataclass(frozen=True)
class MaxIoUAssigner:
    """`max_iou_assign` as a dense head calls it.

    Attributes:
        positive, negative, low_quality: thresholds of `max_iou_assign`.
        first_best: as there.
        sampler: chooses the anchors that take part; None takes all that are not ignored.
    """

    positive: float
    negative: float
    low_quality: float | None = None
    first_best: bool = False
    sampler: RandomSampler | None = None
    may_ignore: ClassVar[bool] = True

    def __call__(
        self, anchors: Tensor, level_counts: Sequence[int], objects: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Assign anchors to objects, whatever their levels.

        Args:
            anchors: (N, 4) xyxy.
            level_counts: not used.
            objects: (M, 4) xyxy in the same unit.
            allowed: (N,) bool; the other anchors are ignored, as if they did not exist. None: all are allowed.

        Returns:
            (N,) int64, see `max_iou_assign`.
        """
        if allowed is not None:
            # An empty box overlaps nothing, and so is no object's best one; selecting rows would wait for the device.
            anchors = torch.where(allowed[:, None], anchors, 0.0)
        assigned = max_iou_assign(
            anchors,
            objects,
            positive=self.positive,
            negative=self.negative,
            low_quality=self.low_quality,
            first_best=self.first_best,
        )
        if allowed is not None:
            assigned = torch.where(allowed, assigned, IGNORED)
        return assigned if self.sampler is None else self.sampler(assigned)


def _first(mask: Tensor, count: int | Tensor) -> Tensor:
    """Keep the first `count` true entries of a mask."""
    return mask & (mask.cumsum(0) <= count)
