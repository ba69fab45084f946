"""The annotations of a dataset as the few arrays that it keeps, and the masks of an image drawn from them.

None of the json's Python objects is kept: their reference counts change on every access, so copy-on-write would copy
them into every loader worker. Arrays are not copied. Masks stay packed (`ops/rle.py`) until their image is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from brs_detr.data.annotations import Images, Objects
from brs_detr.data.issues import IssueLog
from brs_detr.ops.rle import (
    RLE,
    Size,
    as_text,
    box_bitmap,
    box_sampled,
    boxes_of,
    draw,
    draw_sampled,
    encode,
    nearest_centers,
    stated_size,
    to_rle,
)

MIN_MASK_IOU = 0.5  # between an object's box and the box around its mask: below, one of them is not the object's
_ONE_PIXEL = np.array([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class PackedAnnotations:
    """All annotations of a dataset, sorted by image.

    Attributes:
        image_ids: (I,) int64, as in the json.
        names: (bytes,) uint8, all file names in UTF-8, concatenated.
        name_offsets: (I + 1,) int64; image i is named by the bytes name_offsets[i]:name_offsets[i + 1].
        frames: (I, 2) int32 (h, w) that the boxes are drawn in.
        image_sizes: (I, 2) int32 (h, w) of the file, as far as known.
        offsets: (I + 1,) int64; image i owns the rows offsets[i]:offsets[i + 1] of the following arrays.
        boxes: (N, 4) float32 xyxy pixels.
        labels: (N,) int32, 0..C-1.
        areas: (N,) float32 square pixels.
        iscrowd: (N,) bool.
        mask_offsets: (N + 1,) int64; object i has the words mask_offsets[i]:mask_offsets[i + 1], none if its
            segmentation is not usable. None unless the masks were read.
        mask_words: (M,) uint32, packed segmentations (see `ops.rle`), or None.
    """

    image_ids: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    frames: np.ndarray
    image_sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray
    mask_offsets: np.ndarray | None = None
    mask_words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Return the json's file name of an image."""
        encoded = self.names[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes()
        return encoded.decode("utf-8", "surrogatepass")


def pack(images: Images, objects: Objects) -> PackedAnnotations:
    """Sort the annotations by image, and drop everything that is not a number."""
    # stable: annotations of one image keep the order of the json, so targets do not depend on numpy's sort
    objects = objects.keep(np.argsort(objects.rows, kind="stable"))
    # surrogatepass: a file name on Linux may be any bytes, not only valid UTF-8
    encoded = [name.encode("utf-8", "surrogatepass") for name in images.names]
    xyxy = objects.xywh.copy()
    xyxy[:, 2:] += xyxy[:, :2]
    mask_offsets, mask_words = _pack_masks(objects.masks)
    return PackedAnnotations(
        image_ids=images.ids,
        names=np.frombuffer(b"".join(encoded), np.uint8),
        name_offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        frames=images.frames,
        image_sizes=images.sizes,
        offsets=np.searchsorted(objects.rows, np.arange(len(images) + 1)),
        boxes=xyxy.astype(np.float32),
        labels=objects.labels,
        areas=objects.areas.astype(np.float32),
        iscrowd=objects.crowd,
        mask_offsets=mask_offsets,
        mask_words=mask_words,
    )


def _pack_masks(masks: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Concatenate packed segmentations; return the offsets (N + 1,) and the words (M,), or None twice without masks."""
    if masks is None:
        return None, None
    blobs = [blob or b"" for blob in masks]
    return np.cumsum([0, *(len(blob) // 4 for blob in blobs)], dtype=np.int64), np.frombuffer(
        b"".join(blobs), np.uint32
    )


def check_masks(images: Images, objects: Objects, log: IssueLog, draw_all: bool = False) -> Objects:
    """Replace the segmentations that are not usable by empty bytes: the box takes the place of such a mask.

    Args:
        images: with the frames that the annotations are drawn in.
        objects: annotations with masks.
        log: missing and malformed masks are added to it, and run lengths of another size than the frame.
        draw_all: also draw the masks of all objects but crowds, and log those that are empty or do not fit their boxes.
    """
    assert objects.masks is not None
    usable = objects.masks.copy()
    for i, blob in enumerate(objects.masks):
        row = objects.rows[i]
        frame = (int(images.frames[row, 0]), int(images.frames[row, 1]))
        kind, detail = _unusable(blob, frame)
        if kind:
            usable[i] = b""
        elif draw_all and not objects.crowd[i]:
            kind, detail = _drawn_elsewhere(blob, frame, objects.xywh[i])
        if kind:
            log.add(kind, f"annotation {objects.ids[i]} ({images.names[row]})", detail)
    return replace(objects, masks=usable)


def _unusable(blob: bytes | None, frame: Size) -> tuple[str, str]:
    """Return the kind of issue and a detail if a packed segmentation cannot be drawn, else two empty strings."""
    if not blob:
        return "mask_missing" if blob is None else "mask_malformed", ""
    size = stated_size(np.frombuffer(blob, np.uint32, 3))
    if size is not None and size != frame:
        return "mask_of_other_size", f"{size[1]}x{size[0]} in {frame[1]}x{frame[0]}"
    return "", ""


def _drawn_elsewhere(blob: bytes, frame: Size, xywh: np.ndarray) -> tuple[str, str]:
    """Return the kind of issue and a detail if a mask is empty or the box around it is another, else empty strings."""
    around = boxes_of([to_rle(np.frombuffer(blob, np.uint32), frame)])[0].astype(np.float64)
    if not (around[2:] > around[:2]).all():
        return "mask_empty", ""
    limit = np.array([frame[1], frame[0]] * 2)
    stated = np.clip(np.concatenate([xywh[:2], xywh[:2] + xywh[2:]]), 0, limit)
    # by a pixel on each side, since a box is written in fractions of pixels: those of a thin object would be of others
    (x0, y0, x1, y1), (u0, v0, u1, v1) = around + _ONE_PIXEL, stated + _ONE_PIXEL
    shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    iou = shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)
    if iou >= MIN_MASK_IOU:
        return "", ""
    shown = (", ".join(f"{value:g}" for value in np.round(box, 1)) for box in (around, stated))
    return "mask_not_in_box", "xyxy of the mask: {}; of the box: {}".format(*shown)


def draw_masks(packed: PackedAnnotations, rows: np.ndarray, frame: Size) -> np.ndarray:
    """Draw the masks of some objects of one image.

    Args:
        packed: annotations with masks.
        rows: (n,) indices of the objects.
        frame: (h, w) that the image's annotations are drawn in.

    Returns:
        (n, h, w) uint8, 1 inside. An object without a usable mask, or whose polygons are too thin to hold the center of
        a pixel, has its box.
    """
    masks = np.zeros((len(rows), *frame), np.uint8)
    for mask, row in zip(masks, rows, strict=True):
        words = _words(packed, row)
        if len(words):
            draw(words, frame, out=mask)
        if not mask.any():
            mask[:] = box_bitmap(packed.boxes[row], frame)
    return masks


def draw_masks_in(packed: PackedAnnotations, rows: np.ndarray, frame: Size, size: Size, is_scaled: bool) -> np.ndarray:
    """Draw the masks of some objects of one image in its own size, which need not be that of its annotations' frame.

    The pixels of another frame are read off its run lengths: its bitmaps may take gigabytes.

    Args:
        packed, rows, frame: as of `draw_masks`.
        size: (h, w) pixels of the image.
        is_scaled: the image is the frame, resized: each pixel is that of the nearest center. Otherwise the masks are
            cut or padded at the right and bottom.

    Returns:
        (n, h, w) uint8, 1 inside, of what `draw_masks` draws.
    """
    if size == frame:
        return draw_masks(packed, rows, frame)
    masks = np.zeros((len(rows), *size), np.uint8)
    sides = zip(frame, size, strict=True)
    y, x = (nearest_centers(before, side) if is_scaled else np.arange(min(before, side)) for before, side in sides)
    for mask, row in zip(masks, rows, strict=True):
        words = _words(packed, row)
        drawn = draw_sampled(words, frame, y, x) if len(words) else None
        mask[: len(y), : len(x)] = box_sampled(packed.boxes[row], frame, y, x) if drawn is None else drawn
    return masks


def encode_masks(packed: PackedAnnotations, rows: np.ndarray, frame: Size) -> list[RLE]:
    """Encode the masks of some objects of one image as COCO's compressed run lengths, with `counts` as str.

    Arguments as of `draw_masks`. An object without a usable mask has its box; a mask without a pixel stays empty, as in
    COCO's own evaluation.
    """
    return [
        as_text(to_rle(words, frame) if len(words) else encode(box_bitmap(packed.boxes[row], frame)))
        for row, words in ((row, _words(packed, row)) for row in rows)
    ]


def _words(packed: PackedAnnotations, row: int | np.integer) -> np.ndarray:
    """Return the packed segmentation of an object."""
    assert packed.mask_offsets is not None and packed.mask_words is not None
    return packed.mask_words[packed.mask_offsets[row] : packed.mask_offsets[row + 1]]
