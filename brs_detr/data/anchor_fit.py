"""How well anchors fit the objects of a dataset: their best IoU over the anchors where the grid really places them.

Shapes alone say too little: an anchor as large as an object of 8 pixels, on a grid of 4, may lie 2 pixels beside it
both ways, with an IoU of .39. So every object is compared with the nearest anchor of each shape on each level, among
those that the detector compares it with. Boxes are resized as in training; flips, crops and zooms are left out.
Nothing here knows a detector: `run/anchors.py` says which anchors its heads have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from brs_detr.data.config import DataConfig, LSJConfig, SSDConfig
from brs_detr.data.packed import PackedAnnotations
from brs_detr.ops.anchors import base_anchors, octave_scales

# Objects, counted once for each size they are resized to; beyond that evenly spaced ones stand for all. The standard
# error of a share is then below half a percent, and a fit takes seconds on any dataset.
MAX_OBJECTS = 20_000
_SCALES = 8  # factors of large-scale jitter that stand for its range
# Candidates for the smallest anchor of an octave, in strides: four an octave, rounded as one would write them.
SCALES = (1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 3.4, 4.0, 4.8, 5.6, 6.8, 8.0, 9.6, 11.0, 13.5, 16.0)


AS_GOOD = 0.01  # difference of shares at IoU .5 that decides nothing
CLEARLY = 0.05  # gain in the mean of both shares for which an adaptive head gets another scale


class Boxes(NamedTuple):
    """Objects and the sizes of their images.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels.
        sizes: (N, 2) float32 (h, w) pixels of the image of each.
        labels: (N,) int64 class of each, any numbers.
    """

    boxes: Tensor
    sizes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class AnchorLayout:
    """The anchors of a head.

    Attributes:
        strides: pixels per cell of each level.
        scale: side of the smallest anchor of an octave, in strides.
        per_octave: scales that divide an octave.
        ratios: height over width.
        offset: of the centers from the cells' corners, in cells.
        even: the cells of a level divide the image evenly, whatever its stride, as YOLACT's do.
        border: pixels by which an anchor that takes part in training may stick out of its image; None: any number.
        adaptive: what overlap makes a positive is chosen for each object (ATSS, PAA), so that none goes without.
    """

    strides: tuple[int, ...]
    scale: float
    per_octave: int
    ratios: tuple[float, ...]
    offset: float = 0.0
    even: bool = False
    border: float | None = None
    adaptive: bool = False

    def with_scale(self, scale: float) -> AnchorLayout:
        """Return the same anchors with another smallest side."""
        return replace(self, scale=scale)


class Fit(NamedTuple):
    """Shares of the objects, in [0, 1], whose best anchor has an IoU of at least .5 and of at least .7.

    They are means over the classes, as AP is: by objects alone, a frequent class decides, and of a rare one of other
    sizes no object may have an anchor (BCCD's platelets: AP50 of the RoI head 79 in place of 90, docs/study.md).
    """

    at_50: float
    at_70: float

    @property
    def both(self) -> float:
        """Return the mean of the two."""
        return (self.at_50 + self.at_70) / 2


def boxes_of(packed: PackedAnnotations) -> Boxes:
    """Return the objects of a dataset, without crowds."""
    own = ~packed.iscrowd
    sizes = np.repeat(packed.frames, np.diff(packed.offsets), axis=0)[own]
    boxes, labels = torch.from_numpy(packed.boxes[own]).float(), torch.from_numpy(packed.labels[own]).long()
    return Boxes(boxes, torch.from_numpy(sizes).float(), labels)


def boxes_of_json(data: dict[str, Any]) -> Boxes:
    """Return the objects of a sound COCO json whose images have sizes, without crowds and ignored ones."""
    frames = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    objects = [a for a in data["annotations"] if not a.get("iscrowd") and not a.get("ignore")]
    xywh = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    sizes = torch.tensor([frames[a["image_id"]] for a in objects], dtype=torch.float32).reshape(-1, 2)
    labels = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
    corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    boxes = torch.minimum(corners.clamp(min=0), sizes.flip(1).repeat(1, 2))  # clipped, as for training
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    return Boxes(boxes[kept], sizes[kept], labels[kept])


def at_training_size(stored: Boxes, data: DataConfig) -> Boxes:
    """Resize objects as training does, to every short side that it draws from; at most `MAX_OBJECTS` of them."""
    augment = data.augment
    if isinstance(augment, SSDConfig):
        return _resized(stored, [torch.full_like(stored.sizes, augment.size)])
    if isinstance(augment, LSJConfig):  # objects that a crop cuts count as they are
        scales = torch.linspace(augment.min_scale, augment.max_scale, _SCALES + 1, dtype=torch.float64)
        sides = [(augment.size * scale, augment.size * scale) for scale in scales[1:].tolist()]
    else:
        sides = [(side, augment.long_side) for side in augment.short_sides]
    count = max(1, MAX_OBJECTS // len(sides))
    stored = Boxes(*(evenly_spaced(column, count) for column in stored))
    return _resized(stored, [resized_sizes(stored.sizes, *limits) for limits in sides])


def side_lengths(boxes: Boxes) -> Tensor:
    """Return how large each object is: the square root of its area, (N,) pixels."""
    return (boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(dim=1).sqrt()


def resized_sizes(sizes: Tensor, short_side: float, long_side: float) -> Tensor:
    """Compute `ops.images.resized_size` of many images: (N, 2) (h, w) pixels."""
    scale = torch.minimum(long_side / sizes.amax(dim=1), short_side / sizes.amin(dim=1))
    return (sizes * scale[:, None] + 0.5).floor().clamp(min=1)


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """Return at most `count` rows of (N, ...), the first and the last among them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()]


