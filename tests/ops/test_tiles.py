"""Tiles cover an image, and objects that their edges cut are found once and, where possible, as a whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.ops.tiles import Tile, join_tiles, seen_better, tile_grid, touches_edge


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 900), st.integers(32, 900), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_tiles_cover_the_image_and_overlap_by_their_share(height, width, tile_h, tile_w, overlap):
    grid = tile_grid((height, width), (tile_h, tile_w), overlap)
    for length, side, spans in (
        (width, tile_w, sorted({(t.x1, t.x2, t.next_x1, t.last_x2) for t in grid})),
        (height, tile_h, sorted({(t.y1, t.y2, t.next_y1, t.last_y2) for t in grid}, key=lambda span: span[0])),
    ):
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(end - begin == min(side, length) for begin, end, _, _ in spans)
        for (begin, end, after, _), (later, _, _, last) in itertools.pairwise(spans):
            assert after == later > begin and last == end
            assert end - later >= overlap * side - 1
        assert spans[0][3] is None and spans[-1][2] is None
    assert len(grid) == len({(t.x1, t.y1) for t in grid})


def test_an_image_of_12_megapixels():
    grid = tile_grid((3000, 4000), (1024, 1024), 0.2)
    assert len(grid) == 5 * 4 and grid[0][:4] == (0, 0, 1024, 1024) and grid[-1][:4] == (2976, 1976, 4000, 3000)


def test_an_image_smaller_than_a_tile_is_one_tile():
    assert tile_grid((30, 40), (64, 64), 0.2) == [Tile(0, 0, 40, 30)]
    boxes = torch.tensor([[0.0, 0, 40, 30]])
    assert not touches_edge(boxes, Tile(0, 0, 40, 30)).any() and not seen_better(boxes, Tile(0, 0, 40, 30)).any()


@pytest.mark.parametrize(
    ("tile", "overlap", "said"), [((31, 64), 0.2, "64x31 pixels"), ((64, 64), 0.95, "0.95"), ((64, 64), -0.1, "-0.1")]
)
def test_tiles_that_make_no_sense_are_refused(tile, overlap, said):
    with pytest.raises(ValueError, match=said):
        tile_grid((500, 500), tile, overlap)


def test_edges_by_hand():
    """Tiles of 100 pixels at 0 and 80: the first one's right edge is inside the image, its others are not."""
    left, right = tile_grid((100, 180), (100, 100), 0.2)
    boxes = torch.tensor([[90.0, 0, 100, 100], [50, 10, 100, 20], [10, 10, 99, 20], [10, 10, 40, 20]])
    assert touches_edge(boxes, left).tolist() == [[False, False, cut, False] for cut in (True, True, True, False)]
    # the right tile shows all of the first; of the others, it shows only what is beyond 80
    assert seen_better(boxes, left).tolist() == [True, False, False, False]
    boxes = torch.tensor([[80.0, 10, 90, 20], [80, 10, 150, 20]])
    assert seen_better(boxes, right).tolist() == [True, False]


objects = st.lists(
    st.tuples(st.integers(0, 560), st.integers(0, 360), st.integers(8, 200), st.integers(8, 200)),
    min_size=1,
    max_size=1,
)


def seen_by_tiles(boxes, grid):
    """What a perfect detector returns in each tile: the visible part of every object, if a fifth of it is visible."""
    found, tiles, parts = [], [], []
    for number, tile in enumerate(grid):
        low, high = torch.tensor([tile.x1, tile.y1]), torch.tensor([tile.x2, tile.y2])
        corners = torch.cat([boxes[:, :2].clamp(low, high), boxes[:, 2:].clamp(low, high)], 1)
        area = (corners[:, 2:] - corners[:, :2]).prod(1)
        corners = corners[area > 0.2 * (boxes[:, 2:] - boxes[:, :2]).prod(1)]
        corners = corners[~seen_better(corners, tile)]
        found.append(corners)
        parts.append(touches_edge(corners, tile).any(1))
        tiles += [number] * len(corners)
    return torch.cat(found), torch.tensor(tiles), torch.cat(parts)


@given(st.integers(0, 560), st.integers(0, 360), st.integers(8, 220), st.integers(8, 220), st.floats(0.2, 0.6))
@settings(max_examples=150, deadline=None)
def test_an_object_is_found_once_if_the_overlap_holds_it_and_never_lost(x, y, width, height, overlap):
    size, side = (400, 600), 128
    box = torch.tensor([[x, y, min(x + width, 600), min(y + height, 400)]]).float()
    grid = tile_grid(size, (side, side), overlap)
    boxes, tiles, parts = seen_by_tiles(box, grid)
    kept = join_tiles(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)), tiles, parts)
    width, height = (box[0, 2:] - box[0, :2]).tolist()
    if max(width, height) < overlap * side - 5:  # the margins of both edges, and a rounded one
        assert boxes[kept].tolist() == box.tolist()
    elif max(width, height) < side / 2:  # a fifth of it is visible in some tile
        assert len(kept)


def slowly_joined(boxes, scores, labels, tiles, is_part):
    def iou(a, b, of_first=False):
        wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        first = (a[2] - a[0]) * (a[3] - a[1])
        both = first if of_first else first + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
        return wide * high / both

    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    complete = []
    for i in order:
        if not is_part[i] and not any(
            labels[i] == labels[j] and tiles[i] != tiles[j] and iou(boxes[i], boxes[j]) > 0.5 for j in complete
        ):
            complete.append(i)
    parts = []
    for i in order:
        if not is_part[i] or any(labels[i] == labels[j] and iou(boxes[i], boxes[j], True) >= 0.6 for j in complete):
            continue
        if not any(labels[i] == labels[j] and tiles[i] != tiles[j] and iou(boxes[i], boxes[j]) > 0.5 for j in parts):
            parts.append(i)
    return sorted(complete + parts, key=lambda i: -scores[i])


@pytest.mark.parametrize("count", [0, 1, 40, 150])
def test_join_equals_a_slow_reference(count):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=generator)], 1)
    scores = torch.rand(count, generator=generator)
    labels, tiles = (torch.randint(0, high, (count,), generator=generator) for high in (3, 4))
    is_part = torch.rand(count, generator=generator) < 0.4
    kept = join_tiles(boxes, scores, labels, tiles, is_part)
    assert kept.tolist() == slowly_joined(*(x.tolist() for x in (boxes, scores, labels, tiles, is_part)))


def test_detections_of_one_tile_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)
    kept = join_tiles(boxes, torch.tensor([0.1, 0.3, 0.2]), torch.zeros(3), torch.tensor([0, 0, 0]), torch.zeros(3) > 0)
    assert kept.tolist() == [1, 2, 0]


def test_a_complete_box_stands_for_its_parts_whatever_their_scores():
    boxes = torch.tensor([[0.0, 0, 100, 50], [0, 0, 60, 50], [0, 0, 60, 50], [58, 0, 100, 50]])
    scores, tiles = torch.tensor([0.4, 0.9, 0.8, 0.7]), torch.tensor([9, 0, 0, 1])
    parts = torch.tensor([False, True, True, True])
    assert join_tiles(boxes, scores, torch.tensor([1, 1, 2, 1]), tiles, parts).tolist() == [2, 0]
