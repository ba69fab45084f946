"""COCO's segmentations, polygons and run lengths: checked, packed into 4-byte words, drawn as bitmaps, encoded.

pycocotools draws polygons and encodes bitmaps, but is never given a mask that was not checked here: on damaged ones
it ends the process (a height of 0 or 2^32), or reads past the end of the text.

Packed words (uint32) are either `0, h, w, runs...`, or `number of polygons, number of coordinates of each, x0, y0, x1,
...` with float32 coordinates in pixels. They take 4 bytes a number, and need no Python object per polygon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Size = tuple[int, int]
RLE = dict[str, Any]  # {"size": [h, w], "counts": COCO's compressed text}

_MAX_PIXELS = 2**31  # of a mask; pycocotools counts them in uint32, and int in places


def decode_counts(text: str) -> np.ndarray:
    """Decode run lengths (R,) int64 from COCO's compressed text.

    A number has 5 bits a character, low ones first; 32 marks that it goes on. From the fourth on, numbers are
    differences from the one before the last. Source: pycocotools, `rleFrString`.

    Raises:
        ValueError: a character does not belong to the code, or a number does not fit 32 bits or has no end.
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes < 32)
    if not len(codes):
        return np.zeros(0, np.int64)
    if codes.min() < 0 or codes.max() > 63 or not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("not COCO's compressed run lengths")
    first = np.concatenate([[0], last[:-1] + 1])
    length = last + 1 - first
    if length.max() > 7:  # 35 bits; a limit before the shift, which would overflow
        raise ValueError("a run length does not fit 32 bits")
    place = np.arange(len(codes)) - np.repeat(first, length)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
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
        runs = decode_counts(counts) if isinstance(counts, str) else np.asarray(counts)
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


def draw(words: np.ndarray, size: Size, out: np.ndarray | None = None) -> np.ndarray:
    """Draw a packed segmentation.

    Args:
        words: as `pack_segmentation` makes them; run lengths must be of this size.
        size: (h, w) pixels.
        out: (h, w) uint8 zeros to draw into; by default a new array.

    Returns:
        (h, w) uint8, 1 inside.
    """
    bitmap = np.zeros(size, np.uint8) if out is None else out
    first, last = _inside(words, size)
    if len(first):
        # only the object's columns: most of the pixels of an image with many objects belong to none of them
        height = size[0]
        left, right = int(first[0]) // height, (int(last[-1]) - 1) // height + 1
        steps = np.zeros((right - left) * height + 1, np.int8)
        steps[first - left * height] += 1
        steps[last - left * height] -= 1
        bitmap[:, left:right] = np.cumsum(steps[:-1], dtype=np.int8).reshape(right - left, height).T
    return bitmap


def _inside(words: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and end of each run inside a packed segmentation, counted down the columns of (h, w) pixels."""
    return _spans(decode_counts(to_rle(words, size)["counts"].decode("ascii")) if words[0] else words[3:])


def _spans(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and end of each run inside, from the lengths of runs outside and inside in turn."""
    ends = np.cumsum(runs, dtype=np.int64)
    first, last = ends[:-1:2], ends[1::2]
    return first[last > first], last[last > first]


def draw_sampled(words: np.ndarray, size: Size, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
    """Return `draw(words, size)[rows][:, columns]` without drawing it: that of a large image may be of gigabytes.

    Args:
        words: as `pack_segmentation` makes them; run lengths must be of this size.
        size: (h, w) pixels.
        rows, columns: (r,) and (c,) int64, ascending.

    Returns:
        (r, c) uint8; None if the segmentation has no pixel at all.
    """
    first, last = _inside(words, size)
    if not len(first):
        return None
    bitmap, height = np.zeros((len(rows), len(columns)), np.uint8), size[0]
    left, right = np.searchsorted(columns, [first[0] // height, (last[-1] - 1) // height + 1])
    place = columns[left:right, None] * height + rows
    run = np.searchsorted(first, place, side="right") - 1
    bitmap[:, left:right] = ((run >= 0) & (place < last[run])).T
    return bitmap


def nearest_centers(before: int, after: int) -> np.ndarray:
    """Return the pixel (after,) int64 of `before` in a row whose center is nearest to that of each of `after`."""
    centers = (np.arange(after, dtype=np.float32) + 0.5) * np.float32(before / after)
    return centers.astype(np.int64).clip(max=before - 1)


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


def shifted(rle: RLE, top: int, left: int, size: Size) -> RLE:
    """Move a mask of a part of an image to the image, run by run: no bitmap of the image is drawn.

    Args:
        rle: compressed run lengths of a part of (h, w) pixels, its `size`.
        top, left: of the part, in pixels of the image; all of the part lies in the image.
        size: (H, W) pixels of the image.

    Returns:
        Compressed run lengths of the image, with `counts` as str.

    Raises:
        ValueError: the run lengths are malformed.
    """
    height, width = (int(side) for side in rle["size"])
    runs = checked_runs(rle["counts"], height, width)
    if runs is None:
        raise ValueError(f"mask: these are not run lengths of {width}x{height} pixels: {str(rle)[:80]}.")
    first, last = _spans(runs)
    # a run goes on at the top of the next column: where the part has fewer rows than the image, it is cut there
    columns = (last - 1) // height - first // height + 1  # that each run reaches
    of_run = np.repeat(np.arange(len(first)), columns)
    column = first[of_run] // height + np.arange(len(of_run)) - np.repeat(np.cumsum(columns) - columns, columns)
    begin = np.maximum(first[of_run] - column * height, 0) + top
    end = np.minimum(last[of_run] - column * height, height) + top
    offset = (column + left) * size[0]
    begin, end = begin + offset, end + offset
    # runs that touch are one
    apart = begin[1:] > end[:-1]
    begin, end = begin[np.r_[True, apart][: len(begin)]], end[np.r_[apart, True][: len(end)]]
    counts = np.diff(np.concatenate([[0], np.stack([begin, end], 1).ravel(), [size[0] * size[1]]])).tolist()
    if len(begin) and not counts[-1]:  # the object reaches the last pixel
        counts.pop()
    return as_text(coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size))


def box_bitmap(box: np.ndarray, size: Size) -> np.ndarray:
    """Draw a box (4,) xyxy pixels as (h, w) uint8; at least one pixel, where the box is in the image."""
    return box_sampled(box, size, np.arange(size[0]), np.arange(size[1]))


def box_sampled(box: np.ndarray, size: Size, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return `box_bitmap(box, size)[rows][:, columns]`; arguments as of `draw_sampled`."""
    x0, y0 = np.floor(np.asarray(box[:2], np.float64) + 0.5).clip(0).astype(int)
    x1, y1 = np.floor(np.asarray(box[2:], np.float64) + 0.5).clip(0).astype(int)
    x0, y0 = min(x0, size[1] - 1), min(y0, size[0] - 1)
    in_rows = (rows >= y0) & (rows < max(y1, y0 + 1))
    bitmap: np.ndarray = in_rows[:, None] & (columns >= x0) & (columns < max(x1, x0 + 1))
    return bitmap.astype(np.uint8)


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


def boxes_of(rles: Sequence[RLE]) -> np.ndarray:
    """Return the boxes (n, 4) xyxy pixels, float32, around the pixels of masks; zeros for an empty one."""
    boxes = np.array([coco_mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
