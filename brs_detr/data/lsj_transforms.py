"""Large-scale jitter and copy-paste: images resized by a random factor, on a canvas that is always of one size.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021, sections 3
and 4.1, with what the released code of Co-DETR makes of it: the image stays at the top left of a gray canvas which the
detector takes for a part of it, and objects are pasted where they are in the other image.

Random numbers come from the caller's generator, as in `transforms.py`; so does the choice of the other image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brs_detr.data.coco import CocoDetection, Target
from brs_detr.data.transforms import (
    flip_sample,
    integer,
    keep_objects,
    place_on_canvas,
    resize_image,
    uniform,
)
from brs_detr.ops.images import Size, resized_size
from brs_detr.ops.masks import boxes_around, resize_masks

MIN_SIDE = 0.01  # pixels: thinner boxes are dropped
MAX_SHIFT = 10.0  # pixels: an object whose box changes by no more than this stays, however much of it is covered
MIN_VISIBLE = 300  # pixels: an object of which more can be seen stays, however much its box changes

OtherImage = Callable[[torch.Generator], tuple[Tensor, Target]]


class LSJTransforms:
    """Resize an image by a random factor, crop what is larger than the canvas, flip, and paste objects of another one.

    With a factor of 1 the image just fits into the canvas. Boxes become those around the cropped masks, where there are
    masks, and are clipped otherwise.

    Args:
        size: side in pixels of the square canvas.
        scales: smallest and largest factor.
        flip: probability of a horizontal flip.
        max_pasted: most objects that are pasted from another image, which is resized, cropped and flipped in the same
            way; 0 is off. Their number is uniform up to that of its objects. Only objects with masks can be pasted.
        keep_masks: return the masks, too.
        antialias: low-pass filter when downscaling.

    Attributes:
        other_image: returns a random image of the dataset with those of its objects that have a mask; None where no
            objects are pasted. `connect` sets it.
    """

    def __init__(
        self,
        *,
        size: int = 1024,
        scales: tuple[float, float] = (0.1, 2.0),
        flip: float = 0.5,
        max_pasted: int = 99,
        keep_masks: bool = True,
        antialias: bool = True,
    ) -> None:
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scales={scales} must be (smallest, largest) factor, above 0.")
        self.size, self.scales, self.flip, self.max_pasted = size, scales, flip, max_pasted
        self.keep_masks, self.antialias = keep_masks, antialias
        self.other_image: OtherImage | None = None

    def connect(self, dataset: CocoDetection) -> None:
        """Paste objects of this dataset's images, if it has masks."""
        self.other_image = dataset.random_image if dataset.masks and self.max_pasted else None

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Augment one image; arguments and result as of `TrainTransforms`."""
        image, target = self._jittered(image, target, generator)
        if self.other_image is not None and "masks" in target:
            other_image, other = self._jittered(*self.other_image(generator), generator)
            count = len(other["labels"])
            chosen = torch.randperm(count, generator=generator)[: integer(0, min(count, self.max_pasted), generator)]
            image, target = paste(image, target, other_image, keep_objects(other, chosen))
        if not self.keep_masks:
            target = {key: value for key, value in target.items() if key != "masks"}
        return image.contiguous(), target

    def largest_sizes(self, height: int, width: int) -> list[Size]:
        """Return (h, w) of the largest images that one of this size can become, as `TrainTransforms` does."""
        return [(self.size, self.size)]

    def _jittered(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Resize, crop and flip an image, and lay it on the canvas."""
        low, high = self.scales
        side = self.size * (low + (high - low) * uniform(generator))
        height, width = resized_size(image.shape[-2], image.shape[-1], side, side)
        cut_h, cut_w = min(height, self.size), min(width, self.size)
        top, left = integer(0, height - cut_h, generator), integer(0, width - cut_w, generator)
        target = _cropped(target, (image.shape[-2], image.shape[-1]), (height, width), (top, left, cut_h, cut_w))
        image = resize_image(image, (height, width), self.antialias)[:, top : top + cut_h, left : left + cut_w]
        if uniform(generator) < self.flip:
            image, target = flip_sample(image, target)
        return place_on_canvas(image, target, (self.size, self.size))


def _cropped(target: Target, old: Size, new: Size, area: tuple[int, int, int, int]) -> Target:
    """Resize and crop the objects of an image, and drop those of which nothing is left.

    Args:
        target: "boxes" (n, 4) xyxy pixels of the image, "labels" (n,), perhaps "masks" (n, h, w).
        old: (h, w) of the image.
        new: (h, w) after resizing.
        area: (top, left, height, width) of the crop, inside the resized image.
    """
    top, left, height, width = area
    factors = torch.tensor([new[1] / old[1], new[0] / old[0]] * 2)
    boxes = target["boxes"].reshape(-1, 4) * factors - torch.tensor([left, top] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2))
    target = _filled({**target, "boxes": boxes})
    if "masks" not in target:
        return target
    # one by one: at twice the canvas's side, those of a hundred objects would fill the memory of the loader worker
    masks = target["masks"].new_zeros(len(target["masks"]), height, width)
    for cut, mask in zip(masks, target["masks"], strict=True):
        cut.copy_(resize_masks(mask[None], new)[0, top : top + height, left : left + width])
    return _filled({**target, "boxes": boxes_around(masks), "masks": masks})


def _filled(target: Target) -> Target:
    """Drop the objects whose boxes have a side below `MIN_SIDE`."""
    boxes = target["boxes"]
    keep = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(dim=1)
    return target if keep.all() else keep_objects(target, keep)  # a selection copies all bitmaps


def paste(image: Tensor, target: Target, other_image: Tensor, other: Target) -> tuple[Tensor, Target]:
    """Paste the objects of another image, where they are, onto an image of the same size.

    What they cover of the image's own objects is cut from their masks, and boxes become those around the rest. An
    object is dropped if no more than `MIN_VISIBLE` pixels are left and its box moved by more than `MAX_SHIFT`.

    Args:
        image, other_image: (3, h, w) uint8.
        target, other: "boxes" (n, 4) xyxy pixels around the masks, "labels" (n,) and "masks" (n, h, w) uint8; all of
            `other` is pasted.

    Returns:
        the image, and its objects that stay, then the pasted ones; other entries are those of `target`.
    """
    if not len(other["labels"]):
        return image, target
    covered = other["masks"].amax(dim=0)
    masks, boxes, keep = target["masks"].clone(), target["boxes"].clone(), torch.ones(len(target["boxes"])).bool()
    # in the window of each object alone: passes over whole canvases would take most of the time of an image
    for row, (x1, y1, x2, y2) in enumerate(target["boxes"].int().tolist()):
        part, lost = masks[row, y1:y2, x1:x2], covered[y1:y2, x1:x2]
        if not (part & lost).any():
            continue
        part &= 1 - lost
        boxes[row] = boxes_around(part[None])[0] + torch.tensor([x1, y1, x1, y1])
        moved, visible = (boxes[row] - target["boxes"][row]).abs().max(), int(part.count_nonzero())
        keep[row] = visible > MIN_VISIBLE or (visible > 0 and moved <= MAX_SHIFT)
    own = keep_objects({**target, "boxes": boxes, "masks": masks}, keep)
    joined = {name: torch.cat([own[name], other[name]]) for name in ("boxes", "labels", "masks")}
    return torch.where(covered.bool(), other_image, image), {**own, **joined}
