"""The box around a mask equals that of pycocotools, and malformed masks give none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle

from brs_detr.data.masks import mask_box


def runs_of(mask):
    """Uncompressed run lengths down the columns, as COCO writes crowds."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=200, deadline=None)
def test_both_kinds_of_run_lengths(mask):
    coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    expected = rle.toBbox(coded).tolist() if mask.any() else None
    size = list(mask.shape)
    assert mask_box({"size": size, "counts": coded["counts"].decode()}) == expected
    assert mask_box({"size": size, "counts": runs_of(mask)}) == expected


@given(st.lists(st.integers(0, 5000), min_size=3, max_size=30))
@settings(max_examples=100, deadline=None)
def test_long_runs_in_compressed_text(runs):
    runs = [runs[0], *(run + 1 for run in runs[1:])]
    height = sum(runs)
    coded = rle.frPyObjects({"size": [height, 1], "counts": runs}, height, 1)
    assert mask_box({"size": [height, 1], "counts": coded["counts"].decode()}) == rle.toBbox(coded).tolist()


@pytest.mark.parametrize(
    "polygons",
    [
        [[1, 2, 9, 2, 9, 7], [3, 0, 4, 0, 4, 1]],
        [1, 2, 9, 0, 9, 7],
        [[1, 2], [9, 0], [9, 7]],
        [[[1, 2], [9, 0], [9, 7]]],
    ],
)
def test_polygons_however_they_are_nested(polygons):
    assert mask_box(polygons) == [1, 0, 8, 7]


@pytest.mark.parametrize(
    "mask",
    [
        [],
        [[1, 2]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, float("nan")]],
        "none",
        {"size": [4, 4]},
        {"size": [0, 0], "counts": [1, 2]},
        {"size": [4, 4], "counts": [20, 30]},
        {"size": [4, 4], "counts": [-3, 5]},
        {"size": [4, 4], "counts": "é"},
        {"size": [4, 4], "counts": [16]},
        {"size": "4x4", "counts": [1]},
    ],
)
def test_what_is_no_mask_has_no_box(mask):
    assert mask_box(mask) is None
