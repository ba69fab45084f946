"""Anchors and their validity."""

import pytest
import torch
from safetensors.torch import load_file

from brs_detr.ops.anchors import AnchorGrid, base_anchors, valid_extents, valid_rows

STRIDES = (8, 16, 32, 64, 128)
SHAPES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
OCTAVE = tuple(4 * 2 ** (i / 3) for i in range(3))


def test_area_follows_scale_and_shape_follows_ratio():
    boxes = base_anchors(8, (2.0, 4.0), (0.5, 2.0))
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(-1)
    torch.testing.assert_close(width * height, torch.tensor([256.0, 1024, 256, 1024]))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 0.5, 2, 2]))
    torch.testing.assert_close(boxes[:, :2] + boxes[:, 2:], torch.zeros(4, 2))


def test_centers_sit_on_the_cell_corner():
    (level,) = AnchorGrid((16,), (8.0,), (1.0,))([(2, 3)])
    assert level.shape == (2, 3, 1, 4)
    torch.testing.assert_close(level[1, 2, 0], torch.tensor([32.0 - 64, 16 - 64, 32 + 64, 16 + 64]))


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_anchors(golden, family):
    data = load_file(golden / family / "train_normal.safetensors")
    for name, scales, ratios in (("rpn", OCTAVE, (0.5, 1.0, 2.0)), ("atss", (8.0,), (1.0,))):
        for level, anchors in enumerate(AnchorGrid(STRIDES, scales, ratios)(SHAPES)):
            torch.testing.assert_close(anchors.reshape(-1, 4), data[f"{name}.anchors.{level}"])


def test_official_valid_flags(golden):
    data = load_file(golden / "co_detr" / "train_normal.safetensors")
    for image, size in enumerate([(128, 153), (101, 160)]):
        for level, (rows, columns) in enumerate(valid_extents(size, SHAPES, STRIDES)):
            expected = data[f"atss.valid_flags.{image}.{level}"].reshape(SHAPES[level]).bool()
            ours = torch.zeros_like(expected)
            ours[:rows, :columns] = True
            assert torch.equal(ours, expected)


def test_cutting_out_equals_masking():
    levels = [torch.randn(h, w, 3, 4) for h, w in SHAPES]
    extents = valid_extents((70, 90), SHAPES, STRIDES)
    kept = []
    for level, stride in zip(levels, STRIDES):
        rows, columns = torch.meshgrid(
            torch.arange(level.shape[0]) * stride < 70, torch.arange(level.shape[1]) * stride < 90, indexing="ij"
        )
        kept.append(level[rows & columns].reshape(-1, 4))
    torch.testing.assert_close(valid_rows(levels, extents), torch.cat(kept), rtol=0, atol=0)


def test_wrong_number_of_levels_is_named():
    with pytest.raises(ValueError, match="2 feature maps for 1 strides"):
        AnchorGrid((8,), (8.0,), (1.0,))([(1, 1), (1, 1)])
