"""Resolve the coordinate frame of each image's boxes (EXIF, resizes) and clip boxes to it.

A json may state no size, a wrong one, or that of the image before it was turned or shrunk; its boxes tell which.

Detect boxes that are not in COCO's xywh pixel format.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from brs_detr.data.annotations import Images, Objects
from brs_detr.data.image_io import ImageError, ImageInfo, Limits, read_image_info
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
    """Decide in which frame each image's boxes are drawn; changes `images.frames` and `images.sizes`.

    A header is read where the json gives no size or a box sticks out of it, and of a hundred images from all over the
    dataset; or of every image, if told so.

    Returns:
        (I,) bool: False where the file turned out not to be a readable image.

    Raises:
        DataError: no image that was looked at can be read.
        StorageError: the storage failed for `retry_seconds`; with None such a file is not readable, like others.
    """
    extent = np.zeros((len(images), 2))
    np.maximum.at(extent, objects.rows, (objects.xywh[:, :2] + objects.xywh[:, 2:])[:, ::-1])
    fits = (extent <= images.frames + 1).all(1)
    sampled = np.arange(len(images)) % max(1, len(images) // 100) == 0
    readable = np.ones(len(images), bool)
    looked_at = np.flatnonzero(~fits | (images.frames[:, 0] == 0) | sampled | every)
    for row in looked_at:
        path = os.path.join(image_dir, images.names[row])
        try:
            info = read_image_info(path, limits, retry_seconds)
        except ImageError as error:
            log.add("image_unreadable", images.where(row), error.reason)
            readable[row], last = False, error
            continue
        stated = (int(images.frames[row, 0]), int(images.frames[row, 1]))
        frame, image = _judge_size(stated, info, bool(fits[row]), images.where(row), log)
        images.frames[row], images.sizes[row] = frame, image
    if not readable[looked_at].any():
        raise DataError(f"{image_dir}: none of {len(looked_at):,} images looked at can be read; the last is {last}")
    return readable


def _judge_size(stated: tuple[int, int], info: ImageInfo, fits: bool, where: str, log: IssueLog) -> tuple:
    """(frame, image), both (h, w), from the json's size and the file's."""
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
    scaled = fits and same_aspect(stated, stored)
    doubtful = fits and not scaled and stated != stored[::-1]  # not just width and height interchanged
    sizes = f"the json says {stated[1]}x{stated[0]}, the image is {stored[1]}x{stored[0]}"
    taken = "boxes are scaled" if scaled else "boxes are taken in the image's frame"
    log.add("size_of_other_shape" if doubtful else "size_mismatch", where, f"{sizes}; {taken}")
    return (stated if scaled else stored), stored


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two (h, w) have the same aspect ratio within 2 %."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= 0.02 * a[0] * b[1]


def clip_and_filter_boxes(images: Images, objects: Objects, log: IssueLog, train: bool) -> Objects:
    """Drop boxes outside their image; for training also clip, and drop boxes under one pixel and exact repeats."""
    bounds = images.frames[objects.rows][:, ::-1].astype(np.float64)
    low, high = objects.xywh[:, :2], objects.xywh[:, :2] + objects.xywh[:, 2:]
    inner_low, inner_high = np.clip(low, 0, bounds), np.clip(high, 0, bounds)
    inside = inner_high - inner_low
    outside = (inside <= 0).any(1)
    small = ~outside & (inside < 1).any(1) & train
    clipped = train & ~outside & ~small & ((low < 0) | (high > bounds + 1e-3)).any(1)
    again = _repeats(objects) & ~outside & ~small & train
    for kind, mask in (("box_outside", outside), ("box_too_small", small), ("box_clipped", clipped)):
        for i in np.flatnonzero(mask & ~objects.crowd):
            _log_box(kind, i, images, objects, log)
    for i in np.flatnonzero(again):
        _log_box("box_duplicate", i, images, objects, log)
    if train:
        xywh = np.concatenate([inner_low, inside], 1)
        objects = replace(objects, xywh=np.where(outside[:, None], objects.xywh, xywh))
    return objects.keep(~(outside | small | again))


def _log_box(kind: str, i: int, images: Images, objects: Objects, log: IssueLog) -> None:
    name = images.names[objects.rows[i]]
    log.add(kind, f"annotation {objects.ids[i]} ({name})", f"bbox {[round(v, 2) for v in objects.xywh[i].tolist()]}")


def _repeats(objects: Objects) -> np.ndarray:
    """(N,) bool: the same image, class and box as an earlier annotation."""
    key = np.column_stack([objects.rows, objects.labels, objects.crowd, objects.xywh])
    _, first = np.unique(key, axis=0, return_index=True)
    again = np.ones(len(objects), bool)
    again[first] = False
    return again


_FEWEST = 10  # boxes from which anything can be concluded
_SLACK = 2.0  # pixels that a box may stick out of its image


def check_box_format(images: Images, objects: Objects, log: IssueLog) -> None:
    """Warn where boxes stick out of their images, but would not if they were corners, centers or swapped axes, or
    where all are fractions of the image's size.

    Args:
        images: with the frames that the boxes are drawn in.
        objects: as in the json, neither clipped nor dropped.
        log: gets at most one `box_layout_doubtful`.
    """
    if len(objects) < _FEWEST:
        return
    a, b, c, d = objects.xywh.T
    height, width = images.frames[objects.rows].T
    if objects.xywh.max() <= 1.01:
        log.add("box_layout_doubtful", "all boxes", "they lie between 0 and 1, as fractions of the image's size do")
        return

    def share_inside(x1: np.ndarray, y1: np.ndarray, x2: np.ndarray, y2: np.ndarray) -> float:
        inside = (x1 >= -_SLACK) & (y1 >= -_SLACK) & (x2 <= width + _SLACK) & (y2 <= height + _SLACK)
        return float((inside & (x1 < x2) & (y1 < y2)).mean())

    stated = share_inside(a, b, a + c, b + d)
    readings = {
        "corners x1, y1, x2, y2": share_inside(a, b, c, d),
        "center x, center y, width, height": share_inside(a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "y, x, height, width": share_inside(b, a, b + d, a + c),
    }
    best = max(readings, key=readings.get)
    if readings[best] > 0.99 and readings[best] - stated > 0.05:
        detail = f"{stated:.0%} lie in their images, but {readings[best]:.0%} would if they were {best}"
        log.add("box_layout_doubtful", "all boxes", detail)
