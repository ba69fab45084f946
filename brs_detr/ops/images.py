"""A batch of images of different sizes, zero-padded to one tensor.

The sizes stay on the host as plain integers: masks, anchor validity and clipping follow from them without waiting for
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]
CANVAS_COLOR = 114  # of 255, before normalizing: the gray of the released code


def resized_size(height: float, width: float, short_side: float, long_side: float, within: Size | None = None) -> Size:
    """Compute the size of an image after resizing with its aspect ratio kept.

    Args:
        height, width: pixels of the image.
        short_side: of the result, unless its long side would exceed `long_side`.
        long_side: largest long side.
        within: (H, W) that the result must fit into; None for no such limit.

    Returns:
        (h, w), each at least 1.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    if within is not None:
        scale = min(scale, within[0] / height, within[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def level_sizes(shapes: Sequence[Size], like: Tensor) -> Tensor:
    """Convert (h, w) of L feature levels to (L, 2) as (w, h), in dtype and on device of `like`, without waiting."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=like.dtype)
    return sizes.to(like.device, non_blocking=True)


def padding_mask(sizes: Tensor, height: int, width: int) -> Tensor:
    """Return where images of sizes (B, 2) as (h, w) are padded at the right and bottom: (B, height, width) bool."""
    # by comparison and not by slices, whose bounds would be constants of an exported graph
    below = torch.arange(height, device=sizes.device) >= sizes[:, :1]
    beside = torch.arange(width, device=sizes.device) >= sizes[:, 1:]
    return below[:, :, None] | beside[:, None, :]


def pad_to(planes: Tensor, size: Size, fill: int = 0) -> Tensor:
    """Pad planes (..., h, w) at the right and bottom to (..., H, W); the same tensor where they have that size."""
    height, width = planes.shape[-2:]
    if (height, width) == size:
        return planes
    canvas = planes.new_full((*planes.shape[:-2], *size), fill)
    canvas[..., :height, :width] = planes
    return canvas


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images padded at the right and bottom.

    Attributes:
        pixels: (B, 3, H, W) RGB, uint8 in 0..255 or float; 0 where padded.
        sizes: (height, width) of each image inside the padding.
        original_sizes: (height, width) of each image as stored on disk; detections are reported in this frame.
        content_sizes: (height, width) of the stored image after resizing, where it lies at the top left of a canvas
            that is as large as `sizes` and that the detector sees as a part of the image; None: there is no canvas.
    """

    pixels: Tensor
    sizes: list[Size]
    original_sizes: list[Size]
    content_sizes: list[Size] | None = None

    @classmethod
    def from_list(
        cls,
        images: Sequence[Tensor],
        original_sizes: Sequence[Size] | None = None,
        content_sizes: Sequence[Size] | None = None,
    ) -> ImageBatch:
        """Pad (3, h, w) tensors to the largest height and width among them (no rounding to a multiple of 32)."""
        if not images:
            raise ValueError("images: a batch needs at least one image")
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        pixels = images[0].new_zeros(len(images), 3, height, width)
        for row, image, (h, w) in zip(pixels, images, sizes, strict=True):
            row[:, :h, :w].copy_(image)
        contents = None if content_sizes is None else list(content_sizes)
        return cls(pixels, sizes, list(original_sizes) if original_sizes is not None else sizes, contents)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def padded_size(self) -> Size:
        """Return (H, W) of the padded tensor."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ImageBatch:
        """Move the pixels; the sizes stay on the host."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """Pin the pixels; called by `DataLoader(pin_memory=True)`."""
        return replace(self, pixels=self.pixels.pin_memory())

    def padding_mask(self) -> Tensor:
        """Return (B, H, W) bool on the pixels' device, True where padded."""
        return padding_mask(torch.tensor(self.sizes).to(self.pixels.device, non_blocking=True), *self.padded_size)

    def flipped(self) -> ImageBatch:
        """Mirror each image horizontally inside its own size; the padding, or the canvas, stays at the right."""
        pixels = self.pixels.clone()
        for row, image, (h, w) in zip(pixels, self.pixels, self.content_sizes or self.sizes, strict=True):
            row[:, :h, :w] = image[:, :h, :w].flip(-1)
        return replace(self, pixels=pixels)


@dataclass(frozen=True)
class ImageViews:
    """The same images resized to several sizes, as a detector sees them in multi-scale testing.

    Attributes:
        scales: one batch for each size; their `original_sizes` are equal.
    """

    scales: list[ImageBatch]

    def __len__(self) -> int:
        return len(self.scales[0])

    @property
    def original_sizes(self) -> list[Size]:
        """Return (height, width) of each image as stored on disk."""
        return self.scales[0].original_sizes

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ImageViews:
        """Move the pixels; the sizes stay on the host."""
        return ImageViews([scale.to(device, non_blocking) for scale in self.scales])

    def pin_memory(self) -> ImageViews:
        """Pin the pixels; called by `DataLoader(pin_memory=True)`."""
        return ImageViews([scale.pin_memory() for scale in self.scales])


Batch = tuple[ImageBatch, list[dict[str, Any]]]
