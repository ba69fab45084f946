"""Boxes as offsets from references."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.ops.boxes import BoxCoder

corner = st.floats(-500, 500)
side = st.floats(1, 400)
box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(box, box), min_size=1, max_size=5), st.sampled_from([(1.0,) * 4, (0.1, 0.1, 0.2, 0.2)]))
def test_decoding_undoes_encoding(pairs, stds):
    references, boxes = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    coder = BoxCoder(stds, largest_factor=1000.0)
    torch.testing.assert_close(coder.decode(references, coder.encode(references, boxes)), boxes, rtol=1e-9, atol=1e-7)


def test_by_hand():
    reference = torch.tensor([[0.0, 0, 10, 20]])
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    decoded = coder.decode(reference, torch.tensor([[1.0, -1, math.log(2) / 0.2, 0]]))
    torch.testing.assert_close(decoded, torch.tensor([[6.0 - 10, 8 - 10, 6 + 10, 8 + 10]]))
    assert torch.equal(coder.encode(reference, reference), torch.zeros(1, 4))


def test_growth_is_bounded():
    decoded = BoxCoder().decode(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 0, 100, -100]]))
    width, height = (decoded[0, 2:] - decoded[0, :2]).tolist()
    assert math.isclose(width, 62.5, rel_tol=1e-5) and math.isclose(height, 1 / 62.5, rel_tol=1e-5)


def test_half_precision_offsets_decode_in_float32():
    reference = torch.tensor([[1000.0, 1000, 1301, 1303]])
    assert BoxCoder().decode(reference, torch.zeros(1, 4, dtype=torch.bfloat16)).equal(reference)
