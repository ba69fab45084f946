"""Resolve the coordinate frame of each image's boxes (EXIF, resizes) and clip boxes to it.

A json may give no size, a wrong one, or that of the image before it was rotated or resized; its boxes tell which.
Boxes that are not in COCO's xywh pixel format are detected as well.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from brs_detr.data.annotations import Images, Objects
from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError, ImageInfo, is_of_turned, read_image_info, same_aspect
from brs_detr.data.issues import DataError, IssueLog


def resolve_image_sizes(
    images: Images,
    objects: Objects,
    image_dir: str | Path,
    log: IssueLog,
    every: bool,
    limits: Limits | None = None,
    retry_seconds: float | None = None,
) -> np.ndarray:
    """Resolve the frame that each image's boxes are drawn in; updates `images.frames` and `images.sizes`.

    Headers are read of the images whose size is missing or exceeded by a box, and of about a hundred images spread
    over the dataset; with `every`, of all images.

    Returns:
        (I,) bool: False if the header was read and is not that of a readable image.

    Raises:
        DataError: none of the inspected images can be read.
        ReadError: the storage failed for `retry_seconds`; with None such a file counts as unreadable.
    """
    extent = np.zeros((len(images), 2))
    np.maximum.at(extent, objects.rows, (objects.xywh[:, :2] + objects.xywh[:, 2:])[:, ::-1])
    fits = np.asarray((extent <= images.frames + 1).all(1))  # a pixel of tolerance for boxes that were rounded
    # the sample catches an image folder that belongs to another json, without opening every file
    sampled = np.arange(len(images)) % max(1, len(images) // 100) == 0
    readable = np.ones(len(images), bool)
    inspected = np.flatnonzero(~fits | (images.frames[:, 0] == 0) | sampled | every)
    last: ImageError | None = None
    for row in inspected:
        path = os.path.join(image_dir, images.names[row])
        try:
            info = read_image_info(path, limits, retry_seconds)
        except ImageError as error:
            log.add("image_unreadable", images.where(row), error.reason)
            readable[row], last = False, error
            continue
        stated = (int(images.frames[row, 0]), int(images.frames[row, 1]))
        frame, image = _resolve_size(stated, info, bool(fits[row]), images.where(row), log)
        images.frames[row], images.sizes[row] = frame, image
    if not readable[inspected].any():
        raise DataError(f"{image_dir}: none of {len(inspected):,} inspected images can be read. The last is {last}")
    return readable


def _resolve_size(
    stated: tuple[int, int], info: ImageInfo, fits: bool, where: str, log: IssueLog
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (frame, image), both (h, w), from the json's size and the file's.

    Args:
        stated: (h, w) of the json; (0, 0) if it gives none.
        info: header of the file.
        fits: True if all boxes lie within the stated size.
        where: the image, for the log.
        log: issues are added to it.
    """
    stored, upright = info.stored_size, info.upright_size
    if stated in (stored, upright):
        if stated != stored:
            log.add("image_turned", where, f"EXIF orientation {info.orientation}")
        elif info.orientation != 1:
            kind = "image_not_turned" if upright != stored else "image_mirrored"
            log.add(kind, where, f"EXIF orientation {info.orientation}")
        return stated, stated
    if stated == (0, 0):
        log.add("size_missing", where)
        if info.orientation != 1:
            log.add("image_mirrored", where, f"EXIF orientation {info.orientation}")
        return stored, stored
    if fits and is_of_turned(stated, stored, upright):
        log.add("image_turned", where, f"EXIF orientation {info.orientation}")
        stored = upright
    scaled = fits and same_aspect(stated, stored)
    ambiguous = fits and not scaled and stated != stored[::-1]  # not merely width and height swapped
    sizes = f"the json says {stated[1]}x{stated[0]}, the image is {stored[1]}x{stored[0]}"
    taken = "boxes are scaled" if scaled else "boxes are taken in the image's frame"
    log.add("size_of_other_shape" if ambiguous else "size_mismatch", where, f"{sizes}; {taken}")
    return (stated if scaled else stored), stored


