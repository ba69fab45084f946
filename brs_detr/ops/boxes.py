"""Boxes as offsets from reference boxes, and which of many overlapping boxes are kept.

Offsets are those of Girshick et al., "Rich feature hierarchies", appendix C, and Faster R-CNN: a center moves by a
fraction of the reference's size and sides grow by an exponential factor; each of the four numbers is divided by its
standard deviation so that all have a comparable size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms

from brs_detr.ops.images import Size

# Devices on which `kept_in_segments` goes through the segments one by one, which saves comparing the boxes of different
# ones. Elsewhere each call would be waited for.
SEGMENT_BY_SEGMENT = ("cpu",)

# Most boxes of one call elsewhere, but for an image that has more: its memory and time grow with their square. With the
# default limits an image of 800x1333 pixels has 15,150 proposals.
BOXES_AT_ONCE = 16_384


class Coder(Protocol):
    """Conversion of boxes to four numbers relative to a reference box, and back."""

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Compute the numbers (..., 4) that turn each reference (..., 4) xyxy into the box of the same row."""
        ...

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Return the boxes (..., 4) xyxy that the numbers (..., 4) make of the references (..., 4)."""
        ...


@dataclass(frozen=True)
class BoxCoder:
    """Conversion of boxes to offsets from reference boxes and back, in float32 or wider.

    Attributes:
        stds: divisors of (dx, dy, dw, dh).
        max_factor: sides change at most by this factor or its inverse when decoding.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_factor: float = 1000 / 16  # as in Faster R-CNN's code: exp() of an early prediction must not overflow

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Compute the offsets that turn each reference into the box of the same row.

        Args:
            references: (..., 4) xyxy pixels; a side counts as a thousandth of a pixel at least.
            boxes: (..., 4) xyxy pixels, likewise.

        Returns:
            (..., 4) (dx, dy, dw, dh) over `stds`.
        """
        center, side = _center_side(_wide(references))
        target_center, target_side = _center_side(_wide(boxes))
        side, target_side = side.clamp(min=1e-3), target_side.clamp(min=1e-3)
        shift = (target_center - center) / side
        growth = (target_side / side).log()
        (sx, sy, sw, sh) = self.stds
        return torch.stack([shift[..., 0] / sx, shift[..., 1] / sy, growth[..., 0] / sw, growth[..., 1] / sh], dim=-1)

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Apply offsets to reference boxes; the result is not clipped to any image.

        Args:
            references: (..., 4) xyxy, broadcast against the deltas.
            deltas: (..., 4) as `encode` makes them.

        Returns:
            (..., 4) xyxy in the unit of the references.
        """
        center, side = _center_side(_wide(references))
        dx, dy, dw, dh = _wide(deltas).unbind(-1)
        (sx, sy, sw, sh) = self.stds
        # Only the sides are bounded: a center far outside is harmless, a side of exp(large) is infinite.
        max_log = math.log(self.max_factor)
        center = center + torch.stack([dx * sx, dy * sy], dim=-1) * side
        half = 0.5 * side * torch.stack([dw * sw, dh * sh], dim=-1).clamp(-max_log, max_log).exp()
        return torch.cat([center - half, center + half], dim=-1)


@dataclass(frozen=True)
class PointCoder:
    """Conversion of boxes to distances from a point to their four sides, and back (FoveaBox, Eq. 4).

    The point is the center of a reference box; a distance is the logarithm of its ratio to the reference's side.

    Attributes:
        max_target: encoded ratios are at most this, and at least its inverse, also for a side that the point lies
            beyond.
        max_factor: decoded ratios are at most this, and at least its inverse: exp() must not overflow.
    """

    max_target: float = 16.0
    max_factor: float = 1000 / 16

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Compute log distances (..., 4), left, top, right, bottom, from references (..., 4) to boxes (..., 4) xyxy."""
        center, side = _center_side(_wide(references))
        boxes = _wide(boxes)
        distance = torch.cat([center - boxes[..., :2], boxes[..., 2:] - center], dim=-1)
        ratio = distance / torch.cat([side, side], dim=-1)
        return ratio.clamp(1 / self.max_target, self.max_target).log()

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Compute boxes (..., 4) xyxy from log distances (..., 4); they are not clipped to any image."""
        center, side = _center_side(_wide(references))
        limit = math.log(self.max_factor)
        ratio = _wide(deltas).clamp(-limit, limit).exp()
        return torch.cat([center - side * ratio[..., :2], center + side * ratio[..., 2:]], dim=-1)


