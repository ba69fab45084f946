"""Do the four numbers of the boxes mean what COCO means by them: x, y, width, height in pixels?"""

from __future__ import annotations

import numpy as np

from brs_detr.data.annotations import Images, Objects
from brs_detr.data.faults import FaultLog

_FEWEST = 10  # boxes from which anything can be concluded
_SLACK = 2.0  # pixels that a box may stick out of its picture


def doubt_layout(images: Images, objects: Objects, log: FaultLog) -> None:
    """Warn where boxes stick out of their pictures, but would not if they were corners, centres or swapped axes, or
    where all are fractions of the picture's size.

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
        log.add("box_layout_doubtful", "all boxes", "they lie between 0 and 1, as fractions of the picture's size do")
        return

    def share_inside(x1: np.ndarray, y1: np.ndarray, x2: np.ndarray, y2: np.ndarray) -> float:
        inside = (x1 >= -_SLACK) & (y1 >= -_SLACK) & (x2 <= width + _SLACK) & (y2 <= height + _SLACK)
        return float((inside & (x1 < x2) & (y1 < y2)).mean())

    stated = share_inside(a, b, a + c, b + d)
    readings = {
        "corners x1, y1, x2, y2": share_inside(a, b, c, d),
        "centre x, centre y, width, height": share_inside(a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "y, x, height, width": share_inside(b, a, b + d, a + c),
    }
    best = max(readings, key=readings.get)
    if readings[best] > 0.99 and readings[best] - stated > 0.05:
        detail = f"{stated:.0%} lie in their pictures, but {readings[best]:.0%} would if they were {best}"
        log.add("box_layout_doubtful", "all boxes", detail)
