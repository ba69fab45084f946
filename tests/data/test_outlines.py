"""A polygon drawn again gives the mask it came from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle

from brs_detr.data.outlines import SHAPES, mask_polygons, polygon_area, shape_outline


def draw(polygons, shape):
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *shape))).astype(bool)


def test_area_of_a_square_and_of_its_reverse():
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)
    assert polygon_area(square) == 4 and polygon_area(square[::-1]) == -4


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=150, deadline=None)
def test_exact_outlines_enclose_exactly_the_mask(mask):
    polygons = mask_polygons(mask, tolerance=0, smallest=0)
    assert sum(polygon_area(np.reshape(polygon, (-1, 2))) for polygon in polygons) == mask.sum()
    if polygons:
        assert np.array_equal(draw(polygons, mask.shape), mask)


def test_a_hole_stays_a_hole():
    mask = np.zeros((30, 40), bool)
    mask[5:25, 5:35] = True
    mask[10:20, 12:30] = False
    polygons = mask_polygons(mask)
    assert len(polygons) == 1 and np.array_equal(draw(polygons, mask.shape), mask)


def test_two_parts_are_two_polygons_and_specks_are_none():
    mask = np.zeros((20, 20), bool)
    mask[2:8, 2:8] = mask[12:18, 3:9] = mask[0, 19] = True
    assert len(mask_polygons(mask)) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_in_the_unit_circle_and_vary(shape):
    random = np.random.default_rng(0)
    first, second = shape_outline(shape, random), shape_outline(shape, random)
    assert len(first) == (2 if shape == "ring" else 1) and not np.allclose(first[0], second[0])
    assert np.linalg.norm(first[0], axis=1).max() <= 1 + 1e-9
    assert abs(polygon_area(first[0])) > 0.5 * (0.75**2)