def _wide(x: Tensor) -> Tensor:
    """Cast to float32, unless float64: half precision has too few digits for pixel coordinates."""
    return x if x.dtype == torch.float64 else x.float()


def _center_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers and sides, (..., 2) each."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the GIoU (...) of boxes (..., 4) xyxy with others (..., 4), broadcast against each other.

    That of `torchvision.ops.generalized_box_iou` (Rezatofighi et al., CVPR 2019, Algorithm 1) for pairs of any shape.
    """
    inner = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    outer = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    shared, hull = _area(inner.clamp(min=0)), _area(outer.clamp(min=0))
    union = _area(boxes[..., 2:] - boxes[..., :2]) + _area(others[..., 2:] - others[..., :2]) - shared
    return shared / union - (hull - union) / hull


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


class Regions(NamedTuple):
    """As many boxes of each image, of which some may be missing.

    Attributes:
        boxes: (B, n, 4) xyxy pixels, best first.
        valid: (B, n) bool, False for entries that are no boxes; these come last.
    """

    boxes: Tensor
    valid: Tensor

    def per_image(self) -> list[Tensor]:
        """Return the boxes (n, 4) of each image that there are (the host waits for the device once)."""
        counts = self.valid.sum(dim=1).tolist()
        return [own[:count] for own, count in zip(self.boxes, counts, strict=True)]

    def never_empty(self, sizes: Sequence[Size]) -> Regions:
        """Give an image of (h, w) pixels that has no box one, itself."""
        full = image_corners(sizes, self.boxes)[:, None]
        first = torch.where(self.valid[:, :1, None], self.boxes[:, :1], full)
        valid = torch.cat([torch.ones_like(self.valid[:, :1]), self.valid[:, 1:]], dim=1)
        return Regions(torch.cat([first, self.boxes[:, 1:]], dim=1), valid)


class Candidates(NamedTuple):
    """The boxes that enter `suppress`, whose arguments these are; those of several images have one more dimension."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    groups: Tensor
    kept: Tensor


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: Size,
    *,
    nms_iou: float,
    max_detections: int,
    groups: Tensor | None = None,
    kept: Tensor | None = None,
    drop_empty: bool = False,
) -> dict[str, Tensor]:
    """Clip the candidates of one image and keep the best that do not overlap.

    Args:
        boxes: (n, 4) xyxy pixels. scores: (n,). labels: (n,).
        size: (h, w) pixels of the image.
        nms_iou: of two boxes of a group that overlap more, the one with the higher score is kept.
        max_detections: most boxes that are kept.
        groups: (n,) int64; boxes of different groups do not suppress each other. None: the labels.
        kept: (n,) bool, candidates that take part; None: all.
        drop_empty: drop boxes that have no area inside the image.

    Returns:
        {"boxes": (m, 4), "scores": (m,), "labels": (m,)}, best first.
    """
    boxes = clip_boxes_to_image(boxes, size)
    groups = labels if groups is None else groups
    if drop_empty:
        filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        kept = filled if kept is None else kept & filled
    if kept is not None:
        index = kept.nonzero()[:, 0]  # the host must know their number: NMS follows
        boxes, scores, labels, groups = boxes[index], scores[index], labels[index], groups[index]
    best = batched_nms(boxes, scores, groups, nms_iou)[:max_detections]
    return {"boxes": boxes[best], "scores": scores[best], "labels": labels[best]}


