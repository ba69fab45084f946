"""Tint the objects of an image in the colors of their classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

OPACITY = 0.45  # of the tint: the object's own texture stays visible


def tint(image: Image.Image, masks: Tensor, colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Blend each mask's color into a copy of an image, and outline it, so that touching objects can be told apart.

    Args:
        image: RGB, of any size.
        masks: (n, h, w) bitmaps, which are resized to the image; later ones cover earlier ones.
        colors: of each mask.

    Returns:
        An RGB image of the same size.
    """
    pixels = np.array(image, np.float32)
    size = pixels.shape[:2]
    for mask, color in zip(masks.cpu(), colors, strict=True):
        if not mask.any():
            continue
        inside = F.interpolate(mask[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0] >= 0.5
        # pixels of the object with a neighbor outside: a minimum over 3 x 3 erodes it
        eroded = -F.max_pool2d(-inside[None].float(), 3, stride=1, padding=1)[0] > 0
        area, border = inside.numpy(), (inside & ~eroded).numpy()
        pixels[area] += OPACITY * (np.array(color, np.float32) - pixels[area])
        pixels[border] = color
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
