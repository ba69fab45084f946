"""A mosaic of four training images, as an augmentation of one's own for `benchmarks/accuracy.py`.

    python benchmarks/accuracy.py demo=datasets/demo --variant mosaic data.augment.custom=benchmarks.mosaic:transform

Half of the images become a crop of a 2x2 canvas of themselves and three that were drawn before (YOLOv4; DEIM's dense
one-to-one matching: more objects an image). The crop has 0.5 to 1 of the canvas's sides, so objects keep their size or
lose up to half of it. The images before are remembered by each loader worker: a resumed run draws other ones.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area

PROBABILITY = 0.5
MIN_VISIBLE = 0.3  # share of an object's area that must lie in the crop
_before: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=16)


def transform(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the image, or a mosaic that begins with it.

    Args:
        image: (3, H, W) uint8.
        target: boxes (n, 4) xyxy in pixels, labels (n,).
    """
    own = (image.as_subclass(Tensor), target["boxes"].as_subclass(Tensor), target["labels"])
    _before.append(own)
    if len(_before) < 4 or torch.rand(()) >= PROBABILITY:
        return image, target
    others = [_before[i] for i in torch.randint(len(_before) - 1, (3,)).tolist()]
    image, boxes, labels = _crop(*_join([own, *others]))
    return tv_tensors.Image(image), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:]),  # type: ignore[call-arg]
        "labels": labels,
    }


def _join(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay four images around the middle of a gray canvas twice as high and wide as the largest."""
    height, width = (max(part[0].shape[side] for part in parts) for side in (1, 2))
    canvas = parts[0][0].new_full((3, 2 * height, 2 * width), 114)
    boxes = []
    for i, (image, own, _) in enumerate(parts):
        h, w = image.shape[1:]
        y, x = (height - h, height)[i // 2], (width - w, width)[i % 2]
        canvas[:, y : y + h, x : x + w] = image
        boxes.append(own + own.new_tensor([x, y, x, y]))
    return canvas, torch.cat(boxes), torch.cat([part[2] for part in parts])


def _crop(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crop a window of 0.5 to 1 of the sides, anywhere, and keep the objects that are mostly in it."""
    h, w = (int(side * (0.5 + 0.5 * torch.rand(()))) for side in image.shape[1:])
    y, x = (int(torch.randint(side - size + 1, ())) for side, size in zip(image.shape[1:], (h, w), strict=True))
    window = boxes.new_tensor([x, y, x, y])
    cut = (boxes - window).clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
    keep = ((cut[:, 2:] - cut[:, :2]) > 1).all(1) & (box_area(cut) >= MIN_VISIBLE * box_area(boxes))
    return image[:, y : y + h, x : x + w].contiguous(), cut[keep], labels[keep]