def image_corners(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """Return images of (h, w) pixels as boxes (B, 4) xyxy, of the type and on the device of a tensor."""
    corners = torch.tensor([(0, 0, w, h) for h, w in sizes], dtype=like.dtype)
    return corners.to(like.device, non_blocking=True)


def clip_boxes(boxes: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Clip boxes (B, n, 4) xyxy to images of (h, w) pixels, as torchvision's `clip_boxes_to_image` does one image."""
    limits = image_corners(sizes, boxes)[:, 2:].repeat(1, 2)
    return torch.minimum(boxes.clamp(min=0), limits[:, None])


def kept_in_segments(boxes: Tensor, scores: Tensor, lengths: Sequence[int], nms_iou: float) -> Tensor:
    """Suppress among the boxes of each segment of each image, wherever they lie, in fixed shapes.

    Args:
        boxes: (B, n, 4) xyxy. An empty one overlaps nothing: it is kept and suppresses no other.
        scores: (B, n).
        lengths: boxes of each segment, n in all.
        nms_iou: of two boxes of a segment that overlap more, the one with the higher score is kept.

    Returns:
        (B, n) bool, True where a box is kept. On a GPU the host waits once for each group of images, of `BOXES_AT_ONCE`
        boxes at most or of one image.
    """
    if boxes.device.type not in SEGMENT_BY_SEGMENT:
        images = max(1, BOXES_AT_ONCE // max(1, boxes.shape[1]))
        if images >= len(boxes):
            return _kept_apart(boxes, scores, lengths, nms_iou)
        groups = zip(boxes.split(images), scores.split(images), strict=True)
        return torch.cat([_kept_apart(own, own_scores, lengths, nms_iou) for own, own_scores in groups])
    segments = zip(boxes.flatten(0, 1).split([*lengths] * len(boxes)), scores.flatten().split([*lengths] * len(boxes)))
    starts = accumulate([*lengths] * len(boxes), initial=0)
    kept = torch.cat([nms(*own, nms_iou) + start for own, start in zip(segments, starts)])
    return _at(kept, scores)


def _kept_apart(boxes: Tensor, scores: Tensor, lengths: Sequence[int], nms_iou: float) -> Tensor:
    """Return what `kept_in_segments` does, from one call for all segments of all images."""
    segment = torch.arange(len(lengths) * len(boxes)).view(len(boxes), -1)
    segment = segment.repeat_interleave(torch.tensor(lengths), dim=1).to(boxes.device, non_blocking=True)
    # Each segment in a place of its own. In float64 the shift loses no digit, and so changes no overlap.
    apart = boxes.double() + (segment * (boxes.amax() - boxes.amin() + 1))[..., None]
    return _at(nms(apart.flatten(0, 1), scores.flatten().double(), nms_iou), scores)


def _at(index: Tensor, like: Tensor) -> Tensor:
    """Return a bool tensor of the shape of another, True at the flat places `index`."""
    return torch.zeros_like(like, dtype=torch.bool).view(-1).index_fill(0, index, True).view_as(like)


def join_boxes(
    boxes: Tensor,
    labels: Tensor,
    scores: Sequence[Tensor],
    weights: Tensor,
    *,
    nms_iou: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """Join the detections of several sources of one image: boxes by suppression, scores by their weighted mean.

    Args:
        boxes: (n, 4) xyxy pixels, the sources one after the other; those of a former one suppress those of a later one
            whatever their scores.
        labels: (n,).
        scores: (n_s,) of each source s, in [0, 1]; n is the sum of n_s.
        weights: (S,) of the sources.
        nms_iou: of two boxes of a label that overlap more, one stays. The others belong to the one that they overlap
            most.
        max_detections: most boxes that are kept.

    Returns:
        {"boxes": (m, 4), "scores": (m,), "labels": (m,)}, best first. A score is the mean over the sources of the best
        score that belongs to a box, 0 for a source without any.
    """
    joined = torch.cat(list(scores))
    count = len(scores)
    source = torch.cat([torch.full_like(own, index, dtype=torch.long) for index, own in enumerate(scores)])
    kept = batched_nms(boxes, joined - source, labels, nms_iou)  # scores span 1, so a former source always leads
    overlap = torch.where(labels[kept][:, None] == labels, box_iou(boxes[kept], boxes), 0.0)
    overlap[torch.arange(len(kept), device=boxes.device), kept] = torch.inf  # empty boxes do not overlap themselves
    most, owner = overlap.max(dim=0) if len(kept) else (joined, source)
    votes = torch.where(most > nms_iou, joined, 0.0)
    best = joined.new_zeros(len(kept) * count).scatter_reduce(0, owner * count + source, votes, "amax")
    mean = (best.view(-1, count) * weights).sum(dim=1) / weights.sum()
    mean, order = mean.sort(descending=True, stable=True)
    chosen = kept[order[:max_detections]]
    return {"boxes": boxes[chosen], "scores": mean[:max_detections], "labels": labels[chosen]}


def fast_nms(
    boxes: Tensor, scores: Tensor, *, nms_iou: float, per_class: int, score_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Keep the boxes of each class that overlap no better one, also if that one is itself dropped.

    Bolya et al., "YOLACT", ICCV 2019, section 4.2.

    Args:
        boxes: (n, 4) xyxy pixels.
        scores: (n, C).
        nms_iou: largest overlap with a box of higher score in the same class.
        per_class: best boxes of each class that take part.
        score_threshold: boxes at or below it are dropped.
        max_detections: most boxes that are kept.

    Returns:
        (m,) rows and (m,) classes of the boxes kept, best first.
    """
    best, rows = scores.T.topk(min(per_class, len(scores)), dim=1)
    better = iou_within(boxes[rows]).triu(diagonal=1)  # of each box with those that come before it
    kept = (best > score_threshold) & (better <= nms_iou).all(dim=1)
    label, place = kept.nonzero().unbind(1)  # the host must know their number
    order = best[label, place].argsort(descending=True, stable=True)[:max_detections]
    return rows[label, place][order], label[order]


def iou_within(boxes: Tensor) -> Tensor:
    """Return the IoU (G, k, k) of every pair of the boxes (G, k, 4) of each group; 0 where both are empty."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    # one coordinate at a time: a last dimension of 2 is not vectorized on a CPU, and takes twice as long
    width = torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])
    height = torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])
    shared = width.clamp(min=0) * height.clamp(min=0)
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    union = area[:, :, None] + area[:, None] - shared
    return shared / union.clamp(min=torch.finfo(boxes.dtype).tiny)


def vote(
    boxes: Tensor, labels: Tensor, candidates: Tensor, candidate_scores: Tensor, candidate_labels: Tensor
) -> Tensor:
    """Replace each box by the mean of the candidates of its class that overlap it ("score voting" of PAA, section 3.4).

    A candidate weighs exp(-(1 - IoU)^2 / 0.025) times its score, if the IoU is above 0.01.

    Args:
        boxes: (n, 4) xyxy pixels. labels: (n,).
        candidates: (m, 4) xyxy pixels. candidate_scores: (m,), 0 for those without a vote. candidate_labels: (m,).

    Returns:
        (n, 4). A box without votes, such as an empty one, which has no IoU even with itself, stays as it is.
    """
    iou = torch.where(labels[:, None] == candidate_labels, box_iou(boxes, candidates), 0.0)
    weight = torch.where(iou > 0.01, (-(1 - iou).square() / 0.025).exp() * candidate_scores, 0.0)
    total = weight.sum(dim=1, keepdim=True)
    # Not a matrix product, which autocast and TF32 compute with too few digits for pixels.
    mean = (weight[..., None] * candidates).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, mean, boxes)
