"""Sampling by Gathers against sampling by `grid_sample`: values, gradients, locations far outside, precision."""

import pytest
import torch

from brs_detr.ops.deform_attn import deformable_sampling
from brs_detr.ops.deform_attn_gather import gathered_sampling, neighbors

SHAPES = [(5, 7), (3, 2), (1, 1)]


def problem(dtype=torch.float64, batch=2, queries=6, heads=2, dim=4, points=3):
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.6 - 0.3  # some outside
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


def test_values_and_gradients_equal_those_of_grid_sample():
    inputs = [tensor.requires_grad_() for tensor in problem()]
    value, locations, weights = inputs
    ours = gathered_sampling(value, SHAPES, locations, weights)
    theirs = deformable_sampling(value, SHAPES, locations, weights)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        torch.testing.assert_close(mine, other)


def test_gradients_are_right_in_float64():
    value, locations, weights = problem(batch=1, queries=2, heads=1, dim=2)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, s, w: gathered_sampling(v, SHAPES, s, w), inputs)


@pytest.mark.parametrize("place", [-1e6, -0.5, 0.0, 0.1, 0.5, 1.0, 1.5, 1e6])
def test_borders_and_places_far_outside_read_what_grid_sample_reads(place):
    value, locations, weights = problem(torch.float32)
    locations = torch.full_like(locations, place)
    locations[..., 1].uniform_()
    for turned in (locations, locations.flip(-1)):
        ours = gathered_sampling(value, SHAPES, turned, weights)
        torch.testing.assert_close(ours, deformable_sampling(value, SHAPES, turned, weights))


def test_a_location_on_a_cell_reads_that_cell():
    value = torch.arange(12.0).view(1, 12, 1, 1)
    centers = torch.tensor([[0.5 / 4, 0.5 / 3], [2.5 / 4, 1.5 / 3], [3.5 / 4, 2.5 / 3]]).view(1, 3, 1, 1, 1, 2)
    read = gathered_sampling(value, [(3, 4)], centers, torch.ones(1, 3, 1, 1, 1))
    torch.testing.assert_close(read.flatten(), torch.tensor([0.0, 6.0, 11.0]))


def test_neighbors_outside_are_moved_inside_and_weigh_nothing():
    (before, share_before), (after, share_after) = neighbors(torch.tensor([-1.5, -0.25, 1.75, 2.5]), torch.tensor(3.0))
    assert before.tolist() == [0, 0, 1, 2] and after.tolist() == [0, 0, 2, 2]
    assert share_before.tolist() == [0, 0, 0.25, 0.5] and share_after.tolist() == [0, 0.75, 0.75, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    value, locations, weights = problem(torch.float32)
    value = value.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gathered_sampling(value, SHAPES, locations, weights)
    assert result.dtype == dtype
    torch.testing.assert_close(result, gathered_sampling(value.float(), SHAPES, locations, weights).to(dtype))


def test_levels_that_do_not_add_up_are_refused():
    value, locations, weights = problem()
    with pytest.raises(ValueError, match="tokens"):
        gathered_sampling(value, [(5, 7), (3, 3), (1, 1)], locations, weights)
