"""The box around a COCO segmentation, for annotations that have no box of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def mask_box(mask: Any) -> list[float] | None:
    """The box (x, y, w, h) in pixels around a COCO segmentation, without drawing it.

    Args:
        mask: polygons [x0, y0, x1, y1, ...] of three or more points in all, however the list is nested, or {"size":
            [h, w], "counts": run lengths down the columns, as a list or in COCO's compressed text}.

    Returns:
        the box; None where the mask is empty or malformed.
    """
    try:
        if isinstance(mask, dict):
            return _runs_box(mask["counts"], *mask["size"])
        points = np.array(list(_numbers(mask))).reshape(-1, 2)
        if len(points) < 3 or not np.isfinite(points).all():
            return None
        low, high = points.min(0), points.max(0)
        return [*low.tolist(), *(high - low).tolist()]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield float(value)


def _runs_box(counts: str | list[int], height: int, width: int) -> list[float] | None:
    runs = np.asarray(_decode_runs(counts) if isinstance(counts, str) else counts, np.int64)
    if height < 1 or (runs < 0).any() or runs.sum() > height * width:
        return None
    ends = np.cumsum(runs)
    first, last = ends[:-1:2], ends[1::2] - 1  # pixels of each run of the mask, counted down the columns
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return None
    # a run that goes on in the next column touches both the bottom and the top
    wraps = (first // height != last // height).any()
    top, bottom = (0, height - 1) if wraps else ((first % height).min(), (last % height).max())
    left, right = first.min() // height, last.max() // height
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _decode_runs(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: 5 bits a character, low ones first, the later ones as differences.

    Source: pycocotools, `rleFrString`.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii"):
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
