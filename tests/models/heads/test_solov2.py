"""SOLOv2's head: what must hold whatever the weights, and slow forms of its losses and detections."""

import math

import pytest
import torch
from torch.nn import functional as F

from brs_detr.models.heads.solov2 import SOLOv2Head, SOLOv2Output, peaks, with_coordinates
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.one_stage_config import SOLOv2HeadConfig
from brs_detr.ops.masks import mask_iou

STRIDES, FRAME, SIZES = (4, 8, 16, 32, 64), (64, 96), [(64, 96), (56, 80)]
CELLS = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
SMALL = {"conv_dim": 8, "mask_hidden": 8, "mask_dim": 8, "norm_groups": 2, "stacked_convs": 1}
OBJECTS = [[4.0, 4, 36, 36], [50, 10, 82, 44], [30, 40, 62, 62], [2, 46, 14, 60]]


def build(classes, dim=8, **options):
    return SOLOv2Head(dim, classes, STRIDES, 4, SOLOv2HeadConfig(**(SMALL | options)))


def feature_maps(batch=2, dim=8):
    return [torch.randn(batch, dim, h, w) for h, w in CELLS]


def targets(*boxes_per_image, classes=3):
    """Objects whose masks are ellipses inside their boxes."""
    result = []
    for boxes, (h, w) in zip(boxes_per_image, SIZES):
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        masks = [
            ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
            for x1, y1, x2, y2 in boxes
        ]
        masks = torch.stack(masks) if masks else torch.zeros(0, h, w)
        boxes = torch.tensor(boxes).reshape(-1, 4)
        labels = torch.arange(len(boxes)) % classes
        result.append({"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)})
    return result


OBJECTIVES = {
    "focal": ScoreConfig(weights=TermWeights(mask=3.0)),
    **{loss: RankingConfig(loss, score_weighted=True) for loss in ("brs", "rs", "bap", "ap")},
    **{loss: RankingConfig(loss, balance="epoch") for loss in ("alrp", "balrp")},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("boxes", [([], []), (OBJECTS, []), (OBJECTS, OBJECTS[:1])], ids=["none", "one", "both"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_has_a_gradient_whatever_the_images_show(objective, boxes, classes):
    head = build(classes, objective=OBJECTIVES[objective])
    terms = head.losses(head(feature_maps(), FRAME), SIZES, targets(*boxes, classes=classes)).terms
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert {float(value.detach()) for name, value in terms.items() if name != "cls"} == {0.0}
        return
    assert head.kernel.weight.grad.abs().sum() > 0 and head.masks.output[0].weight.grad.abs().sum() > 0


def slow_dice(output, assigned, objects):
    """Cell by cell in the order of the logits: draw its mask, and compare it with that of its own object."""
    values, row, (h, w) = [], 0, output.features.shape[2:]
    for image, target in enumerate(objects):
        for level in output.kernels:
            for kernel in level[image].flatten(0, 1):
                own = int(assigned[row])
                row += 1
                if own < 0:
                    continue
                bitmap = torch.zeros(1, 1, *output.frame)
                mask = target["masks"][own - sum(len(before["boxes"]) for before in objects[:image])]
                bitmap[0, 0, : mask.shape[0], : mask.shape[1]] = mask
                wanted = (F.interpolate(bitmap, (h, w), mode="bilinear")[0, 0] > 0.5).float()
                drawn = F.conv2d(output.features[image][None], kernel.view(1, -1, 1, 1))[0, 0].sigmoid()
                squares = (drawn**2).sum() + 0.001 + (wanted**2).sum() + 0.001
                values.append(2 * (drawn * wanted).sum() / squares)
    return torch.stack(values)


def test_masks_dice_labels_and_weights_belong_to_the_same_cells():
    """Several objects share a level, so that the order of cells is neither that of objects nor of levels."""
    head, objects = build(3), targets(OBJECTS, OBJECTS[1:])
    output = head(feature_maps(), FRAME)
    assignment = head.losses(output, SIZES, objects).assignment
    rows = assignment.positives()
    level_of = torch.arange(len(STRIDES)).repeat_interleave(torch.tensor([grid**2 for grid in head.grids])).repeat(2)
    shared = {(int(row >= len(level_of) // 2), int(level_of[row])): set() for row in rows}
    for row in rows.tolist():
        shared[int(row >= len(level_of) // 2), int(level_of[row])].add(int(assignment.assigned[row]))
    assert max(len(own) for own in shared.values()) >= 3
    dice = head.dice(output, objects, rows, assignment.assigned[rows])
    torch.testing.assert_close(dice, slow_dice(output, assignment.assigned, objects))


def test_losses_do_not_depend_on_the_order_of_the_objects():
    head, objects = build(3, objective=RankingConfig("rs", score_weighted=True)), targets(OBJECTS, OBJECTS[1:])
    output = head(feature_maps(), FRAME)
    terms = head.losses(output, SIZES, objects).terms
    # no cell is claimed by two objects here: else the first would keep it
    for order in ([3, 1, 2, 0], [1, 0, 3, 2]):
        shuffled = [{name: objects[0][name][order] for name in objects[0]}, objects[1]]
        again = head.losses(output, SIZES, shuffled).terms
        for name in terms:
            torch.testing.assert_close(terms[name], again[name])


def test_a_mask_that_fits_ranks_above_one_that_does_not():
    """The gradient of the logits follows the Dice labels, and the masks' that of their own objects."""
    objects = targets(OBJECTS[:2], [], classes=1)[:1]
    head = build(1, objective=RankingConfig("rs"), grids=(8, 4, 2, 1, 1))
    logits = [torch.zeros(1, g, g, 1).requires_grad_() for g in head.grids]
    wanted = F.interpolate(objects[0]["masks"][:, None].float(), (16, 24), mode="bilinear")[:, 0] > 0.5
    features = torch.where(wanted, 20.0, -20.0)[None]  # two feature maps, one mask each
    kernels = [torch.tensor([1.0, 0.0]).expand(1, g, g, 2) for g in head.grids]  # every cell draws the first object
    output = SOLOv2Output(logits, kernels, features, FRAME)
    terms, assignment = head.losses(output, SIZES[:1], objects)
    sum(terms.values()).backward()
    gradient = torch.cat([level.grad.flatten() for level in logits])
    first, second = (gradient[assignment.assigned == number] for number in (0, 1))
    assert len(first) and len(second) and first.max() < second.min()


def test_layers_and_sizes_are_the_published():
    head = SOLOv2Head(256, 80, STRIDES, 4, SOLOv2HeadConfig())
    assert head.grids == (40, 36, 24, 16, 12) and head.score.weight.shape == (80, 512, 3, 3)
    published = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    for (least, largest), (low, high) in zip(head.size_ranges, published):
        assert least <= low and largest >= high and (low == 1 or least == low) and (high == 2048 or largest == high)
    assert [len(branch) for branch in head.masks.branches] == [1, 1, 2, 3]
    assert head.masks.branches[3][0][0].in_channels == 258 and head.kernel_tower[0][0].in_channels == 258
    assert head.kernel.out_channels == 256 and len(head.class_tower) == len(head.kernel_tower) == 4
    torch.testing.assert_close(head.score.bias.sigmoid(), torch.full((80,), 0.01))
    light = SOLOv2Head(256, 80, STRIDES, 4, SOLOv2HeadConfig(object_sizes=(3.5, 14.0)))
    assert light.size_ranges[1:4] == ((28, 112), (56, 224), (112, 448))


@pytest.mark.parametrize("cells", [CELLS, [(15, 23), (8, 12), (4, 6), (2, 3), (1, 1)], [(2, 1), (1, 1)] + [(1, 1)] * 3])
def test_maps_of_any_size_give_the_same_grids(cells):
    head = build(2)
    output = head([torch.randn(1, 8, h, w) for h, w in cells], FRAME)
    assert [level.shape[1:3] for level in output.logits] == [(grid, grid) for grid in head.grids]
    assert output.features.shape == (1, 8, *cells[0])


def test_coordinates_are_those_of_the_cells_centers():
    x = with_coordinates(torch.zeros(1, 3, 2, 4))
    assert x[0, 3].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    assert x[0, 4].tolist() == [[-0.5] * 4, [0.5] * 4]


@pytest.mark.parametrize("columns", [168, 336])
def test_every_column_has_a_place_of_its_own_in_half_precision(columns):
    """Of a map of 800x1333 pixels at strides 8 and 4; float32 and wider are as exact as they can be."""
    exact = with_coordinates(torch.zeros(1, 1, 2, columns, dtype=torch.float64))[0, 1, 0]
    assert torch.equal(exact, (torch.arange(columns, dtype=torch.float64) + 0.5) * (2 / columns) - 1)
    for dtype, error in ((torch.bfloat16, 0.32), (torch.float16, 0.05), (torch.float32, 1e-4)):
        x = with_coordinates(torch.zeros(1, 1, 2, columns, dtype=dtype))
        assert x.dtype == dtype and len(x[0, 1, 0].unique()) == columns
        assert (x[0, 1, 0].double() - exact).abs().max() * columns / 2 < error  # cells


def test_a_cell_below_its_neighbor_above_or_left_is_no_peak():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.95, 0.2], [0.1, 0.3, 0.3]])
    kept = peaks(scores[None, :, :, None])[0, :, :, 0]
    assert kept.nonzero().tolist() == [[0, 0], [1, 1]] and kept[1, 1] == scores[1, 1]


def scene(head):
    """Three masks as features; cells that draw them, one of them twice in the same class."""
    features = torch.full((1, 3, 16, 24), -12.0)
    features[0, 0, 2:8, 2:9] = features[0, 1, 5:15, 12:22] = features[0, 2, 0:1, 0:1] = 12.0
    logits = [torch.full((1, g, g, head.num_classes), -9.0) for g in head.grids]
    kernels = [torch.zeros(1, g, g, 3) for g in head.grids]
    for level, row, column, label, score, mask in ((0, 5, 6, 1, 2.0, 0), (1, 9, 4, 1, 1.0, 0), (1, 3, 3, 2, 0.5, 1)):
        logits[level][0, row, column, label] = score
        kernels[level][0, row, column, mask] = 1.0
    logits[2][0, 1, 1, 0], kernels[2][0, 1, 1, 2] = 3.0, 1.0  # a mask of one cell is no object
    return SOLOv2Output(logits, kernels, features, FRAME)


def test_detections_by_hand():
    head = build(3, mask_dim=3, norm_groups=1, score_threshold=0.2)
    output = scene(head)
    (found,) = head.predict(output, SIZES[:1])
    certain = 1 / (1 + math.exp(-12))
    sigmoid = {score: certain / (1 + math.exp(-score)) for score in (2.0, 1.0, 0.5)}
    # the second drawing of the first mask has an IoU of 1 with the better one: exp(-2)
    expected = [(sigmoid[2.0], 1), (sigmoid[0.5], 2), (sigmoid[1.0] * math.exp(-2), 1)]
    assert found["labels"].tolist() == [label for _, label in expected]
    assert found["scores"].tolist() == pytest.approx([score for score, _ in expected])
    wanted = torch.stack([output.features[0, mask] > 0 for mask in (0, 1, 0)])
    assert torch.equal(mask_iou(found["masks"] > 0.5, wanted).diagonal(), torch.ones(3))
    last = build(3, mask_dim=3, norm_groups=1, score_threshold=0.2, final_threshold=0.3, max_detections=1)
    assert last.predict(output, SIZES[:1])[0]["labels"].tolist() == [1]


def test_smaller_masks_are_detections_where_asked():
    head = build(3, mask_dim=3, norm_groups=1, score_threshold=0.2, min_area=0.0)
    (found,) = head.predict(scene(head), SIZES[:1])
    assert found["labels"].tolist()[0] == 0 and (found["masks"][0] > 0.5).sum() == 1 and len(found["labels"]) == 4


def test_nothing_above_the_threshold_is_no_detection():
    head = build(3, score_threshold=0.99)
    for found in head.predict(head(feature_maps(), FRAME), SIZES):
        assert found["masks"].shape == (0, 16, 24) and len(found["scores"]) == len(found["labels"]) == 0


def test_targets_without_masks_are_refused():
    head = build(3)
    boxes = [{name: target[name] for name in ("boxes", "labels")} for target in targets(OBJECTS, [])]
    with pytest.raises(ValueError, match="no `masks`"):
        head.losses(head(feature_maps(), FRAME), SIZES, boxes)
