"""Deformable attention against a loop that reads the four neighbors by hand, and against the paper's equation."""

import math

import pytest
import torch

from brs_detr.ops.deform_attn import deformable_attention, deformable_sampling, sampling_points

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


def test_a_weight_is_the_softmax_over_levels_and_points_of_its_head():
    logits = torch.randn(1, 2, 3 * 2 * 4)
    _, weights = sampling_points(SHAPES, 3, torch.rand(1, 2, 2, 2), torch.zeros(1, 2, 48), logits)
    assert weights.shape == (1, 2, 3, 2, 4)
    own = logits[0, 1].view(3, 8)[2].exp()  # head 2 of query 1
    torch.testing.assert_close(weights[0, 1, 2].flatten(), own / own.sum())


def test_offsets_around_points_are_cells_of_each_level():
    references = torch.full((1, 1, 2, 2), 0.5)
    offsets = torch.zeros(1, 1, 1, 2, 1, 2)
    offsets[..., 0], offsets[..., 1] = 1.0, -2.0
    locations, _ = sampling_points(SHAPES, 1, references, offsets.flatten(2), torch.zeros(1, 1, 2))
    expected = [[0.5 + 1 / 7, 0.5 - 2 / 5], [0.5 + 1 / 2, 0.5 - 2 / 3]]  # of levels (5, 7) and (3, 2), as (x, y)
    torch.testing.assert_close(locations[0, 0, 0, :, 0], torch.tensor(expected))


def test_as_many_offsets_as_points_reach_the_border_of_a_box():
    box = torch.tensor([0.4, 0.5, 0.2, 0.6]).expand(1, 1, 2, 4)
    offsets = torch.tensor([[4.0, 0.0], [0.0, -4.0], [2.0, 2.0], [0.0, 0.0]]).expand(1, 1, 1, 2, 4, 2)
    locations, _ = sampling_points(SHAPES, 1, box, offsets.flatten(2), torch.zeros(1, 1, 8))
    expected = torch.tensor([[0.5, 0.5], [0.4, 0.2], [0.45, 0.65], [0.4, 0.5]])
    torch.testing.assert_close(locations[0, 0, 0, 1], expected)


def test_half_precision_offsets_are_added_in_float32():
    """At 300 of 334 cells bf16 knows cells two apart only."""
    references, offsets = torch.full((1, 1, 1, 2), 300.5 / 334), torch.full((1, 1, 2), 0.75, dtype=torch.bfloat16)
    locations, weights = sampling_points([(4, 334)], 1, references, offsets, torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    assert locations.dtype == weights.dtype == torch.float32
    assert abs(locations[..., 0].item() * 334 - 301.25) < 1e-3


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_has_the_right_gradients_in_float64(coordinates):
    value = torch.randn(1, 41, 2, 2, dtype=torch.float64)
    references = torch.rand(1, 3, 2, coordinates, dtype=torch.float64)
    offsets, logits = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (value, references, offsets, logits)]
    assert torch.autograd.gradcheck(lambda v, r, o, w: deformable_attention(v, SHAPES, r, o, w), inputs)
