"""The grid look-up and the quadrant sums against what they replace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.losses.dominance import dense_missorted, quadrant_missorted, quadrant_sums
from brs_detr.losses.step_sums import locate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("count", [1, 2, 30, 3000])
def test_grid_equals_binary_search(count, spread, dtype):
    points = (torch.randn(count, dtype=dtype) * spread + 3).sort()[0]
    inside = points[torch.randint(count, (2500,))]
    nearby = torch.nextafter(inside, torch.randn(2500).sign().to(dtype) * torch.inf)
    edges = torch.tensor([torch.inf, -torch.inf, 0.0, 1e38, -1e38], dtype=dtype)
    x = torch.cat([inside, nearby, torch.randn(2500, dtype=dtype) * spread + 3, edges])
    assert torch.equal(locate(points[None], x[None])[0].long(), torch.searchsorted(points, x, right=True))


def test_a_crowd_in_one_slot_falls_back_to_binary_search():
    points = torch.cat([torch.zeros(500), torch.rand(500) * 1e-6, torch.tensor([1e6])]).sort()[0]
    x = torch.cat([torch.rand(5000) * 1e-6, torch.tensor([0.0, 1e6, 2e6])])
    assert torch.equal(locate(points[None], x[None])[0].long(), torch.searchsorted(points, x, right=True))


@settings(max_examples=60, deadline=None)
@given(st.permutations(list(range(13))), st.data())
def test_quadrant_sums_by_definition(row, data):
    count = data.draw(st.integers(1, 13))
    row = torch.tensor([r for r in row if r < count])
    values = torch.randn(2, count, dtype=torch.float64)
    bound = st.lists(st.integers(0, count), min_size=5, max_size=5)
    rows, columns = torch.tensor(data.draw(bound)), torch.tensor(data.draw(bound))
    inside = (row < rows[:, None]) & (torch.arange(count) < columns[:, None])
    assert torch.allclose(quadrant_sums(row, values, rows, columns), (values[:, None] * inside).sum(2))


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 2, 3, 64, 700])
def test_quadrant_sorting_equals_the_matrix(count, delta):
    scores = (torch.randn(1, count, dtype=torch.float64) * 4).round().div(4).sort()[0]
    quality = torch.rand(1, count, dtype=torch.float64).mul(20).round() / 20
    weight = torch.rand(1, count, dtype=torch.float64)
    mass, error, spread = dense_missorted(scores, quality, delta)
    fast_mass, fast_error, fast_spread = quadrant_missorted(scores, quality, delta)
    assert torch.allclose(fast_mass, mass, atol=1e-10)
    assert torch.allclose(fast_error, error, atol=1e-10)
    assert torch.allclose(fast_spread(weight), spread(weight), atol=1e-10)
