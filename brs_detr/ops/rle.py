"""COCO's segmentations, polygons and run lengths: checked, packed into 4-byte words, drawn as bitmaps, encoded.

pycocotools draws polygons and encodes bitmaps, but is never given a mask that was not checked here: on damaged ones
it ends the process (a height of 0 or 2^32), or reads past the end of the text.

Packed words (uint32) are either `0, h, w, runs...`, or `number of polygons, number of coordinates of each, x0, y0, x1,
...` with float32 coordinates in pixels. They take 4 bytes a number, and need no Python object per polygon.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Size = tuple[int, int]
RLE = dict[str, Any]  # {"size": [h, w], "counts": COCO's compressed text}

_MAX_PIXELS = 2**31  # of a mask; pycocotools counts them in uint32, and int in places


def decode_counts(text: str) -> list[int]:
    """Decode run lengths from COCO's compressed text: 5 bits a character, low ones first, later runs as differences.

    Source: pycocotools, `rleFrString`.

    Raises:
        ValueError: a character is not ASCII, or a number does not fit 64 bits.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii"):
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 60:  # a number has no end: without a limit, the time would grow with the square of the length
            raise ValueError("a run length does not fit 64 bits")
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def checked_runs(counts: Any, height: Any, width: Any) -> np.ndarray | None:
    """Return run lengths (R,) int64 of a mask of (height, width) pixels; None if they cannot be those of one.

    Args:
        counts: run lengths as a list, or as COCO's compressed text (str or bytes).
        height, width: size of the mask; the runs may end before its last pixel, the rest is then background.
    """
    try:
        if not (height >= 1 and width >= 1 and int(height) == height and int(width) == width):
            return None
        if isinstance(counts, bytes):
            counts = counts.decode("ascii")
        runs = np.asarray(decode_counts(counts) if isinstance(counts, str) else counts)
        if runs.ndim != 1 or runs.dtype.kind not in "iu" or height * width >= _MAX_PIXELS:
            return None
        # before the sum, which could otherwise overflow
        if (runs < 0).any() or (runs > height * width).any() or runs.sum(dtype=np.int64) > height * width:
            return None
        return runs.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        return None


def pack_segmentation(segmentation: Any) -> bytes:
    """Pack a COCO segmentation.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...], also one polygon that is not in a list, or with its points
            as pairs; or {"size": [h, w], "counts": run lengths, as a list or compressed}.

    Returns:
        the words as bytes; empty if the segmentation is malformed or has no polygon of three points.
    """
    try:
        if isinstance(segmentation, dict):
            height, width = segmentation["size"]
            runs = checked_runs(segmentation["counts"], height, width)
            return b"" if runs is None else np.array([0, height, width, *runs.tolist()], np.uint32).tobytes()
        parts = [part for part in map(_coordinates, _polygons(segmentation)) if len(part) >= 6]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return b""
    if not parts:
        return b""
    head = np.array([len(parts), *map(len, parts)], np.uint32)
    return head.tobytes() + b"".join(part.tobytes() for part in parts)


def _polygons(value: Any) -> list[Any]:
    """List the polygons of a segmentation, which some tools nest more, and others less, than COCO."""
    if not isinstance(value, list) or not value:
        raise ValueError("not a list of polygons")
    if not isinstance(value[0], list):
        return [value]
    if all(isinstance(part, list) and len(part) == 2 and not isinstance(part[0], list) for part in value):
        return [value]  # the points of one polygon as pairs
    return [polygon for part in value for polygon in ([part] if _is_flat(part) else _polygons(part)) if part]


def _is_flat(part: Any) -> bool:
    return isinstance(part, list) and not (part and isinstance(part[0], list))


def _coordinates(polygon: list[Any]) -> np.ndarray:
    """Return (2k,) float32.

    Raises:
        ValueError: a coordinate is not a finite number, or one is missing.
    """
    with np.errstate(over="ignore"):
        coordinates = np.array(polygon, np.float32).ravel()
    if len(coordinates) % 2 or not np.isfinite(coordinates).all():
        raise ValueError("coordinates are not finite pairs")
    return coordinates


def stated_size(words: np.ndarray) -> Size | None:
    """Return the (h, w) that packed run lengths are of; None for polygons, which fit any size."""
    return None if words[0] else (int(words[1]), int(words[2]))


def draw(words: np.ndarray, size: Size) -> np.ndarray:
    """Draw a packed segmentation.

    Args:
        words: as `pack_segmentation` makes them; run lengths must be of this size.
        size: (h, w) pixels.

    Returns:
        (h, w) uint8, 1 inside.
    """
    if words[0]:
        bitmap: np.ndarray = coco_mask.decode(to_rle(words, size))
        return bitmap
    runs = words[3:]
    flat = np.zeros(size[0] * size[1], np.uint8)
    inside = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
    flat[: len(inside)] = inside
    return flat.reshape(size[1], size[0]).T


def to_rle(words: np.ndarray, size: Size) -> RLE:
    """Convert a packed segmentation to COCO's compressed run lengths of an image of (h, w) pixels, `counts` bytes."""
    height, width = size
    if not words[0]:
        runs = words[3:].astype(np.int64)
        rest = height * width - int(runs.sum())
        # the last run must reach the end of the mask: pycocotools relies on it
        listed = runs.tolist()
        if rest and len(listed) % 2:
            listed[-1] += rest
        elif rest:
            listed.append(rest)
        rle: RLE = coco_mask.frPyObjects({"size": [height, width], "counts": listed}, height, width)
        return rle
    count = int(words[0])
    coordinates = words[1 + count :].view(np.float32).reshape(-1, 2)
    # pycocotools walks along every edge pixel by pixel: a point 1e9 pixels away would take the memory of all of them
    limit = np.array([width, height], np.float32)
    coordinates = np.clip(coordinates, -limit, 2 * limit).astype(np.float64)
    # the json's decimals again: pycocotools rounds fifths of a pixel, so 0.7 and float32's 0.69999999 differ by a pixel
    coordinates = coordinates.round(3)
    ends = np.cumsum(words[1 : 1 + count].astype(np.int64) // 2)[:-1]
    parts = [part.ravel().tolist() for part in np.split(coordinates, ends)]
    merged: RLE = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    return merged


def box_bitmap(box: np.ndarray, size: Size) -> np.ndarray:
    """Draw a box (4,) xyxy pixels as (h, w) uint8; at least one pixel, where the box is in the image."""
    bitmap = np.zeros(size, np.uint8)
    x0, y0 = np.floor(np.asarray(box[:2], np.float64) + 0.5).clip(0).astype(int)
    x1, y1 = np.floor(np.asarray(box[2:], np.float64) + 0.5).clip(0).astype(int)
    x0, y0 = min(x0, size[1] - 1), min(y0, size[0] - 1)
    bitmap[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 1
    return bitmap


def encode(bitmap: np.ndarray) -> RLE:
    """Encode a (h, w) bitmap as COCO's compressed run lengths, `counts` bytes; not 0 counts as inside."""
    rle: RLE = coco_mask.encode(np.asfortranarray(bitmap != 0).view(np.uint8))
    return rle


def as_text(rle: RLE) -> RLE:
    """Return run lengths with `counts` as str, as a json holds them."""
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
