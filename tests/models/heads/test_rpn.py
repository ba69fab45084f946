"""Region proposal network, against arrays of the official implementations and against what must hold anyway."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import box_iou

from brs_detr.assign.max_iou import RandomSampler
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.models.config import BRSDETRConfig, CoDETRConfig, RPNConfig
from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.ops import boxes as boxes_module
from brs_detr.ops.boxes import BoxCoder

STRIDES = (8, 16, 32, 64, 128)
SIZES = [(128, 153), (101, 160)]
NAMES = {"rpn_conv": "conv", "rpn_cls": "score", "rpn_reg": "delta"}


class UnitBoxRPNHead(RPNHead):
    """With the published fault put back: boxes of the loss are decoded around a unit box, with other deviations."""

    def box_losses(self, anchors, deltas, objects):
        unit = torch.tensor([-0.5, -0.5, 0.5, 0.5]).expand(len(anchors), 4)
        coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
        boxes, targets = coder.decode(unit, deltas), coder.decode(unit, self.coder.encode(anchors, objects))
        return paired_iou(boxes.detach(), targets), {"giou": paired_giou_loss(boxes, targets)}


def first_by_index(count, device):
    return torch.arange(count, device=device)


def build(family, kind=RPNHead, dim=64):
    head = kind(dim, STRIDES, (CoDETRConfig if family == "co_detr" else BRSDETRConfig).rpn)
    if family == "co_detr":
        head.assigner = replace(head.assigner, sampler=RandomSampler(256, 0.5, first_by_index))
    return head


def load(golden, family, scenario="normal", kind=RPNHead):
    """Official arrays, the head with the official weights, and the targets."""
    data = load_file(golden / family / "train_normal.safetensors")
    data |= load_file(golden / family / f"train_{scenario}.safetensors")
    head = build(family, kind)
    weights = {
        f"{NAMES[name.split('.')[1]]}.{name.split('.')[2]}": value
        for name, value in load_file(golden / family / "state_dict.safetensors").items()
        if name.startswith("rpn_head.")
    }
    head.load_state_dict(weights)
    targets = [{"boxes": data[f"gt_bboxes.{b}"], "labels": data[f"gt_labels.{b}"]} for b in range(2)]
    return data, head, [data[f"X.{level}"] for level in range(5)], targets


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_outputs_and_proposals(golden, family):
    data, head, features, _ = load(golden, family)
    output = head(features)
    for level in range(5):
        torch.testing.assert_close(output.logits[level][..., 0].permute(0, 3, 1, 2), data[f"rpn.cls.{level}"])
        torch.testing.assert_close(output.deltas[level].flatten(3).permute(0, 3, 1, 2), data[f"rpn.reg.{level}"])
    for image, found in enumerate(head.predict(output, SIZES)):
        expected = data[f"rpn.proposals.{image}"]
        expected = expected[(expected[:, 2:4] > expected[:, :2]).all(dim=1)]  # the rank-based head keeps empty boxes
        torch.testing.assert_close(found["boxes"], expected[:, :4], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found["scores"], expected[:, 4], rtol=1e-5, atol=1e-6)


def gradients_agree(golden, family, head):
    official = load_file(golden / family / "train_normal_grads.safetensors")
    for name, ours in NAMES.items():
        for part in ("weight", "bias"):
            expected = official[f"rpn_head.{name}.{part}"]
            error = (getattr(getattr(head, ours), part).grad - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name}.{part}: {error}"


@pytest.mark.parametrize("scenario", ["normal", "empty1", "empty_both"])
def test_official_losses_of_co_detr(golden, scenario):
    data, head, features, targets = load(golden, "co_detr", scenario)
    losses = head.losses(head(features), SIZES, targets).terms
    for ours, official in (("cls", "cls"), ("l1", "bbox")):
        expected = sum(data[f"loss.loss_rpn_{official}.{level}"] for level in range(5))
        torch.testing.assert_close(losses[ours], expected, rtol=1e-5, atol=1e-6)
    if scenario == "normal":
        sum(losses.values()).backward()
        gradients_agree(golden, "co_detr", head)


@pytest.mark.parametrize("scenario", ["normal", "empty1"])
def test_official_losses_of_brs_detr_with_its_decoding(golden, scenario):
    data, head, features, targets = load(golden, "brs_detr", scenario, UnitBoxRPNHead)
    losses = head.losses(head(features), SIZES, targets).terms
    for ours, official in (("rank", "rank"), ("sort", "sort"), ("giou", "bbox")):
        torch.testing.assert_close(losses[ours], data[f"loss.loss_rpn_{official}"].reshape(()), rtol=1e-5, atol=1e-6)
    if scenario == "normal":
        sum(losses.values()).backward()
        gradients_agree(golden, "brs_detr", head)


def test_sampled_anchors_are_counted_only_where_the_loss_is_divided_by_rows(golden):
    _, head, features, targets = load(golden, "co_detr")
    output = head(features)
    terms = {}
    for normalizer in ("rows", "positives"):
        head.objective.normalizer = normalizer
        terms[normalizer] = head.losses(output, SIZES, targets).terms
    assignment = head.losses(output, SIZES, targets).assignment
    positives, sampled = len(assignment.rows), assignment.valid.sum()
    assert 0 < positives < sampled
    for name, by_rows in terms["rows"].items():
        torch.testing.assert_close(terms["positives"][name], by_rows * sampled / positives)


def random_features(batch=2):
    shapes = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    return [torch.randn(batch, 8, h, w) for h, w in shapes]


def random_targets(*counts):
    boxes = [torch.rand(n, 2) * 60 for n in counts]
    return [
        {"boxes": torch.cat([b, b + 10 + torch.rand(len(b), 2) * 40], 1), "labels": torch.zeros(len(b)).long()}
        for b in boxes
    ]


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0,), (5,), (40, 1)])
def test_every_parameter_is_in_the_graph(family, counts):
    head = build(family, dim=8)
    output = head(random_features(len(counts)))
    losses = head.losses(output, SIZES[: len(counts)], random_targets(*counts)).terms
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_padding_takes_no_part_in_the_loss(family):
    head, targets = build(family, dim=8), random_targets(3, 2)
    output = head(random_features())
    losses = head.losses(output, SIZES, targets).terms
    spoilt = [x.clone() for x in output.logits]
    spoilt[0][1, 13:] = 1e4  # 101 pixels are 13 rows of stride 8
    again = head.losses(DenseOutput(spoilt, output.deltas), SIZES, targets).terms
    assert all(torch.equal(losses[name], again[name]) for name in losses)


def test_anchors_that_reach_beyond_the_image_learn_unless_a_border_is_set():
    targets, learned = random_targets(3, 2), {}
    for border in (None, 0.0):
        head = RPNHead(8, STRIDES, replace(BRSDETRConfig.rpn, allowed_border=border))
        assignment = head.losses(head(random_features()), SIZES, targets).assignment
        outside = [
            (anchors < 0).any(dim=1) | (anchors[:, 2] > width) | (anchors[:, 3] > height)
            for anchors, (height, width) in zip(assignment.references, SIZES, strict=True)
        ]
        learned[border] = assignment.valid[torch.cat(outside)].sum()
    assert learned[None] > 0 and learned[0.0] == 0


def test_proposals_are_sorted_separated_and_inside():
    head = build("brs_detr", dim=8)
    output = head([10 * x for x in random_features()])
    for found, (height, width) in zip(head.predict(output, SIZES), SIZES):
        boxes, scores = found["boxes"], found["scores"]
        assert (scores[1:] <= scores[:-1]).all() and not boxes.requires_grad
        assert (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_one_level_proposals_survive_only_below_the_threshold():
    head = RPNHead(8, (8,), RPNConfig(nms_iou=0.5))
    output = head([torch.randn(1, 8, 6, 6)])
    (boxes,) = head.proposals(output, [(48, 48)])
    assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.5


def test_equal_boxes_of_two_levels_are_both_proposed_and_of_one_level_once():
    """One anchor of each level, 32 and 64 pixels wide, becomes the same box; suppression goes level by level."""
    head = RPNHead(8, (8, 16), RPNConfig(scales_per_octave=1, anchor_ratios=(1.0,))).eval()
    logits = [torch.full((1, side, side, 1, 1), -9.0) for side in (8, 4)]
    deltas = [torch.zeros(1, side, side, 1, 4) for side in (8, 4)]
    logits[0][0, 4, 4], logits[1][0, 2, 2] = 1.0, 2.0
    deltas[1][0, 2, 2, 0, 2:] = -math.log(2)
    head.test_limits = (1, 1000)
    (both,) = head.proposals(DenseOutput(logits, deltas), [(64, 64)])
    torch.testing.assert_close(both, torch.tensor([[16.0, 16, 48, 48]] * 2))
    logits[0][0, 4, 5], deltas[0][0, 4, 5, 0, 0] = 3.0, -8 / 32
    head.test_limits = (2, 1000)
    (found,) = head.predict(DenseOutput(logits, deltas), [(64, 64)])
    equal = (found["boxes"] - torch.tensor([16.0, 16, 48, 48])).abs().amax(1) < 1e-3
    torch.testing.assert_close(found["scores"][equal], torch.tensor([3.0, 2.0]).sigmoid())


def test_fewer_proposals_in_evaluation():
    head = RPNHead(8, (8,), RPNConfig(proposals=30, test_proposals=7))
    output = head([torch.randn(1, 8, 6, 6)])
    assert len(head.train().proposals(output, [(48, 48)])[0]) == 30
    assert len(head.eval().proposals(output, [(48, 48)])[0]) == 7


def test_bfloat16_autocast_gives_float32_losses():
    head, targets = build("brs_detr", dim=8), random_targets(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head.losses(head(random_features()), SIZES, targets).terms
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_smooth_l1_has_the_beta_of_the_settings():
    """An offset that is wrong by 1 costs 1 - beta / 2, as one of four."""
    for beta in (1.0, 1 / 9):
        head = RPNHead(8, (8,), RPNConfig(box_loss="smooth_l1", beta=beta))
        anchors, boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[10.0, 0, 20, 10]])
        _, losses = head.box_losses(anchors, torch.zeros(1, 4), boxes)
        assert float(losses["smooth_l1"]) == pytest.approx((1 - beta / 2) / 4)


def test_unknown_box_loss_is_named():
    with pytest.raises(ValueError, match="smooth_l1, giou, iou, l1, not 'l2'"):
        RPNHead(8, (8,), RPNConfig(box_loss="l2"))


@pytest.mark.parametrize("one_by_one", [("cpu",), ()], ids=["CPU", "GPU"])
@pytest.mark.parametrize("limits", [(50, 40), (4000, 4000), (300, 10)])
@pytest.mark.parametrize("drop_empty", [True, False])
def test_proposals_of_all_images_are_those_of_each(one_by_one, limits, drop_empty, monkeypatch):
    """Several images and all levels at once, in the loop's and in the GPU's form, against `predict`, box by box."""
    monkeypatch.setattr(boxes_module, "SEGMENT_BY_SEGMENT", one_by_one)
    head = build("brs_detr", dim=4).eval()
    head.test_limits, head.drop_empty = limits, drop_empty
    nn.init.normal_(head.delta.weight, std=0.5)
    nn.init.normal_(head.score.weight, std=0.5)
    features = [torch.randn(2, 4, h, w) for h, w in [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]]
    with torch.no_grad():
        output = head(features)
    regions = head.regions(output, SIZES)
    assert regions.boxes.shape[1] <= limits[1] and not regions.boxes.requires_grad
    for own, valid, alone, listed in zip(
        regions.boxes, regions.valid, head.predict(output, SIZES), head.proposals(output, SIZES), strict=True
    ):
        assert torch.equal(own[valid], listed)
        if limits[0] > 1000:  # torchvision's order of equal scores is arbitrary for many boxes
            assert sorted(listed.tolist()) == sorted(alone["boxes"].tolist())
        else:
            assert torch.equal(listed, alone["boxes"])
        assert valid.long().diff().max() <= 0  # what is missing comes last
