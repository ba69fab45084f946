"""Boxes written in another layout than COCO's are noticed, and ordinary ones are not."""

import numpy as np
import pytest

from brs_detr.data.annotations import Images, Objects
from brs_detr.data.image_sizes import check_box_format
from brs_detr.data.issues import IssueLog

H, W = 200, 300


def boxes(count=200):
    """(count, 4) xywh that fill an image evenly."""
    random = np.random.default_rng(0)
    size = random.uniform(10, 90, (count, 2))
    corner = random.uniform(0, 1, (count, 2)) * ([W, H] - size)
    return np.concatenate([corner, size], 1)


def doubts(xywh):
    n = len(xywh)
    frames = np.array([[H, W]], np.int32)
    zeros = np.zeros(n, np.int64)
    log = IssueLog()
    objects = Objects(zeros, zeros, zeros, np.asarray(xywh, float), np.ones(n), np.zeros(n, bool))
    check_box_format(Images(np.array([1]), ["a"], frames, frames), objects, log)
    return [issue.detail for issue in log.issues]


LAYOUTS = {
    "corners": lambda x, y, w, h: (x, y, x + w, y + h),
    "center": lambda x, y, w, h: (x + w / 2, y + h / 2, w, h),
    "y, x": lambda x, y, w, h: (y, x, h, w),
    "fractions": lambda x, y, w, h: (x / W, y / H, w / W, h / H),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_named(layout):
    (detail,) = doubts(np.stack(LAYOUTS[layout](*boxes().T), 1))
    assert layout in detail


def test_coco_boxes_are_not_doubted():
    assert doubts(boxes()) == []


@pytest.mark.parametrize("shift", [(8, 0), (0, 8), (8, 8), (-8, 0)])
def test_boxes_that_stick_out_a_little_are_not_doubted(shift):
    xywh = boxes()
    xywh[:, :2] += shift
    assert doubts(xywh) == []


def test_few_boxes_prove_nothing():
    assert doubts(np.stack(LAYOUTS["corners"](*boxes(9).T), 1)) == []
