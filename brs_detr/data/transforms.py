"""Multi-scale augmentation of DETR-like detectors: flip, then resize, or resize, crop and resize again.

Boxes, and masks if the target has them, follow the image; an object of which a crop leaves no box is dropped with its
label and its mask.

Every random number is drawn from a generator given by the caller, so an image's augmentation depends on the seed, the
epoch and the image alone: not on the number of workers, and not on whether the run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from brs_detr.data.coco import Target
from brs_detr.ops.images import CANVAS_COLOR, Size, pad_to, resized_size
from brs_detr.ops.masks import resize_masks


class TrainTransforms:
    """Random flip, then one of DETR's two resizing policies.

    Policy A resizes to a short side chosen from `short_sides`. Policy B resizes to a short side of
    `crop_short_sides`, cuts out a random rectangle whose sides are integers from `crop_size`, and then does A.
    Boxes are transformed and clipped, and dropped if nothing of them is left; a crop may have no boxes.

    Args:
        short_sides: short sides in pixels to choose from.
        long_side: maximum long side in pixels.
        crop_short_sides: short sides in pixels before the crop.
        crop_long_side: as `long_side`, before the crop.
        crop_size: minimum and maximum side of the crop in pixels; a smaller image is not enlarged for it.
        crop: probability of policy B.
        flip: probability of a horizontal flip.
        antialias: low-pass filter when downscaling. No effect when upscaling; the official code does not use it.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = tuple(range(480, 801, 32)),
        long_side: int = 1333,
        crop_short_sides: Sequence[int] = (400, 500, 600),
        crop_long_side: int = 4200,
        crop_size: tuple[int, int] = (384, 600),
        crop: float = 0.5,
        flip: float = 0.5,
        antialias: bool = True,
    ) -> None:
        if not short_sides or (crop > 0 and not crop_short_sides):
            raise ValueError("short_sides and crop_short_sides need at least one size each.")
        if not 0 < crop_size[0] <= crop_size[1]:
            raise ValueError(f"crop_size {tuple(crop_size)} must be (smallest, largest) side in pixels.")
        self.short_sides, self.long_side = tuple(short_sides), long_side
        self.crop_short_sides, self.crop_long_side = tuple(crop_short_sides), crop_long_side
        self.crop_size, self.crop, self.flip = tuple(crop_size), crop, flip
        self.antialias = antialias

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Augment one image.

        Args:
            image: (3, h, w) uint8.
            target: has "boxes" (n, 4) float32 xyxy pixels, "labels" (n,) and perhaps "masks" (n, h, w) uint8; other
                entries are returned unchanged.
            generator: source of every random choice.

        Returns:
            the augmented image and target; it may have fewer objects.
        """
        if uniform(generator) < self.flip:
            image, target = flip_sample(image, target)
        if uniform(generator) < self.crop:
            image, target = self._resize(image, target, self.crop_short_sides, self.crop_long_side, generator)
            image, target = self._crop(image, target, generator)
        image, target = self._resize(image, target, self.short_sides, self.long_side, generator)
        return image.contiguous(), target

    def largest_sizes(self, height: int, width: int) -> list[Size]:
        """Return (h, w) of the tallest, the widest and the largest images that one of this size can become.

        A crop of a landscape image can be portrait, so the sizes of both policies count.
        """
        ratios = [width / height] if self.crop < 1 else []
        for short_side in self.crop_short_sides if self.crop > 0 else ():
            h, w = resized_size(height, width, short_side, self.crop_long_side)
            low, high = self.crop_size
            narrowest, widest = min(w, low) / min(h, high), min(w, high) / min(h, low)
            ratios += [narrowest, widest]
            # the area is largest with both sides at their maximum, if a crop can have that ratio
            full = self.long_side / max(self.short_sides)
            ratios += [min(max(ratio, narrowest), widest) for ratio in (full, 1 / full)]
        return [resized_size(1.0, ratio, max(self.short_sides), self.long_side) for ratio in ratios]

    def _resize(
        self, image: Tensor, target: Target, short_sides: Sequence[int], long_side: int, generator: torch.Generator
    ) -> tuple[Tensor, Target]:
        short_side = short_sides[integer(0, len(short_sides) - 1, generator)]
        size = resized_size(image.shape[-2], image.shape[-1], short_side, long_side)
        return resize_sample(image, target, size, self.antialias)

    def _crop(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        h, w = image.shape[-2:]
        low, high = self.crop_size
        crop_h = integer(min(h, low), min(h, high), generator)
        crop_w = integer(min(w, low), min(w, high), generator)
        top, left = integer(0, h - crop_h, generator), integer(0, w - crop_w, generator)
        return crop_sample(image, target, (top, left, crop_h, crop_w))


class EvalTransforms:
    """Resize image, boxes and masks. Arguments as for `TrainTransforms`.

    Args:
        short_side, long_side: as `TrainTransforms.short_sides` and `long_side`.
        antialias: as there.
        size: (h, w) pixels to resize to whatever the aspect ratio, instead of the two limits.
        within: (H, W) pixels that a resized image must fit into besides.
        canvas: side in pixels of a square to fit the image into, instead of all of these: the rest of it is gray, and
            for the detector a part of the image.
    """

    def __init__(
        self,
        short_side: int = 800,
        long_side: int = 1333,
        antialias: bool = True,
        *,
        size: Size | None = None,
        within: Size | None = None,
        canvas: int | None = None,
    ) -> None:
        self.short_side, self.long_side, self.antialias = short_side, long_side, antialias
        self.size, self.within, self.canvas = size, within, canvas

    def output_size(self, height: int, width: int) -> Size:
        """Return (h, w) of what an image of this size becomes, its canvas included."""
        return self.resized(height, width) if self.canvas is None else (self.canvas, self.canvas)

    def resized(self, height: int, width: int) -> Size:
        """Return (h, w) of an image of this size after resizing, without its canvas."""
        if self.canvas is not None:
            return resized_size(height, width, self.canvas, self.canvas)
        return self.size or resized_size(height, width, self.short_side, self.long_side, self.within)

    def content_sizes(self, height: int, width: int) -> tuple[Size, ...] | None:
        """Return (h, w) of an image of this size inside the canvas of each view; None without a canvas."""
        return None if self.canvas is None else (self.resized(height, width),)

    def __call__(
        self, image: Tensor, target: Target, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Target]:
        """Resize a (3, h, w) uint8 image and its target; `generator` is unused.

        With a canvas the target also has "content_sizes", as `content_sizes` returns them.
        """
        stored = image.shape[-2], image.shape[-1]
        image, target = resize_sample(image, target, self.resized(*stored), self.antialias, clip=False)
        if self.canvas is None:
            return image, target
        image, target = place_on_canvas(image, target, (self.canvas, self.canvas))
        return image, {**target, "content_sizes": self.content_sizes(*stored)}

    def output_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return (h, w) of each view of an image: here there is one."""
        return (self.output_size(height, width),)

    def views(self, image: Tensor) -> list[Tensor]:
        """Resize a (3, h, w) uint8 image to each size that the detector is to see it in: here one."""
        view = resize_image(image, self.resized(image.shape[-2], image.shape[-1]), self.antialias)
        return [view if self.canvas is None else pad_to(view, (self.canvas, self.canvas), CANVAS_COLOR)]