def _resized(stored: Boxes, sizes: Sequence[Tensor]) -> Boxes:
    """Scale boxes with their images to each of several sizes, and join the results."""
    boxes = []
    for size in sizes:
        factors = (size / stored.sizes).flip(1)  # (h, w) to (x, y)
        boxes.append(stored.boxes * factors.repeat(1, 2))
    everything = Boxes(torch.cat(boxes), torch.cat(list(sizes)), stored.labels.repeat(len(sizes)))
    return Boxes(*(evenly_spaced(column, MAX_OBJECTS) for column in everything))


def best_overlap(boxes: Boxes, layout: AnchorLayout) -> Tensor:
    """Compute the IoU of each object with its best anchor.

    Both sides of an intersection shrink with the distance of the centers along that axis, and the areas of an object
    and of an anchor's shape are fixed. So of all anchors of one shape on one level the one whose center is nearest,
    column by column and row by row, is the best, and no grid has to be laid out.

    Returns:
        (N,) in [0, 1]; 0 where no anchor may take part.
    """
    scales = octave_scales(layout.scale, layout.per_octave)
    best = boxes.boxes.new_zeros(len(boxes.boxes))
    for stride in layout.strides:
        for shape in base_anchors(stride, scales, layout.ratios):
            x = _intersection(boxes.boxes[:, 0::2], boxes.sizes[:, 1], float(shape[2]), stride, layout)
            y = _intersection(boxes.boxes[:, 1::2], boxes.sizes[:, 0], float(shape[3]), stride, layout)
            area = (boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(dim=1) + 4 * shape[2] * shape[3]
            best = torch.maximum(best, x * y / (area - x * y))
    return best


def _intersection(sides: Tensor, length: Tensor, half: float, stride: int, layout: AnchorLayout) -> Tensor:
    """Intersect intervals (N, 2) with the nearest anchor of a half side, in images of (N,) pixels along that axis.

    Returns:
        (N,) pixels.
    """
    cells = (length / stride).ceil()
    step = length / cells if layout.even else torch.full_like(length, stride)
    nearest = (sides.mean(dim=1) / step - layout.offset).round()
    first, last = torch.zeros_like(cells), cells - 1
    if layout.border is not None:  # as `ops.anchors.inside_image`: from -border to below length + border
        first = ((half - layout.border) / step - layout.offset).ceil().clamp(min=0)
        last = torch.minimum(last, ((length + layout.border - half) / step - layout.offset).ceil() - 1)
    center = (torch.minimum(torch.maximum(nearest, first), last) + layout.offset) * step
    overlap = torch.minimum(sides[:, 1], center + half) - torch.maximum(sides[:, 0], center - half)
    return torch.where(first <= last, overlap.clamp(min=0), 0.0)


def fit(boxes: Boxes, layout: AnchorLayout) -> Fit:
    """Measure which shares of the objects have an anchor at IoU .5 and .7; 0 without objects."""
    if not len(boxes.boxes):
        return Fit(0.0, 0.0)
    _, shares = class_shares(boxes, layout)
    return Fit(*shares.mean(dim=0).tolist())


def class_shares(boxes: Boxes, layout: AnchorLayout) -> tuple[Tensor, Tensor]:
    """Measure the shares of `Fit` for each class that has objects: its label (C,), ascending, and the shares (C, 2)."""
    overlap = best_overlap(boxes, layout)
    labels, classes, counts = boxes.labels.unique(return_inverse=True, return_counts=True)
    reached = torch.stack([overlap >= 0.5, overlap >= 0.7], dim=1).double()
    return labels, reached.new_zeros(len(counts), 2).index_add_(0, classes, reached) / counts[:, None]


def best_scale(boxes: Boxes, layout: AnchorLayout, scales: Iterable[float] = SCALES) -> tuple[AnchorLayout, Fit]:
    """Choose the scale with which the anchors of a head fit best; of equal ones the nearest to that of `layout`.

    Where a fixed IoU makes positives, an object without an anchor at IoU .5 is seldom found: the scale that leaves the
    fewest, and of those within `AS_GOOD` of it the one with most anchors at .7. Where the assignment is adaptive no
    object is lost, and how tight the anchors are counts as much: the largest mean of both shares, if it is larger by
    `CLEARLY` than that of the layout itself. What each did to AP is in docs/study.md. The layout's own scale is a
    candidate for all: one that fits no better does not replace it.

    Returns:
        The anchors with that scale, and how they fit.
    """
    near = sorted({*scales, layout.scale}, key=lambda scale: abs(np.log(scale / layout.scale)))
    fits = {scale: fit(boxes, layout.with_scale(scale)) for scale in near}
    if layout.adaptive:
        chosen = max(near, key=lambda scale: round(fits[scale].both, 6))  # the first of equal ones, that is the nearest
        if fits[chosen].both < fits[layout.scale].both + CLEARLY:
            chosen = layout.scale
    else:
        enough = max(fitted.at_50 for fitted in fits.values()) - AS_GOOD
        good = [scale for scale in near if fits[scale].at_50 >= enough]
        chosen = max(good, key=lambda scale: round(fits[scale].at_70, 6))
    return layout.with_scale(chosen), fits[chosen]
