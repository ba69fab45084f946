"""Assignment by center regions, against a slow form that paints one object after the other."""

import math

import pytest
import torch

from brs_detr.assign.fovea import SIZE_RANGES, FoveaAssigner
from brs_detr.assign.max_iou import BACKGROUND
from brs_detr.ops.anchors import AnchorGrid

STRIDES = (8, 16, 32, 64, 128)


def points(shapes, strides=STRIDES):
    grid = AnchorGrid(strides, (2.0,), (1.0,), offset=0.5)(shapes)
    return torch.cat([level.reshape(-1, 4) for level in grid]), [h * w for h, w in shapes]


def slow_assign(shapes, objects, sigma):
    """The largest object first; each paints over what was there."""
    assigned = []
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in objects]
    for (rows, columns), stride, (least, largest) in zip(shapes, STRIDES, SIZE_RANGES):
        level = [[BACKGROUND] * columns for _ in range(rows)]
        for obj in sorted(range(len(objects)), key=lambda i: -areas[i]):
            if not least <= math.sqrt(areas[obj]) <= largest:
                continue
            x1, y1, x2, y2 = (value / stride for value in objects[obj])
            spans = []
            for low, high, count in ((x1, x2, columns), (y1, y2, rows)):
                center, half = (low + high) / 2, sigma * (high - low) / 2
                first, last = math.ceil(center - half - 0.5), math.floor(center + half - 0.5)
                first, last = (min(max(end, 0), count - 1) for end in (first, last))
                spans.append(range(first, last + 1))
            for x in spans[0]:
                for y in spans[1]:
                    level[y][x] = obj
        assigned += [owner for row in level for owner in row]
    return assigned


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [0.4, 0.9])
def test_equals_the_slow_form(seed, sigma):
    torch.manual_seed(seed)
    shapes = [(25, 38), (13, 19), (7, 10), (4, 5), (2, 3)]
    center, side = torch.rand(40, 2) * torch.tensor([300.0, 200]), torch.rand(40, 2).square() * 250 + 2
    objects = torch.cat([center - side / 2, center + side / 2], dim=1)
    objects[:, 0::2], objects[:, 1::2] = objects[:, 0::2].clamp(0, 300), objects[:, 1::2].clamp(0, 200)
    anchors, counts = points(shapes)
    ours = FoveaAssigner(STRIDES, sigma=sigma)(anchors, counts, objects).tolist()
    assert ours == slow_assign(shapes, objects.tolist(), sigma)
    assert len(set(ours)) > 20


def test_region_by_hand():
    """40 % of 40 x 80 pixels around (40, 40): columns 4 and 5 (centers 36, 44), rows 3 to 6 (28 to 52)."""
    anchors, counts = points([(10, 10)], (8,))
    assigned = FoveaAssigner((8,), ((1.0, 64.0),))(anchors, counts, torch.tensor([[20.0, 0, 60, 80]])).reshape(10, 10)
    assert {(int(y), int(x)) for y, x in (assigned == 0).nonzero()} == {(y, x) for y in range(3, 7) for x in (4, 5)}


@pytest.mark.parametrize(("side", "levels"), [(20, {0}), (40, {0, 1}), (64, {0, 1, 2}), (65, {1, 2}), (300, {3, 4})])
def test_an_object_belongs_to_the_levels_of_its_size(side, levels):
    shapes = [(512 // stride, 512 // stride) for stride in STRIDES]
    anchors, counts = points(shapes)
    objects = torch.tensor([[256.0 - side / 2, 256.0 - side / 2, 256.0 + side / 2, 256.0 + side / 2]])
    assigned = FoveaAssigner(STRIDES, sigma=1.0)(anchors, counts, objects).split(counts)
    assert {level for level, own in enumerate(assigned) if (own == 0).any()} == levels


def test_a_small_object_between_centers_has_no_positive():
    anchors, counts = points([(10, 10)], (8,))
    assigner = FoveaAssigner((8,), ((1.0, 64.0),))
    assert (assigner(anchors, counts, torch.tensor([[38.0, 38, 42, 42]])) == BACKGROUND).all()


def test_a_small_object_at_the_border_has_the_last_cell():
    anchors, counts = points([(10, 10)], (8,))
    assigner = FoveaAssigner((8,), ((1.0, 64.0),))
    assigned = assigner(anchors, counts, torch.tensor([[78.0, 78, 80, 80], [0, 0, 2, 2]]))
    assert assigned[[99, 0]].tolist() == [0, 1] and (assigned[1:99] == BACKGROUND).all()


def test_without_objects_everything_is_background():
    anchors, counts = points([(3, 4)], (8,))
    assigned = FoveaAssigner((8,), ((1.0, 64.0),))(anchors, counts, torch.zeros(0, 4))
    assert assigned.tolist() == [BACKGROUND] * 12


def test_one_range_per_stride():
    with pytest.raises(ValueError, match="5 ranges for 2 strides"):
        FoveaAssigner((8, 16))
