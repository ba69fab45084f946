"""Packed segmentations draw what pycocotools draws, and damaged ones never reach it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from brs_detr.ops.rle import (
    as_text,
    box_bitmap,
    boxes_of,
    checked_runs,
    draw,
    draw_sampled,
    encode,
    pack_segmentation,
    shifted,
    stated_size,
    to_rle,
)


def words(segmentation):
    return np.frombuffer(pack_segmentation(segmentation), np.uint32)


def runs_of(mask):
    """Uncompressed run lengths down the columns."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


@given(arrays(bool, st.tuples(st.integers(1, 15), st.integers(1, 15))))
@settings(max_examples=200, deadline=None)
def test_both_kinds_of_run_lengths_come_back(mask):
    coded = as_text(encode(mask))
    for segmentation in (coded, {"size": list(mask.shape), "counts": runs_of(mask)}):
        packed = words(segmentation)
        assert stated_size(packed) == mask.shape
        assert np.array_equal(draw(packed, mask.shape), mask)
        assert as_text(to_rle(packed, mask.shape)) == coded


def test_runs_may_end_before_the_mask_does():
    mask = np.zeros((3, 4), np.uint8)
    mask[:2, 0] = 1
    for runs in ([0, 2], [0, 2, 1]):
        packed = words({"size": [3, 4], "counts": runs})
        assert np.array_equal(draw(packed, (3, 4)), mask)
        assert np.array_equal(coco_mask.decode(to_rle(packed, (3, 4))), mask)
    empty = words({"size": [3, 4], "counts": [0]})
    assert not draw(empty, (3, 4)).any() and not coco_mask.decode(to_rle(empty, (3, 4))).any()


@given(st.lists(st.lists(st.floats(-20, 60), min_size=6, max_size=16), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_polygons_are_drawn_as_by_pycocotools(parts):
    parts = [np.float32(part[: len(part) // 2 * 2]).tolist() for part in parts]
    packed = words(parts)
    inside = [np.float64(part).round(3).reshape(-1, 2).clip([-40, -30], [80, 60]).ravel().tolist() for part in parts]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(inside, 30, 40)))
    assert stated_size(packed) is None and np.array_equal(draw(packed, (30, 40)), expected)


@pytest.mark.parametrize(
    "polygons",
    [
        [[1, 2, 9, 2, 9, 7]],
        [1, 2, 9, 2, 9, 7],
        [[1, 2], [9, 2], [9, 7]],
        [[[1, 2], [9, 2], [9, 7]]],
        [[[1, 2, 9, 2, 9, 7]]],
    ],
)
def test_polygons_however_they_are_nested(polygons):
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([[1.0, 2, 9, 2, 9, 7]], 10, 12)))
    assert np.array_equal(draw(words(polygons), (10, 12)), expected)


def test_polygons_of_two_points_are_left_out():
    assert np.array_equal(words([[1, 2, 3, 4], [1, 2, 9, 2, 9, 7]]), words([[1, 2, 9, 2, 9, 7]]))


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        "none",
        7,
        [],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, math.nan]],
        [[1, 2, 3, 4, 5, 1e300]],
        [[1, 2, 3, 4, 5, 6], 3],
        {"size": [4, 4]},
        {"size": [4, 4], "counts": None},
        {"size": [0, 4], "counts": [0]},
        {"size": [4.5, 4], "counts": [0]},
        {"size": [4, 4], "counts": [20, 30]},
        {"size": [4, 4], "counts": [-3, 5]},
        {"size": [4, 4], "counts": [2**62, 2**62, 2**62, 2**62, 16]},
        {"size": [4, 4], "counts": [1.5, 2]},
        {"size": [4, 4], "counts": ["1", "2"]},
        {"size": [4, 4], "counts": [[1], [2]]},
        {"size": [4, 4], "counts": "é"},
        {"size": [4, 4], "counts": "o" * 100_000},
        {"size": [2**32, 0], "counts": [0, 2]},
        {"size": [2**40, 2**40], "counts": [0, 2]},
        {"size": "4x4", "counts": [1]},
        {"size": [4, 4, 4], "counts": [1]},
    ],
)
def test_what_is_no_mask_is_not_packed(segmentation):
    assert pack_segmentation(segmentation) == b""


@given(st.text(alphabet=[chr(c) for c in range(33, 127)], max_size=12), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=500, deadline=None)
def test_any_text_is_refused_or_drawn(text, height, width):
    packed = words({"size": [height, width], "counts": text})
    if len(packed):
        assert np.array_equal(draw(packed, (height, width)), coco_mask.decode(to_rle(packed, (height, width))))


def test_far_points_take_no_memory_to_draw():
    assert draw(words([[-1e30, -1e30, 1e30, -1e30, 1e30, 1e30, -1e30, 1e30]]), (20, 30)).all()


def test_checked_runs_takes_bytes():
    assert checked_runs(encode(np.eye(5))["counts"], 5, 5).sum() == 25


def test_a_box_is_drawn_with_one_pixel_at_least():
    assert np.argwhere(box_bitmap(np.array([1.2, 2.6, 3.4, 5.1]), (8, 9))).tolist() == [[3, 1], [3, 2], [4, 1], [4, 2]]
    assert box_bitmap(np.array([8.6, 7.7, 20, 20]), (8, 9)).sum() == 1
    assert box_bitmap(np.array([-5.0, -5, 2, 2]), (8, 9)).sum() == 4


def test_boxes_are_around_the_pixels_of_masks():
    masks = np.zeros((4, 20, 30), bool)
    masks[0, 3:9, 5:7] = True
    masks[1, 19, 29] = True
    masks[2] = True
    boxes = boxes_of([as_text(encode(mask)) for mask in masks])
    assert boxes.tolist() == [[5, 3, 7, 9], [29, 19, 30, 20], [0, 0, 30, 20], [0, 0, 0, 0]]
    assert boxes_of([]).shape == (0, 4)


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), *[st.integers(0, 4)] * 4)
@settings(max_examples=300, deadline=None)
def test_a_mask_of_a_part_is_moved_to_the_image(mask, top, left, below, beside):
    """To every place, also where the part has all rows of the image; as if it were drawn and encoded there."""
    image = np.pad(mask, ((top, below), (left, beside)))
    for coded in (as_text(encode(mask)), {"size": list(mask.shape), "counts": runs_of(mask)}):
        assert shifted(coded, top, left, image.shape) == as_text(encode(image))


def test_no_bitmap_of_the_image_is_drawn_for_a_mask_of_a_part():
    """One of this image would take 1.8 GB."""
    moved = shifted(as_text(encode(np.ones((20, 10), bool))), 30_000, 40_000, (42_000, 42_000))
    assert coco_mask.area(moved) == 200
    assert coco_mask.toBbox(moved).tolist() == [40_000, 30_000, 10, 20]


def test_a_mask_of_a_part_that_is_malformed_is_refused():
    with pytest.raises(ValueError, match="not run lengths of 4x3 pixels"):
        shifted({"size": [3, 4], "counts": [5, 50]}, 0, 0, (9, 9))


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_rows_and_columns_are_read_off_the_runs(mask, random):
    rows, columns = (np.array(sorted(random.choices(range(side), k=random.randint(0, 12))), int) for side in mask.shape)
    packed = words(as_text(encode(mask)))
    sampled = draw_sampled(packed, mask.shape, rows, columns)
    assert (sampled is None) == (not mask.any())
    if sampled is not None:
        assert np.array_equal(sampled, mask[rows][:, columns])
