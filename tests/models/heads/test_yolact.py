"""YOLACT's head, against arrays of the official Rank & Sort head and against what must hold anyway."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from brs_detr.models.heads.dense import PrototypeMasks
from brs_detr.models.heads.yolact import YOLACTHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.one_stage_config import YOLACTHeadConfig
from brs_detr.ops.anchors import batch_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

FRAME, SIZES = (48, 64), [(48, 64), (40, 56)]
CELLS = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
OBJECTS = [[4.0, 4, 36, 36], [20, 10, 52, 40], [2, 2, 10, 9]]


def build(classes, dim=8, **options):
    return YOLACTHead(dim, classes, cnn.STRIDES, YOLACTHeadConfig(**options))


def feature_maps(batch=2, dim=8, cells=CELLS):
    return [torch.randn(batch, dim, h, w) for h, w in cells]


def targets(*boxes_per_image, classes=3):
    """Objects whose masks are the left halves of their boxes, so that mask and box differ."""
    result = []
    for boxes, (h, w) in zip(boxes_per_image, SIZES):
        masks = torch.zeros(len(boxes), h, w, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[int(y1) : int(y2), int(x1) : int(x1 + x2) // 2] = 1
        boxes = torch.tensor(boxes).reshape(-1, 4)
        result.append({"boxes": boxes, "labels": torch.arange(len(boxes)) % classes, "masks": masks})
    return result


def recorded_case(name):
    recorded = cnn.load(f"yolact_{name}")
    levels = [recorded.leaves[f"coeff.{level}"].permute(0, 2, 3, 1) for level in range(5)]
    coefficients = [level.unflatten(-1, (-1, recorded.info["num_protos"])) for level in levels]
    output = recorded.output()._replace(masks=PrototypeMasks(coefficients, recorded.leaves["proto"], (160, 160)))
    objects = [{**target, "masks": recorded.arrays[f"gt_masks.{i}"]} for i, target in enumerate(recorded.targets())]
    return recorded, output, objects


@pytest.mark.parametrize("case", ["normal", "empty_one"])
def test_official_anchors_targets_losses_and_gradients(case):
    recorded, output, objects = recorded_case(case)
    head = build(5, objective=RankingConfig("rs", score_weighted=True))
    for level, ours in enumerate(head.place(output)):
        expected = recorded.arrays[f"anchors.{level}"]
        torch.testing.assert_close(ours.reshape(-1, 4), expected, atol=1e-4, rtol=0)
    terms, assignment = head.losses(output, recorded.sizes(), objects)
    for image, labels in enumerate(assignment.per_image(torch.where(assignment.valid, assignment.labels, -1))):
        assert torch.equal(labels, recorded.target_labels(image))
    dice = head.dice(output, head.extents(output, recorded.sizes()), assignment)
    torch.testing.assert_close(dice.detach(), recorded.arrays["mask.dice"])
    recorded.assert_losses("rs", terms)


def slow_dice(output, assignment, objects):
    """Positive by positive: its own sum of prototypes, cut to its object's box, compared with its object's mask."""
    values, ((height, width), (h, w)) = [], (output.masks.frame, output.masks.prototypes.shape[2:])
    coefficients = [torch.cat([level[image].flatten(0, 2) for level in output.masks.coefficients]) for image in (0, 1)]
    # of anchors inside the images only, as the rows are counted
    inside = [torch.cat([_inside(cells, size).flatten() for cells in CELLS]) for size in SIZES]
    rows = torch.cat([own[kept] for own, kept in zip(coefficients, inside)])
    counts = [int(kept.sum()) for kept in inside]
    for row, number in zip(assignment.rows.tolist(), assignment.matched_idxs.tolist()):
        image = int(row >= counts[0])
        own = number - image * len(objects[0]["boxes"])
        bitmap = torch.zeros(1, 1, height, width)
        mask = objects[image]["masks"][own]
        bitmap[0, 0, : mask.shape[0], : mask.shape[1]] = mask
        wanted = F.interpolate(bitmap, (h, w), mode="bilinear")[0, 0] > 0.5
        drawn = (rows[row][:, None, None] * output.masks.prototypes[image]).sum(0).sigmoid()
        x1, y1, x2, y2 = (objects[image]["boxes"][own] / 4).tolist()  # 4 pixels per cell
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        drawn = drawn * ((x >= x1 - 1) & (x < x2 + 1) & (y >= y1 - 1) & (y < y2 + 1))
        values.append(2 * (drawn * wanted).sum() / ((drawn**2).sum() + wanted.sum() + 1e-5))
    return torch.stack(values)


def _inside(cells, size):
    """(h, w, 3) bool: the cells that begin inside an image of a batch of `FRAME` pixels."""
    y, x = (torch.arange(count) * pixels / count < side for count, pixels, side in zip(cells, FRAME, size))
    return (y[:, None] & x)[:, :, None].expand(-1, -1, 3)


def test_masks_dice_labels_and_weights_belong_to_the_same_anchors():
    head, objects = build(3), targets(OBJECTS, OBJECTS[1:])
    output = head(feature_maps(), FRAME)
    assignment = head.losses(output, SIZES, objects).assignment
    assert assignment.matched_idxs.diff().min() < 0  # rows are not in the order of the objects
    extents = head.extents(output, SIZES)
    expected = slow_dice(output, assignment, objects)
    torch.testing.assert_close(head.dice(output, extents, assignment), expected)
    for label in ("iou", "dice", "mean", "binary"):
        head.label = label
        quality, losses = head.positive_losses(output, extents, assignment)
        iou = ious(head, output, extents, assignment)
        wanted = {"iou": iou, "dice": expected, "mean": (iou + expected) / 2, "binary": torch.ones(len(iou))}[label]
        torch.testing.assert_close(quality, wanted.detach())
        torch.testing.assert_close(losses["mask"], 1 - expected)
        assert not quality.requires_grad


def ious(head, output, extents, assignment):
    """Of each positive's box and its object's."""
    anchors, deltas = torch.cat(assignment.references), batch_rows(output.deltas, extents)
    boxes = head.coder.decode(anchors[assignment.rows], deltas[assignment.rows])
    return box_iou(boxes, assignment.targets).diagonal()


def test_losses_do_not_depend_on_the_order_of_the_objects():
    head, objects = build(3, objective=RankingConfig("rs", score_weighted=True)), targets(OBJECTS, OBJECTS[1:])
    output = head(feature_maps(), FRAME)
    terms = head.losses(output, SIZES, objects).terms
    shuffled = [{name: value.flip(0) for name, value in target.items()} for target in objects]
    again = head.losses(output, SIZES, shuffled).terms
    for name in terms:
        torch.testing.assert_close(terms[name], again[name])


def test_an_object_that_many_anchors_overlap_as_little_has_one_positive():
    head = build(3)
    assignment = head.losses(head(feature_maps(), FRAME), SIZES, targets([[6.0, 2, 10, 6]], [])).assignment
    assert assignment.rows.tolist() == [0]


OBJECTIVES = {
    "focal": ScoreConfig(weights=TermWeights(giou=2.0, mask=2.0)),
    **{loss: RankingConfig(loss, score_weighted=True) for loss in ("brs", "rs", "bap", "ap")},
    **{loss: RankingConfig(loss, balance="epoch") for loss in ("alrp", "balrp")},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("boxes", [([], []), (OBJECTS, []), (OBJECTS, OBJECTS[:1])], ids=["none", "one", "both"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_has_a_gradient_whatever_the_images_show(objective, boxes, classes):
    head = build(classes, objective=OBJECTIVES[objective])
    terms = head.losses(head(feature_maps(), FRAME), SIZES, targets(*boxes, classes=classes)).terms
    assert {"giou", "mask"} < terms.keys()
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert {float(value.detach()) for name, value in terms.items() if name != "cls"} == {0.0}
        return
    assert head.protonet.before[0].weight.grad.abs().sum() > 0 and head.coefficient.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("classes", [1, 3, 90])
def test_rows_without_an_object_are_background_with_any_number_of_classes(classes):
    head = build(classes, objective=RankingConfig("rs"))
    assignment = head.losses(head(feature_maps(), FRAME), SIZES, targets(OBJECTS, [], classes=classes)).assignment
    positive = assignment.labels < classes
    assert len(OBJECTS) <= positive.sum() == len(assignment.rows) < 30
    assert (assignment.labels[~positive] == classes).all()


def test_layers_are_the_published():
    """One convolution for all outputs, Xavier's weights, no prior; 32 prototypes of twice the finest map's sides."""
    head = YOLACTHead(16, 4, cnn.STRIDES, YOLACTHeadConfig())
    assert len([layer for layer in head.shared if isinstance(layer, nn.Conv2d)]) == 1
    assert not head.score.bias.any() and not head.delta.bias.any()
    output = head(feature_maps(1, 16), FRAME)
    assert output.masks.prototypes.shape == (1, 32, 12, 16) and (output.masks.prototypes >= 0).all()
    assert all((level.abs() < 1).all() and level.shape[3:] == (3, 32) for level in output.masks.coefficients)
    bound = (6 / (9 * (16 + 12))) ** 0.5
    assert bound / 2 < head.score.weight.abs().max() <= bound


def test_anchors_at_550_pixels_are_the_published():
    """Cells 69, 35, 18, 9 and 5 divide the image evenly; sides are three times 8 to 128."""
    head, sides = build(2), (69, 35, 18, 9, 5)
    output = head(feature_maps(1, 8, [(side, side) for side in sides]), (550, 550))
    for anchors, side, size in zip(head.place(output), sides, (24, 48, 96, 192, 384)):
        centers = (anchors[0, :, 1, :2] + anchors[0, :, 1, 2:]) / 2
        torch.testing.assert_close(centers[:, 0], (torch.arange(side) + 0.5) * 550 / side)
        torch.testing.assert_close(anchors[0, 0, 1, 2:] - anchors[0, 0, 1, :2], torch.full((2,), float(size)))
    assert head.extents(output, [(550, 550), (275, 549)]) == [
        [(side, side) for side in sides],
        [(35, 69), (18, 35), (9, 18), (5, 9), (3, 5)],
    ]


def test_a_detection_has_the_mask_of_its_own_anchor_and_nothing_outside_its_box():
    head = build(3, prototypes=2, score_threshold=0.5)
    output = head(feature_maps(1), FRAME)
    logits = [torch.full_like(level, -5.0) for level in output.logits]
    coefficients = [torch.zeros_like(level) for level in output.masks.coefficients]
    logits[1][0, 1, 2, 1, 2], coefficients[1][0, 1, 2, 1] = 1.0, torch.tensor([1.0, -1.0])
    prototypes = torch.zeros(1, 2, 12, 16)
    prototypes[0, 0, :, 8:], prototypes[0, 1, :, :8] = 10.0, 10.0
    deltas = [torch.zeros_like(level) for level in output.deltas]
    deltas[1][0, 1, 2, 1, 2:] = -5.5  # a third of the anchor's sides
    masks = PrototypeMasks(coefficients, prototypes, FRAME)
    (found,) = head.predict(output._replace(logits=logits, deltas=deltas, masks=masks), SIZES[:1])
    assert found["labels"].tolist() == [2] and found["scores"].tolist() == [pytest.approx(0.7311, abs=1e-4)]
    x1, y1, x2, y2 = (found["boxes"][0] / 4).tolist()  # 4 pixels per cell
    (mask,) = found["masks"]
    for row in range(12):
        for column in range(16):
            inside = x1 - 1 <= column < x2 + 1 and y1 - 1 <= row < y2 + 1
            assert (mask[row, column] > 0.5) == (inside and column >= 8)
            assert inside or mask[row, column] == 0
    assert (mask > 0.5).any()


def test_targets_without_masks_are_refused():
    head = build(3)
    boxes = [{name: target[name] for name in ("boxes", "labels")} for target in targets(OBJECTS, [])]
    with pytest.raises(ValueError, match="no `masks`"):
        head.losses(head(feature_maps(), FRAME), SIZES, boxes)
