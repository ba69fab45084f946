"""Deformable sampling against a loop that reads the four neighbors by hand."""

import math

import pytest
import torch

from brs_detr.ops.deform_attn import deformable_sampling

SHAPES = [(5, 7), (3, 2)]


def problem(dtype=torch.float64, batch=2, queries=3, heads=2, dim=4, points=2):
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.4 - 0.2  # some outside
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


def by_hand(value, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                start = 0
                for level, (h, w) in enumerate(SHAPES):
                    image = value[b, start : start + h * w, head].view(h, w, -1)
                    start += h * w
                    for p in range(points):
                        x = float(locations[b, q, head, level, p, 0]) * w - 0.5
                        y = float(locations[b, q, head, level, p, 1]) * h - 0.5
                        for i in (math.floor(y), math.floor(y) + 1):
                            for j in (math.floor(x), math.floor(x) + 1):
                                if 0 <= i < h and 0 <= j < w:
                                    share = (1 - abs(y - i)) * (1 - abs(x - j))
                                    out[b, q, head] += weights[b, q, head, level, p] * share * image[i, j]
    return out.flatten(2)


def test_equals_reading_the_four_neighbors_by_hand():
    value, locations, weights = problem()
    result = deformable_sampling(value, SHAPES, locations, weights)
    torch.testing.assert_close(result, by_hand(value, locations, weights))


def test_gradients_are_right_in_float64():
    value, locations, weights = problem(batch=1, queries=2, heads=1, dim=2)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, s, w: deformable_sampling(v, SHAPES, s, w), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    value, locations, weights = problem(torch.float32)
    value = value.to(dtype)
    exact = deformable_sampling(value.float(), SHAPES, locations, weights)
    result = deformable_sampling(value, SHAPES, locations, weights)
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=0, atol=0)


def test_autocast_changes_nothing():
    value, locations, weights = problem(torch.float32)
    plain = deformable_sampling(value, SHAPES, locations, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(deformable_sampling(value, SHAPES, locations, weights), plain, rtol=0, atol=0)


def test_levels_that_do_not_add_up_are_refused():
    value, locations, weights = problem()
    with pytest.raises(ValueError, match="tokens"):
        deformable_sampling(value, [(5, 7), (3, 3)], locations, weights)