class MultiScaleTransforms:
    """Resize an image to several sizes, one after the other; boxes and masks follow the first.

    Args:
        scales: the resizing to each size.
    """

    def __init__(self, scales: Sequence[EvalTransforms]) -> None:
        self.scales = tuple(scales)

    def output_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return (h, w) of an image of this size in each scale."""
        return tuple(scale.output_size(height, width) for scale in self.scales)

    def content_sizes(self, height: int, width: int) -> tuple[Size, ...] | None:
        """Return (h, w) of an image of this size inside the canvas of each scale; None without canvases."""
        sizes = [scale.content_sizes(height, width) for scale in self.scales]
        return None if sizes[0] is None else tuple(size for own in sizes if own is not None for size in own)

    def views(self, image: Tensor) -> list[Tensor]:
        """Resize a (3, h, w) uint8 image to each size."""
        return [view for scale in self.scales for view in scale.views(image)]

    def __call__(
        self, image: Tensor, target: Target, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], Target]:
        """Resize a (3, h, w) uint8 image to each size, and its target to the first; `generator` is unused."""
        first, resized = self.scales[0](image, target)
        if (sizes := self.content_sizes(image.shape[-2], image.shape[-1])) is not None:
            resized["content_sizes"] = sizes
        return [first, *(view for scale in self.scales[1:] for view in scale.views(image))], resized


def flip_sample(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror an image (3, h, w), its boxes and its masks horizontally."""
    flipped = {**target, "boxes": F.horizontal_flip(_as_boxes(target["boxes"], image)).as_subclass(Tensor)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return F.horizontal_flip(image), flipped


def resize_sample(
    image: Tensor, target: Target, size: Size, antialias: bool = True, *, clip: bool = True
) -> tuple[Tensor, Target]:
    """Resize an image (3, h, w), its boxes and its masks.

    Args:
        image: (3, h, w) uint8.
        target: with "boxes" (n, 4) xyxy pixels and perhaps "masks" (n, h, w).
        size: new (h, w), of any aspect ratio.
        antialias: low-pass filter when downscaling.
        clip: clip the boxes to the image.
    """
    boxes = F.resize(_as_boxes(target["boxes"], image), list(size))
    resized = {**target, "boxes": (F.clamp_bounding_boxes(boxes) if clip else boxes).as_subclass(Tensor)}
    if "masks" in target:
        resized["masks"] = resize_masks(target["masks"], size)
    return resize_image(image, size, antialias), resized


def crop_sample(
    image: Tensor, target: Target, area: tuple[int, int, int, int], fill: Sequence[float] = (0, 0, 0)
) -> tuple[Tensor, Target]:
    """Cut an area out of an image and its target, and drop the objects outside.

    Args:
        image: (3, h, w) uint8.
        target: its objects.
        area: (top, left, height, width) pixels, which may reach beyond the image.
        fill: RGB in 0..255 beyond the image.
    """
    boxes = F.clamp_bounding_boxes(F.crop(_as_boxes(target["boxes"], image), *area)).as_subclass(Tensor)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    cropped = {**target, "boxes": boxes}
    if "masks" in target:
        cropped["masks"] = _cut(target["masks"], area, target["masks"].new_zeros(1, 1, 1))
    colors = torch.tensor(fill).round().to(image.dtype)[:, None, None]
    return _cut(image, area, colors), keep_objects(cropped, keep)


def _cut(planes: Tensor, area: tuple[int, int, int, int], fill: Tensor) -> Tensor:
    """Cut (top, left, height, width) out of planes (c, h, w); beyond them it is `fill` (c or 1, 1, 1)."""
    top, left, height, width = area
    y0, x0 = max(top, 0), max(left, 0)
    inner = planes[:, y0 : max(top + height, y0), x0 : max(left + width, x0)]
    if inner.shape[1:] == (height, width):
        return inner
    cut = fill.expand(len(planes), height, width).clone()
    cut[:, y0 - top : y0 - top + inner.shape[1], x0 - left : x0 - left + inner.shape[2]] = inner
    return cut


def place_on_canvas(image: Tensor, target: Target, size: Size) -> tuple[Tensor, Target]:
    """Lay an image (3, h, w) and its masks on a gray canvas of (H, W) pixels, at its top left; boxes stay.

    Args:
        image: (3, h, w) uint8, not larger than the canvas.
        target: its objects.
        size: (H, W) of the canvas.
    """
    if "masks" in target:
        target = {**target, "masks": pad_to(target["masks"], size)}
    return pad_to(image, size, CANVAS_COLOR), target


def keep_objects(target: Target, keep: Tensor) -> Target:
    """Select the objects of a boolean mask (n,): boxes, labels and masks."""
    return {**target, **{name: target[name][keep] for name in ("boxes", "labels", "masks") if name in target}}


def _as_boxes(boxes: Tensor, image: Tensor) -> tv_tensors.BoundingBoxes:
    size = (image.shape[-2], image.shape[-1])
    return tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size)


def resize_image(image: Tensor, size: Size, antialias: bool) -> Tensor:
    """Resize an image (3, h, w) uint8 of any strides bilinearly to (h, w) = `size`; the result is contiguous.

    An image whose pixels lie one after the other, as `read_image` returns it, is resized as it lies: torch would first
    bring any other into that order, which for a large image takes longer than the resizing.
    """
    if 1 in (*size, *image.shape[-2:]):
        image = image.contiguous()  # with one row or column torch takes the order of the channels for another one
    if tuple(image.shape[-2:]) != size:
        image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    return image.contiguous()


def uniform(generator: torch.Generator) -> float:
    """Draw a number from [0, 1)."""
    return float(torch.rand((), generator=generator))


def integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
