"""Assignments of several images joined into one."""

import torch

from brs_detr.assign.assignment import join
from brs_detr.assign.max_iou import BACKGROUND, IGNORED


def test_objects_are_found_again_after_joining():
    boxes = torch.rand(5, 4)
    targets = [
        {"boxes": boxes[:3], "labels": torch.tensor([4, 0, 2])},
        {"boxes": boxes[:0], "labels": torch.zeros(0).long()},
        {"boxes": boxes[3:], "labels": torch.tensor([1, 3])},
    ]
    own = [torch.tensor([2, BACKGROUND, 0]), torch.tensor([BACKGROUND, IGNORED]), torch.tensor([IGNORED, 1])]
    joined = join(own, targets)
    rows = joined.positives()
    assert rows.tolist() == [0, 2, 6]
    assert torch.equal(joined.boxes[joined.assigned[rows]], boxes[[2, 0, 4]])
    assert joined.classes(9).tolist() == [2, 9, 4, 9, 9, 9, 3]
    assert joined.assigned[[1, 3, 4, 5]].tolist() == [BACKGROUND, BACKGROUND, IGNORED, IGNORED]


def test_no_object_anywhere():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    joined = join([torch.full((2,), BACKGROUND)] * 2, [empty, empty])
    assert joined.classes(3).tolist() == [3] * 4 and joined.positives().numel() == 0
