"""Multi-scale and flip testing: detections of an image in several sizes and mirrored are joined.

Each view is predicted as an image of its own, whatever the detector and the head. Its boxes and masks are mapped back
to the stored image; where those of a class overlap, the one with the highest score stays. With a single view nothing
is joined, so the detections are those without this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from brs_detr.ops.images import ImageBatch, ImageViews, Size
from brs_detr.ops.masks import as_rles, decode_masks, encode_masks

Found = dict[str, Any]
ByHead = dict[str, list[Found]]


def detect_in_views(
    detect: Callable[[ImageBatch], ByHead], images: ImageBatch | ImageViews, *, flip: bool, nms_iou: float
) -> ByHead:
    """Detect objects in every view of the images and join the detections of each head.

    Args:
        detect: returns the detections of each image by head, in pixels of the stored image: `boxes` (n, 4) xyxy,
            `scores` (n,), `labels` (n,) and perhaps `masks`.
        images: one batch, or one for each scale.
        flip: also look at every scale mirrored.
        nms_iou: of detections of a class that overlap more, the one with the highest score stays.

    Returns:
        As `detect`; of several views best first, as many as do not overlap.
    """
    scales = images.scales if isinstance(images, ImageViews) else [images]
    views = [detect_on_canvas(detect, scale) for scale in scales]
    if flip:
        mirrored = [detect_on_canvas(detect, scale.flipped()) for scale in scales]
        views += [_mirrored_back(by_head, images.original_sizes) for by_head in mirrored]
    if len(views) == 1:
        return views[0]
    return {
        head: [join([view[head][image] for view in views], nms_iou) for image in range(len(images))]
        for head in views[0]
    }


def detect_on_canvas(detect: Callable[[ImageBatch], ByHead], images: ImageBatch) -> ByHead:
    """Detect objects in a batch, and map those of images that lie on a canvas back to the stored images.

    Args:
        detect: as of `detect_in_views`; it scales what it finds from `sizes` to `original_sizes`, and knows no canvas.
        images: a batch, with or without `content_sizes`.

    Returns:
        As `detect`. With a canvas, boxes are clipped to the stored image, and those beside it are dropped.
    """
    if images.content_sizes is None:
        return detect(images)
    frames, factors = [], []
    for canvas, content, stored in zip(images.sizes, images.content_sizes, images.original_sizes, strict=True):
        # the canvas at the scale of the stored image, in whole pixels as masks need it, and what this rounds away
        frame = tuple(-(-side * full // own) for side, own, full in zip(canvas, content, stored, strict=True))
        frames.append((frame[0], frame[1]))
        factors.append([canvas[axis] * stored[axis] / (content[axis] * frame[axis]) for axis in (1, 0, 1, 0)])
    by_head = detect(replace(images, original_sizes=frames, content_sizes=None))
    return {
        head: [
            _off_canvas(own, factor, frame, size)
            for own, factor, frame, size in zip(found, factors, frames, images.original_sizes, strict=True)
        ]
        for head, found in by_head.items()
    }


def _off_canvas(found: Found, factors: Sequence[float], frame: Size, size: Size) -> Found:
    """Map the detections of one image from its canvas to the image of (h, w) = `size` at its top left.

    Args:
        found: `boxes` (n, 4) xyxy pixels of the frame, `scores`, `labels`, perhaps `masks` of the frame.
        factors: of the four coordinates; they differ from 1 by less than a pixel of the frame.
        frame: (H, W) of the canvas at the scale of the stored image.
        size: of the stored image.
    """
    boxes = clip_boxes_to_image(found["boxes"] * found["boxes"].new_tensor(factors), size)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
    mapped: Found = {"boxes": boxes[kept], "scores": found["scores"][kept], "labels": found["labels"][kept]}
    if "masks" in found:
        rles = as_rles(found["masks"])
        cut = (decode_masks([rles[row]], frame)[:, : size[0], : size[1]] for row in kept.tolist())
        mapped["masks"] = [encode_masks(mask)[0] for mask in cut]
    return mapped


def join(found: Sequence[Found], nms_iou: float) -> Found:
    """Join detections of the same image from several views by suppression within each class, best first."""
    boxes, scores, labels = (torch.cat([own[key] for own in found]) for key in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes.float(), scores.float(), labels, nms_iou)
    joined: Found = {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
    if "masks" in found[0]:
        masks = [rle for own in found for rle in as_rles(own["masks"])]
        joined["masks"] = [masks[index] for index in kept.tolist()]
    return joined


def flip_boxes(boxes: Tensor, width: float) -> Tensor:
    """Mirror boxes (n, 4) xyxy pixels in an image of this width."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def _mirrored_back(by_head: ByHead, sizes: Sequence[Size]) -> ByHead:
    return {
        head: [_mirrored(own, size) for own, size in zip(images, sizes, strict=True)]
        for head, images in by_head.items()
    }


def _mirrored(found: Found, size: Size) -> Found:
    """Mirror the detections of an image of (h, w) pixels; masks become compressed run lengths."""
    mirrored = {**found, "boxes": flip_boxes(found["boxes"], size[1])}
    if "masks" in found:
        # one bitmap at a time: a hundred of a large image would fill the memory
        rles = as_rles(found["masks"])
        mirrored["masks"] = [encode_masks(decode_masks([rle], size).flip(-1))[0] for rle in rles]
    return mirrored
