"""Cells of grids around the centers of mass, compared with the paper's words cell by cell."""

import math

import pytest
import torch

from brs_detr.assign.max_iou import BACKGROUND
from brs_detr.assign.solo import mass_centers, solo_assign

GRIDS, RANGES = (12, 8, 4), ((1.0, 30.0), (20.0, 60.0), (40.0, 500.0))


def slow_assign(boxes, centers, frame, sigma):
    """Object by object in reverse, so that the first one is written last and keeps a shared cell."""
    result = []
    for grid, (least, largest) in zip(GRIDS, RANGES):
        cells = [[BACKGROUND] * grid for _ in range(grid)]
        for i in reversed(range(len(boxes))):
            (x1, y1, x2, y2), (cx, cy) = boxes[i].tolist(), centers[i].tolist()
            if not least <= math.sqrt((x2 - x1) * (y2 - y1)) <= largest:
                continue
            spans = []
            for c, side, pixels in ((cx, x2 - x1, frame[1]), (cy, y2 - y1, frame[0])):
                middle = math.floor(c / (pixels / grid))
                low = math.floor((c - sigma * side / 2) / (pixels / grid))
                high = math.floor((c + sigma * side / 2) / (pixels / grid))
                spans.append(range(max(low, middle - 1, 0), min(high, middle + 1, grid - 1) + 1))
            for row in spans[1]:
                for column in spans[0]:
                    cells[row][column] = i
        result += [cell for row in cells for cell in row]
    return torch.tensor(result)


@pytest.mark.parametrize("sigma", [0.2, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_slow_form(seed, sigma):
    torch.manual_seed(seed)
    corner = torch.rand(12, 2) * 100
    boxes = torch.cat([corner, corner + 2 + torch.rand(12, 2) * 70], dim=1)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + torch.randn(12, 2) * 3
    ours = solo_assign(boxes, centers, (160, 190), GRIDS, RANGES, sigma)
    assert torch.equal(ours, slow_assign(boxes, centers, (160, 190), sigma))
    assert len(set(ours.tolist())) > 4


def test_by_hand():
    """Object 0 and 1 share the center cell; a region of any size has at most 3x3 cells."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [0, 0, 40, 40], [0, 0, 100, 100]])
    centers = torch.tensor([[22.0, 22], [22, 22], [52, 52]])
    level = solo_assign(boxes, centers, (100, 100), (10,), ((1.0, 1000.0),), sigma=0.2).view(10, 10)
    assert (level[2, 2] == 0) and level[1:3, 1:3].flatten().tolist() == [1, 1, 1, 0]
    assert (level[4:7, 4:7] == 2).all() and (level == 2).sum() == 9
    huge = solo_assign(boxes[2:], centers[2:], (100, 100), (10,), ((1.0, 1000.0),), sigma=1.0)
    assert (huge == 0).sum() == 9


def test_no_objects_and_empty_masks_leave_background():
    assert (solo_assign(torch.zeros(0, 4), torch.zeros(0, 2), (96, 96), GRIDS, RANGES) == BACKGROUND).all()
    centers = mass_centers(torch.zeros(1, 96, 96, dtype=torch.uint8))
    assert centers.isnan().all()
    assert (solo_assign(torch.tensor([[4.0, 4, 40, 40]]), centers, (96, 96), GRIDS, RANGES) == BACKGROUND).all()
    assert mass_centers(torch.zeros(0, 9, 9)).shape == (0, 2)


def test_mass_centers():
    masks = torch.zeros(2, 10, 20, dtype=torch.uint8)
    masks[0, 2:4, 5:9] = 1
    masks[1, 0, 0] = masks[1, 9, 19] = 1
    assert mass_centers(masks).tolist() == [[7, 3], [10, 5]]
