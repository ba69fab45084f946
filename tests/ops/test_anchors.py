"""Anchors and their validity."""

import pytest
import torch
from safetensors.torch import load_file
from support import valid_rows

from brs_detr.ops.anchors import (
    AnchorGrid,
    base_anchors,
    batch_anchors,
    batch_rows,
    cell_features,
    valid_extents,
)

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


@pytest.mark.parametrize("sizes", [[(128, 160)] * 2, [(128, 160), (70, 90)], [(9, 9), (101, 160), (128, 17)]])
@pytest.mark.parametrize("per_cell", [1, 3])
def test_rows_of_all_images_are_those_of_each(sizes, per_cell):
    extents = [valid_extents(size, SHAPES, STRIDES) for size in sizes]
    levels = [torch.randn(len(sizes), h, w, per_cell, 2, requires_grad=True) for h, w in SHAPES]
    expected = torch.cat([valid_rows([level[image] for level in levels], own) for image, own in enumerate(extents)])
    found = batch_rows(levels, extents)
    assert torch.equal(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((rows * weights).sum(), levels, retain_graph=True) for rows in (found, expected)]
    assert all(torch.equal(*pair) for pair in zip(*gradients))
    grid = AnchorGrid(STRIDES, OCTAVE[:per_cell], (1.0,))(SHAPES)
    for own, extent in zip(batch_anchors(grid, extents), extents, strict=True):
        assert torch.equal(own, valid_rows(grid, extent))


@pytest.mark.parametrize("per_cell", [1, 3])
def test_features_of_cells_are_those_of_the_rows(per_cell):
    maps = [torch.randn(2, 5, h, w) for h, w in SHAPES]
    sizes = [(128, 160), (70, 90)]
    for image, (own, size) in enumerate(zip(cell_features(maps, sizes, STRIDES, per_cell), sizes)):
        levels = [x[image].permute(1, 2, 0)[:, :, None].expand(-1, -1, per_cell, -1) for x in maps]
        assert torch.equal(own, valid_rows(levels, valid_extents(size, SHAPES, STRIDES)))


def test_anchors_that_were_kept_serve_after_other_shapes_and_after_inference():
    grid = AnchorGrid((8, 16), (4.0,), (1.0,))
    first = [level.clone() for level in grid([(4, 6), (2, 3)])]
    assert [tuple(level.shape[:2]) for level in grid([(5, 7), (3, 4)])] == [(5, 7), (3, 4)]
    with torch.inference_mode():
        again = grid([(4, 6), (2, 3)])
        extents = [valid_extents((20, 40), [(4, 6), (2, 3)], (8, 16))]
        batch_rows([torch.randn(1, 4, 6, 1, 2), torch.randn(1, 2, 3, 1, 2)], extents)
    assert all(torch.equal(*pair) for pair in zip(again, first))
    shift = torch.zeros((), requires_grad=True)
    assert (grid([(4, 6), (2, 3)])[0] * shift).sum().requires_grad
    levels = [torch.randn(1, 4, 6, 1, 2, requires_grad=True), torch.randn(1, 2, 3, 1, 2, requires_grad=True)]
    batch_rows(levels, extents).sum().backward()
    assert grid.double()([(4, 6), (2, 3)])[0].dtype == torch.float64


def test_wrong_number_of_levels_is_named():
    with pytest.raises(ValueError, match="2 feature maps for 1 strides"):
        AnchorGrid((8,), (8.0,), (1.0,))([(1, 1), (1, 1)])
