"""The augmentation of SSD: photometric distortion, zooming out and in, and a fixed size whatever the aspect ratio.

Liu et al., "SSD: Single Shot MultiBox Detector", sections 2.2 (data augmentation) and 3.6 (expansion), with the
ranges of its code. The one-stage detectors of the aLRP Loss paper (512 and 800 pixels) and YOLACT (550) are trained
with it.

Random numbers come from the caller's generator, as in `transforms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from brs_detr.data.coco import Target
from brs_detr.data.transforms import Size, crop_sample, flip_sample, integer, keep_objects, resize_sample, uniform

Area = tuple[int, int, int, int]  # (top, left, height, width) pixels, relative to the image; may reach beyond it

_TRIALS = 50  # crops that are drawn for a minimum IoU before another minimum is chosen, as in SSD's code
IMAGENET_MEAN = (123.675, 116.28, 103.53)


class SSDTransforms:
    """Distort colors, zoom out, zoom in, resize to one size, and flip.

    Zooming out places the image at random on a canvas of the mean color, with up to `max_expand` times its sides.
    Zooming in keeps the image as it is, or cuts out a part whose IoU with every object is at least a chosen minimum;
    objects whose center is outside are dropped.

    Args:
        size: (h, w) pixels of the result.
        brightness: largest amount, of 255, that is added to or subtracted from all channels.
        contrast, saturation: factors are drawn from this range.
        hue: largest rotation of the hue in degrees.
        max_expand: largest factor of the canvas's sides, 1 is off.
        probability: of each of the four distortions, and of the expansion.
        crop_ious: minimum IoUs to choose from, besides the image as it is; 0 is any part. Empty: no crops.
        min_crop: smallest side of a crop, as a fraction of the side of the image or canvas.
        flip: probability of a horizontal flip.
        mean: RGB in 0..255 of the canvas: 0 after the usual normalization.
        antialias: low-pass filter when downscaling.
    """

    def __init__(
        self,
        *,
        size: Size = (512, 512),
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
        max_expand: float = 4.0,
        probability: float = 0.5,
        crop_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop: float = 0.3,
        flip: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        antialias: bool = True,
    ) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop={min_crop} must be in (0, 1].")
        if max_expand < 1:
            raise ValueError(f"max_expand={max_expand} must be at least 1.")
        self.size, self.brightness, self.contrast, self.saturation, self.hue = (
            size,
            brightness,
            contrast,
            saturation,
            hue,
        )
        self.max_expand, self.probability, self.crop_ious = max_expand, probability, tuple(crop_ious)
        self.min_crop, self.flip, self.mean, self.antialias = min_crop, flip, tuple(mean), antialias

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Augment one image; arguments and result as of `TrainTransforms`."""
        image, target = self._shrunk(image, target)
        image = self._distort(image, generator)
        canvas = self._expanded(image.shape[-2], image.shape[-1], generator)
        area, keep = self._part(canvas, target["boxes"], generator)
        # one cut for both, since a canvas may have 16 times the pixels of its image, and each mask as many
        image, target = crop_sample(image, keep_objects(target, keep), area, self.mean)
        image, target = resize_sample(image, target, self.size, self.antialias)
        if uniform(generator) < self.flip:
            image, target = flip_sample(image, target)
        return image.contiguous(), target

    def largest_sizes(self, height: int, width: int) -> list[Size]:
        """Return (h, w) of the largest images that one of this size can become, as `TrainTransforms` does."""
        return [self.size]

    def _shrunk(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Shrink an image of which even the smallest part has more pixels than the result.

        Colors are distorted as float32, and a canvas may have 16 times the pixels: of a photo of 24 megapixels that
        would be 0.3 and 1.2 GB in each worker.
        """
        height, width = image.shape[-2:]
        scale = max(self.size[0] / (self.min_crop * height), self.size[1] / (self.min_crop * width))
        if scale >= 1:
            return image, target
        return resize_sample(image, target, (math.ceil(scale * height), math.ceil(scale * width)), self.antialias)

    def _distort(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Change brightness, contrast, saturation and hue of (3, h, w) uint8, each with the given probability.

        The values are neither rounded nor clipped in between; contrast comes before or after the colors.
        """
        pixels = image.float()
        if uniform(generator) < self.probability:
            pixels = pixels + _between((-self.brightness, self.brightness), generator)
        early = uniform(generator) < 0.5
        if early:
            pixels = self._scale(pixels, generator)
        if uniform(generator) < self.probability:
            # HSV's saturation times a factor, at the same hue and value: every channel's distance from the largest
            value = pixels.amax(0, keepdim=True)
            pixels = value - (value - pixels) * _between(self.saturation, generator)
        if uniform(generator) < self.probability:
            turn = _between((-self.hue, self.hue), generator) / 360
            pixels = F.adjust_hue((pixels / 255).clamp(0, 1), turn) * 255
        if not early:
            pixels = self._scale(pixels, generator)
        return pixels.round_().clamp_(0, 255).to(torch.uint8)

    def _scale(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Change the contrast, which is a factor on all values."""
        return pixels * _between(self.contrast, generator) if uniform(generator) < self.probability else pixels

    def _expanded(self, height: int, width: int, generator: torch.Generator) -> Area:
        """Return the area of a canvas around the image, or the image's own."""
        if uniform(generator) >= self.probability:
            return 0, 0, height, width
        factor = _between((1.0, self.max_expand), generator)
        canvas_h, canvas_w = int(height * factor), int(width * factor)
        top, left = integer(0, canvas_h - height, generator), integer(0, canvas_w - width, generator)
        return -top, -left, canvas_h, canvas_w

    def _part(self, canvas: Area, boxes: Tensor, generator: torch.Generator) -> tuple[Area, Tensor]:
        """Choose the canvas or a part of it, and the objects (n,) bool that stay."""
        while self.crop_ious:
            choice = integer(0, len(self.crop_ious), generator)
            if choice == len(self.crop_ious):
                break
            parts = self._draw_parts(canvas, generator)
            valid, inside = _usable(parts, boxes, self.crop_ious[choice])
            if valid.any():
                first = int(valid.int().argmax())
                left, top, right, bottom = parts[first].int().tolist()
                return (top, left, bottom - top, right - left), inside[first]
        return canvas, torch.ones(len(boxes), dtype=torch.bool)

    def _draw_parts(self, canvas: Area, generator: torch.Generator) -> Tensor:
        """Draw parts of a canvas, (50, 4) xyxy integer pixels; all at once, so that a choice takes 50 draws always."""
        top, left, height, width = canvas
        draws = torch.rand(_TRIALS, 4, generator=generator)
        sides = torch.tensor([width, height]) * (self.min_crop + (1 - self.min_crop) * draws[:, :2])
        corners = torch.tensor([left, top]) + ((torch.tensor([width, height]) - sides) * draws[:, 2:]).floor()
        return torch.cat([corners, corners + sides.floor().clamp(min=1)], dim=1)


def _usable(parts: Tensor, boxes: Tensor, min_iou: float) -> tuple[Tensor, Tensor]:
    """Check parts of an image.

    Args:
        parts: (k, 4) xyxy pixels.
        boxes: (n, 4) xyxy pixels.
        min_iou: minimum IoU of a part with each object.

    Returns:
        which parts can be used (k,), and the objects whose centers are inside each (k, n).
    """
    width, height = (parts[:, 2:] - parts[:, :2]).unbind(1)
    valid = (height <= 2 * width) & (width <= 2 * height)
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2)[None]
    inside = ((centers > parts[:, None, :2]) & (centers < parts[:, None, 2:])).all(2)
    if len(boxes):
        valid &= inside.any(1) & (box_iou(parts, boxes).amin(1) >= min_iou)
    return valid, inside


def _between(limits: tuple[float, float], generator: torch.Generator) -> float:
    """Draw a number between two limits."""
    return limits[0] + (limits[1] - limits[0]) * uniform(generator)
