"""A mask pasted and cut again is the same mask, at any place and size."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from brs_detr.ops.masks import (
    as_rles,
    decode_masks,
    dice_coefficient,
    encode_masks,
    inside_boxes,
    mask_iou,
    mask_targets,
    matrix_nms,
    paste_and_encode,
    paste_masks,
    require_masks,
    resize_masks,
    shrink_masks,
)


def ellipse(h, w, center, radii, turn=0.0):
    """A smooth shape, (h, w) bool."""
    y, x = torch.meshgrid(torch.arange(h) + 0.5 - center[0], torch.arange(w) + 0.5 - center[1], indexing="ij")
    turn = torch.tensor(turn)
    a, b = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    return (a / radii[1]) ** 2 + (b / radii[0]) ** 2 <= 1


def shapes():
    return torch.stack(
        [
            ellipse(120, 160, (60, 70), (30, 45), 0.3),
            ellipse(120, 160, (50, 110), (40, 28)),
            ellipse(120, 160, (60, 80), (59, 79)),
        ]
    )


def boxes_around(masks):
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # torchvision's boxes end at the last pixel, not after it
    return boxes


def test_cut_and_pasted_masks_return():
    masks = shapes()
    boxes, objects = boxes_around(masks), torch.arange(3)
    for moved, least in ((boxes, 0.97), (boxes + torch.tensor([-3.3, -2.1, 4.7, 1.9]), 0.96)):
        targets = mask_targets(masks.to(torch.uint8), moved, objects)
        assert targets.shape == (3, 28, 28) and set(targets.unique().tolist()) == {0, 1}
        pasted = paste_masks(targets, moved, (120, 160))
        assert pasted.shape == masks.shape and (mask_iou(pasted, masks).diagonal() > least).all()


def test_pasting_equals_sampling_on_a_grid():
    """The form of other implementations: torch's bilinear sampling at the position of each pixel, 0 outside."""
    masks = torch.rand(20, 14, 28)
    low = torch.rand(20, 2).double() * 60 - 20
    boxes = torch.cat([low, low + torch.rand(20, 2) * 50 + 2], 1)
    y, x = torch.arange(50.0).double() + 0.5, torch.arange(60.0).double() + 0.5
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(20, 50, 60), y[:, :, None].expand(20, 50, 60)], 3)
    expected = F.grid_sample(masks.double()[:, None], grid, align_corners=False)[:, 0]
    for threshold in (0.3, 0.5, 0.9):
        pasted = paste_masks(masks, boxes, (50, 60), threshold)
        assert (pasted == (expected >= threshold))[(expected - threshold).abs() > 1e-4].all()
        assert pasted.any() and not pasted.all()


def test_chunks_do_not_change_the_result(monkeypatch):
    masks, boxes = torch.rand(7, 28, 28), torch.rand(7, 4) * 20 + torch.tensor([0, 0, 30, 30])
    at_once = paste_masks(masks, boxes, (50, 60))
    monkeypatch.setattr("brs_detr.ops.masks._CHUNK_PIXELS", 2 * 50 * 60)
    assert torch.equal(at_once, paste_masks(masks, boxes, (50, 60)))
    assert paste_and_encode(masks, boxes, (50, 60)) == encode_masks(at_once)


@pytest.mark.parametrize(
    "box", [[5, 5, 5, 9], [5.0, 5, 5, 5], [-80, -80, -20, -20], [500, 500, 600, 600], [-1e6, 0, 1e6, 9]]
)
def test_empty_and_outside_boxes_are_finite(box):
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([box], dtype=torch.float32), (30, 40))
    assert pasted.shape == (1, 30, 40) and (box[0] < 0 < box[2] or not pasted.any())
    targets = mask_targets(torch.ones(1, 30, 40, dtype=torch.uint8), torch.tensor([box]).float(), torch.tensor([0]))
    assert targets.isfinite().all()


