"""Maximum-IoU assignment.

Random subsets of an assignment.
"""

import pytest
import torch
from safetensors.torch import load_file
from support import valid_rows
from torchvision.ops import box_iou

from brs_detr.assign import max_iou
from brs_detr.assign.max_iou import BACKGROUND, IGNORED, RandomSampler, max_iou_assign
from brs_detr.ops.anchors import valid_extents

SIZES = [(128, 153), (101, 160)]
STRIDES = (8, 16, 32, 64, 128)
SHAPES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]


def boxes_of(count):
    corner = torch.rand(count, 2) * 80
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 40], dim=1)


def slow_assign(boxes, objects, positive, negative, low_quality):
    """Box by box, as the paper words it."""
    iou = box_iou(objects, boxes)
    result = []
    for j in range(len(boxes)):
        best = iou[:, j].max().item()
        which = iou[:, j].argmax().item()
        result.append(which if best >= positive else BACKGROUND if best < negative else IGNORED)
    if low_quality is not None:
        for i in range(len(objects)):
            top = iou[i].max().item()
            if top >= low_quality:
                for j in range(len(boxes)):
                    if iou[i, j].item() == top:
                        result[j] = i
    return torch.tensor(result)


@pytest.mark.parametrize("low_quality", [None, 0.1, 0.3])
@pytest.mark.parametrize("table", [1, 150, 1 << 23])
def test_equals_the_slow_form_in_blocks_of_any_size(monkeypatch, low_quality, table):
    monkeypatch.setattr(max_iou, "MAX_TABLE", table)
    boxes, objects = boxes_of(60), boxes_of(7)
    boxes[10:14] = boxes[3]
    objects[6] = objects[2]
    ours = max_iou_assign(boxes, objects, positive=0.5, negative=0.3, low_quality=low_quality)
    assert ours.tolist() == slow_assign(boxes, objects, 0.5, 0.3, low_quality).tolist()


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ({"positive": 0.5, "negative": 0.3}, 0),
        ({"positive": 0.7, "negative": 0.5}, IGNORED),
        ({"positive": 0.7, "negative": 0.6}, BACKGROUND),
        ({"positive": 0.7, "negative": 0.6, "low_quality": 0.5}, 0),
    ],
)
def test_an_iou_at_a_threshold_reaches_it(thresholds, expected):
    half = torch.tensor([[0.0, 0, 10, 5]])
    assert max_iou_assign(half, torch.tensor([[0.0, 0, 10, 10]]), **thresholds).tolist() == [expected]


@pytest.mark.parametrize("table", [1, 1 << 23])
def test_of_equal_objects_the_first_is_taken(monkeypatch, table):
    monkeypatch.setattr(max_iou, "MAX_TABLE", table)
    box = torch.tensor([[0.0, 0, 10, 10]])
    assert max_iou_assign(box, box.repeat(3, 1), positive=0.5, negative=0.5).tolist() == [0]


def test_an_object_without_area_becomes_no_box():
    boxes, objects = boxes_of(3), torch.tensor([[5.0, 5, 5, 9]])
    assigned = max_iou_assign(boxes, objects, positive=0.5, negative=0.4, low_quality=0.0)
    assert assigned.tolist() == [BACKGROUND] * 3


def test_without_objects_everything_is_background():
    assigned = max_iou_assign(boxes_of(4), torch.zeros(0, 4), positive=0.7, negative=0.3, low_quality=0.3)
    assert assigned.tolist() == [BACKGROUND] * 4
    assert max_iou_assign(torch.zeros(0, 4), boxes_of(2), positive=0.7, negative=0.3).shape == (0,)


def test_order_of_boxes_does_not_matter():
    boxes, objects, order = boxes_of(80), boxes_of(5), torch.randperm(80)
    assigned = max_iou_assign(boxes, objects, positive=0.5, negative=0.3, low_quality=0.2)
    assert torch.equal(
        max_iou_assign(boxes[order], objects, positive=0.5, negative=0.3, low_quality=0.2), assigned[order]
    )


@pytest.mark.parametrize("scenario", ["normal", "empty1"])
def test_official_rpn_labels(golden, scenario):
    data = load_file(golden / "brs_detr" / "train_normal.safetensors")
    data |= load_file(golden / "brs_detr" / f"train_{scenario}.safetensors")
    for image, size in enumerate(SIZES):
        extents = valid_extents(size, SHAPES, STRIDES)

        def cut(name, image=image, extents=extents):
            maps = [data[f"rpn.{name}.{level}"] for level in range(5)]
            maps = [(m if name == "anchors" else m[image]).reshape(*s, 9, -1) for m, s in zip(maps, SHAPES)]
            return valid_rows(maps, extents)

        objects = data[f"gt_bboxes.{image}"]
        assigned = max_iou_assign(cut("anchors"), objects, positive=0.7, negative=0.3, low_quality=0.3)
        weights, labels = cut("target.label_weights").flatten(), cut("target.labels").flatten()
        assert torch.equal(assigned != IGNORED, weights > 0)
        assert torch.equal(assigned >= 0, (labels == 0) & (weights > 0))


def in_order(count, device):
    return torch.arange(count, device=device)


@pytest.mark.parametrize(
    ("positives", "backgrounds", "kept"),
    [(50, 500, (5, 15)), (2, 500, (2, 18)), (50, 3, (5, 3)), (0, 500, (0, 20)), (0, 0, (0, 0))],
)
def test_background_fills_what_positives_leave(positives, backgrounds, kept):
    assigned = torch.tensor([7] * positives + [BACKGROUND] * backgrounds + [IGNORED] * 9, dtype=torch.int64)
    assigned = assigned[torch.randperm(len(assigned))]
    drawn = RandomSampler(20, 0.25)(assigned)
    assert ((drawn >= 0).sum().item(), (drawn == BACKGROUND).sum().item()) == kept
    assert torch.equal(drawn[drawn != IGNORED], assigned[drawn != IGNORED])


def test_first_by_index_when_the_order_is_given():
    assigned = torch.tensor([-1, 3, -2, 1, -1, 0, -1, -1])
    assert RandomSampler(4, 0.5, in_order)(assigned).tolist() == [-1, 3, -2, 1, -1, -2, -2, -2]


def test_every_entry_is_equally_likely():
    assigned = torch.tensor([0] * 4 + [BACKGROUND] * 6)
    hits = sum((RandomSampler(4, 0.5)(assigned) != IGNORED).float() for _ in range(2000)) / 2000
    torch.testing.assert_close(hits, torch.tensor([0.5] * 4 + [1 / 3] * 6), atol=0.06, rtol=0)


@pytest.mark.parametrize("table", [1, 1 << 23])
def test_of_several_best_boxes_only_the_first_is_given_where_asked(monkeypatch, table):
    monkeypatch.setattr(max_iou, "MAX_TABLE", table)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4], [0, 0, 4, 4], [50, 50, 60, 60], [90, 90, 95, 95]])
    objects = torch.tensor([[0.0, 0, 3, 4], [52, 52, 54, 54], [300, 300, 310, 310]])
    ours = max_iou_assign(boxes, objects, positive=0.8, negative=0.4, low_quality=0.0, first_best=True)
    # box 2 overlaps as box 1 does, and so is ignored; an object that nothing overlaps takes the first box of all
    assert ours.tolist() == [2, 0, IGNORED, 1, BACKGROUND]
    every = max_iou_assign(boxes, objects, positive=0.8, negative=0.4, low_quality=0.01)
    assert every.tolist() == [BACKGROUND, 0, 0, 1, BACKGROUND]
