"""Instance masks: from box to image and back, as training targets, and how much two masks have in common.

A mask head predicts a small square that covers a box. `paste_masks` resamples it to the pixels of the image,
`mask_targets` cuts an object's bitmap to the same square, so each is the other's inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from brs_detr.ops.rle import RLE, Size, as_text, draw, encode, nearest_centers, pack_segmentation, stated_size

_CHUNK_PIXELS = 2**25  # pixels that are resampled at once, 128 MB as float32


def resize_masks(masks: Tensor, size: Size) -> Tensor:
    """Resize bitmaps (n, h, w) to (h, w) = `size`, each pixel that of the nearest center.

    On the CPU only the rows and columns of each object are resampled; the rest of its bitmap is 0.
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    if masks.numel() == 0:
        return masks.new_zeros(len(masks), *size)
    if masks.device.type != "cpu":
        return F.interpolate(masks[:, None], list(size), mode="nearest-exact")[:, 0]
    old, new = masks.numpy(), masks.new_zeros(len(masks), *size)
    sources = [nearest_centers(before, side) for side, before in zip(size, old.shape[1:], strict=True)]
    for before, after in zip(old, new.numpy(), strict=True):
        # the new rows and columns between the first and the last that are not empty
        spans = [np.flatnonzero(before.any(axis)[source]) for axis, source in ((1, sources[0]), (0, sources[1]))]
        if all(map(len, spans)):
            (y0, y1), (x0, x1) = ((int(span[0]), int(span[-1]) + 1) for span in spans)
            after[y0:y1, x0:x1] = before[sources[0][y0:y1, None], sources[1][x0:x1]]
    return new


def boxes_around(masks: Tensor) -> Tensor:
    """Return the boxes (n, 4) float32 xyxy pixels around bitmaps (n, h, w); zeros around an empty one."""
    spans = []
    for inside in (masks.any(dim=1), masks.any(dim=2)):  # of the columns, of the rows
        side = inside.shape[1]
        position = torch.arange(1, side + 1, device=masks.device)
        end = (inside * position).amax(dim=1)  # 1 after the last
        begin = side - (inside * position.flip(0)).amax(dim=1)
        spans.append((torch.minimum(begin, end), end))
    (x1, x2), (y1, y2) = spans
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def shrink_masks(masks: Tensor, frame: Size, size: Size) -> Tensor:
    """Resample bitmaps of an image to a coarser map of its padded batch, bilinearly, > 0.5.

    Args:
        masks: (n, h, w) bitmaps.
        frame: (H, W) pixels of the padded batch, at least (h, w); the image lies at its top left.
        size: (rows, columns) of the map.

    Returns:
        (n, rows, columns) bool.
    """
    if not len(masks):
        return masks.new_zeros(0, *size, dtype=torch.bool)
    padded = F.pad(masks, (0, frame[1] - masks.shape[2], 0, frame[0] - masks.shape[1]))  # before there are floats
    return F.interpolate(padded[:, None].float(), size, mode="bilinear")[:, 0] > 0.5


def inside_boxes(boxes: Tensor, size: Size, border: float = 0.0) -> Tensor:
    """Return (n, h, w) bool, True for the cells of a map that begin inside boxes (n, 4) xyxy cells, grown by `border`.

    The last column and row are those that begin before the right and lower side, as in YOLACT's code.
    """
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    y = torch.arange(size[0], device=boxes.device)
    x = torch.arange(size[1], device=boxes.device)
    rows, columns = (y >= y1 - border) & (y < y2 + border), (x >= x1 - border) & (x < x2 + border)
    return rows[:, :, None] & columns[:, None, :]


def require_masks(targets: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the objects of an image have no masks to learn.

    Raises:
        ValueError: naming the image and what is missing.
    """
    for position, target in enumerate(targets):
        if "masks" not in target:
            raise ValueError(
                f"targets of the batch's image {position}: no `masks`. Read the dataset with its masks, or choose a "
                "detector of boxes."
            )
        if len(target["masks"]) != len(target["boxes"]):
            raise ValueError(
                f"targets of the batch's image {position}: {len(target['masks'])} masks of {len(target['boxes'])} "
                "boxes. Give one per box."
            )


Beyond = Literal["zeros", "border"]


def paste_masks(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5, beyond: Beyond = "zeros") -> Tensor:
    """Resample masks that cover their boxes to the pixels of the image, bilinearly.

    The squares' pixels are areas, not points: the first one's center lies half a pixel inside the box, as it does in
    RoIAlign (Detectron2's `paste_masks_in_image`). Beyond them a mask falls to 0, to one half at the border of the box.

    Args:
        masks: (n, s, t) probabilities.
        boxes: (n, 4) xyxy pixels of the image; they may reach beyond it.
        size: (h, w) pixels of the image.
        threshold: a pixel belongs to the object where its probability is at least this.
        beyond: what lies around a mask: "zeros", or the values at its "border", where a mask covers the whole image.

    Returns:
        (n, h, w) bool, on the masks' device.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, len(masks), step):
        chunk = slice(start, start + step)
        pasted[chunk] = _paste(masks[chunk].float(), boxes[chunk].float(), size, beyond) >= threshold
    return pasted


def _paste(masks: Tensor, boxes: Tensor, size: Size, beyond: Beyond) -> Tensor:
    """Return the probabilities (n, h, w) at the pixels' centers."""
    # bilinear weights are products of those along y and along x, and so need no grid of positions
    rows = _weights(boxes[:, 1], boxes[:, 3], size[0], masks.shape[1], beyond)
    columns = _weights(boxes[:, 0], boxes[:, 2], size[1], masks.shape[2], beyond)
    return rows @ masks @ columns.transpose(1, 2)


def _weights(low: Tensor, high: Tensor, pixels: int, side: int, beyond: Beyond) -> Tensor:
    """Return the weights (n, pixels, side) of a mask's rows at the pixels' centers."""
    centers = torch.arange(pixels, device=low.device, dtype=low.dtype) + 0.5
    # a box of no width holds no pixel: the clamp keeps its positions finite
    position = (centers - low[:, None]) / (high - low)[:, None].clamp(min=1e-6) * side - 0.5
    if beyond == "border":
        position = position.clamp(0, side - 1)
    distance = (position[:, :, None] - torch.arange(side, device=low.device)).abs()
    return (1 - distance).clamp(min=0)


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int = 28) -> Tensor:
    """Cut objects' bitmaps to boxes, as the targets of a mask head.

    RoIAlign of the bitmap with as many samples as pixels, then >= 0.5, as Mask R-CNN's implementations do it.

    Args:
        masks: (m, h, w) bitmaps of one image's objects, uint8 or bool.
        boxes: (P, 4) xyxy pixels.
        objects: (P,) int64, the object of each box.
        side: height and width of a target.

    Returns:
        (P, side, side) float32, 0 or 1.
    """
    if not len(masks) or not len(boxes):
        return boxes.new_zeros(len(boxes), side, side, dtype=torch.float32)
    rois = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1).float()
    pooled: Tensor = roi_align(masks[:, None].float(), rois, side, spatial_scale=1.0, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).float()