def test_nothing_to_paste_nor_cut():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 40)).shape == (0, 30, 40)
    assert paste_and_encode(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 40)) == []
    nothing = mask_targets(
        torch.zeros(0, 30, 40, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    )
    assert nothing.shape == (0, 28, 28) and mask_iou(torch.zeros(0, 3, 3), torch.zeros(2, 3, 3)).shape == (0, 2)


def test_run_lengths_return():
    masks = shapes()
    assert torch.equal(decode_masks(encode_masks(masks), (120, 160)).bool(), masks)
    assert as_rles(masks) == as_rles(encode_masks(masks)) == encode_masks(masks)
    assert decode_masks([], (5, 6)).shape == (0, 5, 6)
    for wrong in ({"size": [160, 120], "counts": "0"}, {"size": [120, 160], "counts": "o"}):
        with pytest.raises(ValueError, match="160x120"):
            decode_masks([wrong], (120, 160))


def test_resizing_keeps_the_shape():
    masks = shapes().to(torch.uint8)
    for size in ((240, 320), (97, 201), (60, 80)):
        back = resize_masks(resize_masks(masks, size), (120, 160))
        assert (mask_iou(back, masks).diagonal() > 0.95).all()
    assert resize_masks(masks[:0], (7, 8)).shape == (0, 7, 8)


@pytest.mark.parametrize("size", [(240, 320), (97, 201), (60, 80), (13, 300), (1, 1), (121, 159)])
def test_resizing_is_torchs(size):
    masks = torch.cat([shapes(), torch.rand(2, 120, 160) > 0.99, torch.zeros(1, 120, 160, dtype=torch.bool)])
    expected = F.interpolate(masks[:, None].to(torch.uint8), size, mode="nearest-exact")[:, 0]
    assert torch.equal(resize_masks(masks.to(torch.uint8), size), expected)


def test_iou_and_dice_by_hand():
    a = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    b = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]])
    assert torch.allclose(mask_iou(a, b), torch.tensor([[1 / 3, 1 / 2, 0], [0, 0, 0]]))
    p = torch.tensor([[0.5, 0.5, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    dice = dice_coefficient(p, t)
    assert torch.allclose(dice, torch.tensor([2 * 1.5 / (1.5 + 2), 0.0]), atol=1e-5)
    dice.sum().backward()
    assert p.grad.isfinite().all()


def test_a_mask_shrunk_to_a_map_of_its_padded_batch_and_pasted_back_returns():
    """The image of 120 x 160 lies at the top left of a batch of 150 x 200, whose map has a quarter of its sides."""
    masks = shapes()
    small = shrink_masks(masks.to(torch.uint8), (150, 200), (38, 50))
    assert small.shape == (3, 38, 50) and not small[:, 31:].any() and not small[:, :, 41:].any()
    batch = torch.tensor([[0.0, 0, 200, 150]]).expand(3, 4)
    pasted = paste_masks(small.float(), batch, (120, 160), beyond="border")
    assert (mask_iou(pasted, masks).diagonal() > 0.93).all()
    stored = paste_masks(small.float(), batch * 2, (240, 320), beyond="border")  # the image was stored twice as large
    assert (mask_iou(stored, resize_masks(masks.float(), (240, 320)).bool()).diagonal() > 0.93).all()
    assert shrink_masks(masks[:0], (150, 200), (38, 50)).shape == (0, 38, 50)


def test_a_mask_of_the_complete_image_reaches_its_border_only_with_the_values_there():
    whole, box = torch.full((1, 10, 10), 0.6), torch.tensor([[0.0, 0, 40, 40]])
    assert paste_masks(whole, box, (40, 40), beyond="border").all()
    assert not paste_masks(whole, box, (40, 40))[0, 0].any()  # mixed with the zeros around a small mask
    (rle,) = paste_and_encode(whole, box, (40, 40), beyond="border")
    assert rle == encode_masks(torch.ones(1, 40, 40))[0]


def test_cells_inside_boxes():
    boxes = torch.tensor([[2.0, 1, 4, 2], [1.5, 0, 2.5, 9], [3, 3, 3, 3]])
    inside = inside_boxes(boxes, (4, 6))
    assert inside[0].nonzero().tolist() == [[1, 2], [1, 3]]
    assert inside[1].nonzero().tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]
    assert not inside[2].any()
    grown = inside_boxes(boxes[2:], (4, 6), border=1.0)
    assert grown[0].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def slow_matrix_nms(masks, labels, scores, sigma):
    """Pair by pair: Eq. 5 of SOLOv2."""
    result = []
    for j in range(len(masks)):
        factors = [1.0]
        for i in range(j):
            if labels[i] == labels[j]:
                better = [float(mask_iou(masks[i][None], masks[k][None])) for k in range(i) if labels[k] == labels[i]]
                overlap = float(mask_iou(masks[i][None], masks[j][None]))
                factors.append(math.exp(-sigma * overlap**2) / math.exp(-sigma * max([0.0, *better]) ** 2))
        result.append(float(scores[j]) * min(factors))
    return torch.tensor(result)


def test_matrix_nms_is_its_definition():
    masks, labels = torch.rand(9, 12, 12) > 0.4, torch.randint(2, (9,))
    masks[4] = masks[1]
    masks[6] = False
    scores = torch.rand(9).sort(descending=True)[0]
    lowered = matrix_nms(masks, labels, scores, sigma=2.0)
    torch.testing.assert_close(lowered, slow_matrix_nms(masks, labels, scores, 2.0))
    assert lowered[0] == scores[0] and (lowered <= scores).all()
    assert len(matrix_nms(masks[:0], labels[:0], scores[:0])) == 0


def test_targets_without_masks_are_refused_by_name():
    boxes = torch.zeros(2, 4)
    require_masks([{"boxes": boxes, "masks": torch.zeros(2, 5, 5)}])
    with pytest.raises(ValueError, match=r"image 1: no `masks`\. Read the dataset with its masks"):
        require_masks([{"boxes": boxes, "masks": torch.zeros(2, 5, 5)}, {"boxes": boxes}])
    with pytest.raises(ValueError, match=r"image 0: 1 masks of 2 boxes"):
        require_masks([{"boxes": boxes, "masks": torch.zeros(1, 5, 5)}])
