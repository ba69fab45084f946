"""Adaptive training sample selection."""

import pytest
import torch
from safetensors.torch import load_file
from support import valid_rows
from torchvision.ops import box_iou

from brs_detr.assign.atss import atss_assign
from brs_detr.assign.max_iou import BACKGROUND
from brs_detr.ops.anchors import AnchorGrid, valid_extents

STRIDES = (8, 16, 32, 64, 128)
SHAPES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]


def slow_assign(anchors, counts, objects, topk):
    """Object by object, as Algorithm 1 of the paper is written."""
    iou, centers = box_iou(anchors, objects), (anchors[:, :2] + anchors[:, 2:]) / 2
    owner, value = [BACKGROUND] * len(anchors), [-1.0] * len(anchors)
    for g, box in enumerate(objects):
        candidates, start = [], 0
        for count in counts:
            distance = (centers[start : start + count] - (box[:2] + box[2:]) / 2).norm(dim=1)
            candidates += [start + i for i in distance.argsort()[:topk].tolist()]
            start += count
        overlap = iou[candidates, g]
        threshold = overlap.mean() + overlap.std()
        for c, o in zip(candidates, overlap.tolist()):
            x, y = centers[c]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if o >= threshold and inside and o > value[c]:
                owner[c], value[c] = g, o
    return owner


def random_objects(count):
    corner = torch.rand(count, 2) * 90
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 60], dim=1)


@pytest.mark.parametrize("topk", [1, 4, 9])
def test_equals_the_slow_form(topk):
    levels = AnchorGrid(STRIDES, (8.0,), (1.0,))(SHAPES)
    anchors, counts = torch.cat([a.reshape(-1, 4) for a in levels]), [h * w for h, w in SHAPES]
    objects = random_objects(12)
    assert atss_assign(anchors, counts, objects, topk=topk).tolist() == slow_assign(anchors, counts, objects, topk)


def test_without_objects_everything_is_background():
    assert atss_assign(torch.rand(3, 4), [2, 1], torch.zeros(0, 4)).tolist() == [BACKGROUND] * 3


def test_a_lone_anchor_is_its_own_threshold():
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    assert atss_assign(anchor, [1], torch.tensor([[1.0, 1, 9, 12]])).tolist() == [0]


@pytest.mark.parametrize(("second", "expected"), [(2.0, [0, -1, -1]), (6.0, [-1, -1, -1])])
def test_threshold_by_hand(second, expected):
    """IoUs 1, 0.2 and 0: mean 0.4, deviation over n - 1 0.529; IoUs 1, 0.6 and 0: 0.533 + 0.503 is more than any."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, second], [100, 100, 110, 110]])
    assert atss_assign(anchors, [3], torch.tensor([[0.0, 0, 10, 10]])).tolist() == expected


def test_order_of_objects_only_renames_them():
    levels = AnchorGrid(STRIDES, (8.0,), (1.0,))(SHAPES)
    anchors, counts = torch.cat([a.reshape(-1, 4) for a in levels]), [h * w for h, w in SHAPES]
    objects, order = random_objects(8), torch.randperm(8)
    first = atss_assign(anchors, counts, objects)
    second = atss_assign(anchors, counts, objects[order])
    assert torch.equal(torch.where(second >= 0, order[second.clamp(min=0)], BACKGROUND), first)


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
@pytest.mark.parametrize("scenario", ["normal", "empty1"])
def test_official_targets(golden, family, scenario):
    data = load_file(golden / family / "train_normal.safetensors")
    data |= load_file(golden / family / f"train_{scenario}.safetensors")
    for image, size in enumerate([(128, 153), (101, 160)]):
        extents = valid_extents(size, SHAPES, STRIDES)
        levels = AnchorGrid(STRIDES, (8.0,), (1.0,))(SHAPES)
        objects, labels = data[f"gt_bboxes.{image}"], data[f"gt_labels.{image}"]
        assigned = atss_assign(valid_rows(levels, extents), [h * w for h, w in extents], objects)
        names = [data[f"atss.target.labels.{level}"][image].reshape(*s, 1) for level, s in enumerate(SHAPES)]
        expected = valid_rows(names, extents).flatten()
        ours = torch.cat([labels, labels.new_tensor([5])])[assigned]
        assert torch.equal(ours, expected)