def encode_masks(masks: Tensor) -> list[RLE]:
    """Encode bitmaps (n, h, w) as COCO's compressed run lengths, with `counts` as str."""
    return [as_text(encode(mask)) for mask in masks.cpu().numpy()]


def as_rles(masks: Tensor | Sequence[RLE]) -> list[RLE]:
    """Return the masks of a detector's output, bitmaps (n, h, w) or run lengths, as run lengths."""
    return encode_masks(masks) if isinstance(masks, Tensor) else list(masks)


def decode_masks(rles: Sequence[RLE], size: Size) -> Tensor:
    """Draw compressed run lengths of an image of (h, w) pixels as bitmaps (n, h, w) uint8.

    Raises:
        ValueError: they are malformed, or of another size.
    """
    bitmaps = np.zeros((len(rles), *size), np.uint8)
    for bitmap, rle in zip(bitmaps, rles, strict=True):
        words = np.frombuffer(pack_segmentation(as_text(rle)), np.uint32)
        if not len(words) or stated_size(words) != tuple(size):
            raise ValueError(f"mask: these are not run lengths of {size[1]}x{size[0]} pixels: {str(rle)[:80]}.")
        draw(words, size, out=bitmap)
    return torch.from_numpy(bitmaps)


def paste_and_encode(
    masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5, beyond: Beyond = "zeros"
) -> list[RLE]:
    """Paste masks as `paste_masks` does, and encode them; never more than a chunk of bitmaps is held at once."""
    step = max(1, _CHUNK_PIXELS // (size[0] * size[1]))
    chunks = (slice(start, start + step) for start in range(0, len(masks), step))
    pasted = (paste_masks(masks[chunk], boxes[chunk], size, threshold, beyond) for chunk in chunks)
    return [rle for bitmaps in pasted for rle in encode_masks(bitmaps)]


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the IoU of every pair of bitmaps.

    Args:
        first: (n, h, w) bool, or 0 and 1.
        second: (m, h, w) of the same size.

    Returns:
        (n, m) float32; 0 where both are empty.
    """
    a, b = first.flatten(1).float(), second.flatten(1).float()
    shared = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - shared
    return shared / union.clamp(min=1)


def dice_coefficient(probabilities: Tensor, targets: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the Dice coefficient of paired masks: 2 sum(p t) / (sum(p^2) + sum(t^2) + eps).

    Milletari et al., "V-Net", with squares in the denominator; 1 minus it is the mask loss of Rank & Sort, its
    supplement's Mask R-CNN.

    Args:
        probabilities: (n, ...) in [0, 1].
        targets: (n, ...) of the same shape, 0 or 1.
        eps: keeps a pair of empty masks finite; it then has the coefficient 0.

    Returns:
        (n,) in [0, 1], differentiable.
    """
    p, t = probabilities.flatten(1).float(), targets.flatten(1).float()
    return 2 * (p * t).sum(1) / ((p * p).sum(1) + (t * t).sum(1) + eps)


def matrix_nms(masks: Tensor, labels: Tensor, scores: Tensor, sigma: float = 2.0) -> Tensor:
    """Lower the scores of masks that overlap better ones of their class, all at once (Wang et al., "SOLOv2", Eq. 5).

    A mask j is lowered by min over better masks i of f(IoU_ij) / f(largest IoU of i with masks better than i), where
    f = exp(-sigma IoU^2): one that is itself lowered lowers others less.

    Args:
        masks: (n, h, w) bool, best first.
        labels: (n,).
        scores: (n,), descending.
        sigma: of the Gaussian; the paper divides by it, its code multiplies.

    Returns:
        (n,) scores.
    """
    if not len(masks):
        return scores
    iou = torch.where(labels[:, None] == labels, mask_iou(masks, masks), 0.0).triu(diagonal=1)
    largest = iou.amax(dim=0)[:, None]
    # entries that are not of a better mask have an IoU of 0, and so a factor of at least 1
    return scores * (sigma * (largest.square() - iou.square())).exp().amin(dim=0)