def clip_and_filter_boxes(images: Images, objects: Objects, log: IssueLog, train: bool) -> Objects:
    """Drop boxes outside their image; for training also clip, and drop boxes under one pixel and duplicates.

    Args:
        images: with the frames that the boxes are drawn in.
        objects: annotations as in the json.
        log: dropped and clipped boxes are added to it.
        train: False leaves the remaining boxes unchanged, as COCO's evaluation does.
    """
    bounds = images.frames[objects.rows][:, ::-1].astype(np.float64)
    low, high = objects.xywh[:, :2], objects.xywh[:, :2] + objects.xywh[:, 2:]
    inner_low, inner_high = np.clip(low, 0, bounds), np.clip(high, 0, bounds)
    inside = inner_high - inner_low
    outside = (inside <= 0).any(1)
    small = ~outside & (inside < 1).any(1) & train
    clipped = train & ~outside & ~small & ((low < 0) | (high > bounds + 1e-3)).any(1)
    duplicate = _duplicates(objects) & ~outside & ~small & train
    for kind, mask in (("box_outside", outside), ("box_too_small", small), ("box_clipped", clipped)):
        for i in np.flatnonzero(mask & ~objects.crowd):
            _log_box(kind, i, images, objects, log)
    for i in np.flatnonzero(duplicate):
        _log_box("box_duplicate", i, images, objects, log)
    if train:
        xywh = np.concatenate([inner_low, inside], 1)
        objects = replace(objects, xywh=np.where(outside[:, None], objects.xywh, xywh))
    return objects.keep(~(outside | small | duplicate))


def _log_box(kind: str, i: np.integer, images: Images, objects: Objects, log: IssueLog) -> None:
    name = images.names[objects.rows[i]]
    log.add(kind, f"annotation {objects.ids[i]} ({name})", f"bbox {[round(v, 2) for v in objects.xywh[i].tolist()]}")


def _duplicates(objects: Objects) -> np.ndarray:
    """Return (N,) bool: True for an annotation with the image, class and box of an earlier one."""
    key = np.column_stack([objects.rows, objects.labels, objects.crowd, objects.xywh])
    _, first = np.unique(key, axis=0, return_index=True)
    duplicate = np.ones(len(objects), bool)
    duplicate[first] = False
    return duplicate


_MIN_BOXES = 10  # fewer boxes do not tell their format
_TOLERANCE = 2.0  # pixels that a box may stick out of its image


def check_box_format(images: Images, objects: Objects, log: IssueLog) -> None:
    """Detect boxes that are not in COCO's xywh pixel format.

    Boxes are suspicious if they stick out of their images as xywh, but would not as corners, centers or with swapped
    axes, or if all of them are fractions of the image size.

    Args:
        images: with the frames that the boxes are drawn in.
        objects: annotations as in the json, neither clipped nor filtered.
        log: at most one `box_layout_doubtful` is added to it.
    """
    if len(objects) < _MIN_BOXES:
        return
    a, b, c, d = objects.xywh.T
    height, width = images.frames[objects.rows].T
    if objects.xywh.max() <= 1.01:  # normalized boxes may exceed 1 by rounding
        log.add("box_layout_doubtful", "all boxes", "they lie between 0 and 1, as fractions of the image's size do")
        return

    def fraction_inside(x1: np.ndarray, y1: np.ndarray, x2: np.ndarray, y2: np.ndarray) -> float:
        inside = (x1 >= -_TOLERANCE) & (y1 >= -_TOLERANCE) & (x2 <= width + _TOLERANCE) & (y2 <= height + _TOLERANCE)
        return float((inside & (x1 < x2) & (y1 < y2)).mean())

    as_xywh = fraction_inside(a, b, a + c, b + d)
    fractions = {
        "corners x1, y1, x2, y2": fraction_inside(a, b, c, d),
        "center x, center y, width, height": fraction_inside(a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "y, x, height, width": fraction_inside(b, a, b + d, a + c),
    }
    best = max(fractions, key=fractions.__getitem__)
    # the other format must explain nearly all boxes, and clearly more than xywh: a few sloppy boxes are no reason
    if fractions[best] > 0.99 and fractions[best] - as_xywh > 0.05:
        detail = f"{as_xywh:.0%} lie in their images, but {fractions[best]:.0%} would if they were {best}"
        log.add("box_layout_doubtful", "all boxes", detail)
