"""Targets that cannot be learned are refused by name, before they reach a GPU; on one the device asserts."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from brs_detr.ops.targets import TargetError, check_targets


def targets(boxes=((1.0, 2.0, 5.0, 6.0), (0.0, 0.0, 3.0, 3.0)), labels=(0, 2), kind=torch.int64):
    """A good image without id, and image 139 with what is given."""
    good = {"boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]), "labels": torch.tensor([1])}
    return [good, {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels, dtype=kind), "image_id": 139}]


def test_good_targets_pass():
    check_targets(targets(), 3)
    check_targets(targets(boxes=((1.0, 2.0, 1.0, 6.0), (4.0, 4.0, 4.0, 4.0))), 3)  # without area
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": torch.tensor(7)}
    check_targets([empty], 3)


@pytest.mark.parametrize("label", [3, -1, 91])
def test_a_label_outside_the_classes_is_named(label):
    with pytest.raises(TargetError, match=f"label of image 139: {label} is out of range for 3 classes"):
        check_targets(targets(labels=(0, label)), 3)


@pytest.mark.parametrize(
    "box",
    [
        (5.0, 2.0, 1.0, 6.0),
        (1.0, 6.0, 5.0, 2.0),
        (5.0, 6.0, 1.0, 2.0),
        (1.0, 2.0, float("nan"), 6.0),
        (1.0, 2.0, float("inf"), 6.0),
        (float("-inf"), 2.0, 5.0, 6.0),
    ],
)
def test_a_box_turned_inside_out_or_not_finite_is_named(box):
    with pytest.raises(TargetError, match="box of image 139: "):
        check_targets(targets(boxes=((0.0, 0.0, 3.0, 3.0), box)), 3)


def test_types_and_shapes_are_named():
    for kind in (torch.int32, torch.float32, torch.bool):
        with pytest.raises(TargetError, match=r"labels of image 139: torch\."):
            check_targets(targets(kind=kind), 3)
    with pytest.raises(TargetError, match="boxes of image 139: "):
        check_targets(targets(labels=(0,)), 3)
    with pytest.raises(TargetError, match=r"boxes of image 139: torch\.int64"):
        check_targets(targets(boxes=((1, 2, 5, 6), (0, 0, 3, 3))), 3)
    with pytest.raises(TargetError, match=r"boxes of the batch's image 0: "):
        check_targets([{"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}], 3)


@pytest.mark.skipif(
    not torch.cuda.is_available() and torch.__version__ < (2, 11),
    reason="torch before 2.11 aborts when it traces CUDA tensors on a machine without a GPU",
)
def test_nothing_is_read_from_a_gpu():
    with FakeTensorMode():
        boxes = torch.empty(4, 4, device="cuda")
        check_targets([{"boxes": boxes, "labels": torch.empty(4, dtype=torch.int64, device="cuda")}], 3)
