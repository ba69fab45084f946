"""ATSS head, against arrays of the official implementations and against what must hold anyway."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from brs_detr.models.config import BRSDETRConfig, CoDETRConfig
from brs_detr.models.heads.atss import ATSSHead, centerness_target
from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.transformer.collaborative import aux_samples
from brs_detr.ops.anchors import cell_features

STRIDES = (8, 16, 32, 64, 128)
SIZES = [(128, 153), (101, 160)]
PREFIX = "bbox_head.0."
RENAMES = {
    r"^cls_convs\.(\d+)\.conv": r"class_tower.\1.0",
    r"^cls_convs\.(\d+)\.gn": r"class_tower.\1.1",
    r"^reg_convs\.(\d+)\.conv": r"box_tower.\1.0",
    r"^reg_convs\.(\d+)\.gn": r"box_tower.\1.1",
    r"^atss_cls": "score",
    r"^atss_reg": "delta",
    r"^atss_centerness": "centerness",
    r"^scales\.(\d+)\.scale": r"scales.\1",
}


def renamed(name):
    for pattern, replacement in RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def build(family, dim=64, classes=5):
    if family == "co_detr":
        return ATSSHead(dim, classes, STRIDES, CoDETRConfig.atss)
    return ATSSHead(dim, classes, STRIDES, BRSDETRConfig.atss)


def load(golden, family, scenario="normal"):
    """Official arrays, the head with the official weights, feature maps and targets."""
    data = load_file(golden / family / "train_normal.safetensors")
    data |= load_file(golden / family / f"train_{scenario}.safetensors")
    state = load_file(golden / family / "state_dict.safetensors")
    head = build(family)
    head.load_state_dict({renamed(k.removeprefix(PREFIX)): v for k, v in state.items() if k.startswith(PREFIX)})
    targets = [{"boxes": data[f"gt_bboxes.{b}"], "labels": data[f"gt_labels.{b}"]} for b in range(2)]
    return data, head, [data[f"X.{level}"] for level in range(5)], targets


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_outputs(golden, family):
    data, head, features, _ = load(golden, family)
    for name, levels in zip(("cls", "reg", "centerness"), head(features)):
        for level, ours in enumerate(levels or []):
            torch.testing.assert_close(
                ours[:, :, :, 0].permute(0, 3, 1, 2), data[f"atss.{name}.{level}"], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("scenario", ["normal", "empty1", "empty_both"])
@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_losses_and_gradients(golden, family, scenario):
    data, head, features, targets = load(golden, family, scenario)
    losses = head.losses(head(features), SIZES, targets).terms
    if family == "brs_detr":
        pairs = {"rank": "loss_rank1", "sort": "loss_sort1", "giou": "loss_bbox1"}
    else:
        pairs = {"cls": "loss_cls1", "giou": "loss_bbox1", "centerness": "loss_centerness1"}
    assert losses.keys() == pairs.keys()
    for ours, official in pairs.items():
        expected = sum(v.reshape(()) for k, v in data.items() if re.fullmatch(rf"loss\.{official}(\.\d)?", k))
        torch.testing.assert_close(losses[ours], expected, rtol=1e-5, atol=1e-6)
    if scenario == "normal":
        sum(losses.values()).backward()
        for name, expected in load_file(golden / family / "train_normal_grads.safetensors").items():
            if name.startswith(PREFIX):
                ours = head.get_parameter(renamed(name.removeprefix(PREFIX))).grad
                assert (ours - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_queries(golden, family):
    """The official lists fill anchors of the padding with zeros; ours leave them out."""
    data, head, features, targets = load(golden, family)
    assignment = head.losses(head(features), SIZES, targets).assignment
    samples = aux_samples(assignment, cell_features(features, SIZES, STRIDES))
    for image in range(2):
        inside = torch.cat([data[f"atss.valid_flags.{image}.{level}"] for level in range(5)]).bool()
        assert torch.equal(samples.labels[image], data[f"atss.target.ori_labels.{image}"][inside])
        torch.testing.assert_close(samples.boxes[image], data[f"atss.target.ori_anchors.{image}"][inside])
        torch.testing.assert_close(samples.targets[image], data[f"atss.target.ori_bbox_targets.{image}"][inside])
        vectors = torch.cat([x[image].flatten(1).T for x in features])
        assert torch.equal(samples.features[image], vectors[inside])


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_detections(golden, family):
    _, head, features, _ = load(golden, family)
    official = load_file(golden / family / "eval.safetensors")
    meta = json.loads((golden / family / "img_metas.json").read_text())
    for image, detections in enumerate(head.predict(head(features), SIZES)):
        factor = torch.tensor(meta[image]["scale_factor"])
        for label in range(5):
            own = detections["labels"] == label
            ours = torch.cat([detections["boxes"][own] / factor, detections["scores"][own, None]], dim=1)
            expected = official[f"one-stage.batch.img{image}.cls{label}"].reshape(-1, 5)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def random_features(batch=2):
    return [torch.randn(batch, 32, h, w) for h, w in [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]]


def random_targets(*counts, classes=5):
    corners = [torch.rand(n, 2) * 60 for n in counts]
    return [
        {"boxes": torch.cat([c, c + 12 + torch.rand(len(c), 2) * 30], 1), "labels": torch.randint(classes, (len(c),))}
        for c in corners
    ]


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0,), (5,), (30, 1)])
@pytest.mark.parametrize("classes", [1, 5])
def test_every_parameter_is_in_the_graph(family, counts, classes):
    head, features = build(family, 32, classes), random_features(len(counts))
    sizes = SIZES[: len(counts)]
    losses = head.losses(head(features), sizes, random_targets(*counts, classes=classes)).terms
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_padding_takes_no_part_in_the_loss(family):
    head, features, targets = build(family, 32), random_features(), random_targets(3, 2)
    output = head(features)
    losses, assignment = head.losses(output, SIZES, targets)
    spoilt = [x.clone() for x in output.logits]
    spoilt[0][1, 13:] = 1e4  # 101 pixels are 13 rows of stride 8
    again = head.losses(DenseOutput(spoilt, output.deltas, output.centerness), SIZES, targets).terms
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    assert [len(b) for b in assignment.references] == [428, 13 * 20 + 7 * 10 + 4 * 5 + 2 * 3 + 1 * 2]


def test_initial_scores_are_the_prior():
    scores = torch.cat([x.flatten() for x in build("brs_detr", 32)(random_features()).logits]).sigmoid()
    torch.testing.assert_close(scores.mean(), torch.tensor(0.01), rtol=0.2, atol=0)


def test_centerness_by_hand():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    anchors = torch.tensor([[4.0, 4, 6, 6], [1, 4, 3, 6]])
    torch.testing.assert_close(centerness_target(anchors, objects), torch.tensor([1.0, (2 / 8) ** 0.5]))


def test_detections_by_hand():
    """A score is that of the class times centerness; the threshold is the class's; each box is that of its cell."""
    head = ATSSHead(32, 2, (8,), replace(CoDETRConfig.atss, score_threshold=0.4))
    logits = torch.full((1, 4, 4, 2), -9.0)
    deltas, centerness = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 1)
    logits[0, 1, 2, 1], centerness[0, 1, 2] = 0.0, math.log(3)  # 0.5 * 0.75
    logits[0, 3, 0, 0], centerness[0, 3, 0] = math.log(4), -math.log(3)  # 0.8 * 0.25
    logits[0, 0, 0, 0], centerness[0, 0, 0] = -1.0, 9.0  # 0.27
    anchors = [x[..., None, :] for x in (logits, deltas, centerness)]
    (found,) = head.predict(DenseOutput(*([x] for x in anchors)), [(50, 60)])
    assert found["labels"].tolist() == [1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.375, 0.2]))
    # anchors of 64 pixels around (16, 8) and (0, 24), clipped
    assert found["boxes"].tolist() == [[0, 0, 48, 40], [0, 0, 32, 50]]


def test_offsets_are_multiplied_by_the_scale_of_their_level():
    head, features = build("brs_detr", 32), random_features(1)
    plain = head(features).deltas
    for level, scale in enumerate(head.scales):
        torch.nn.init.constant_(scale, level + 2.0)
    for level, (one, other) in enumerate(zip(plain, head(features).deltas)):
        torch.testing.assert_close(other, (level + 2) * one)


def test_bfloat16_autocast_gives_float32_losses():
    head, features = build("co_detr", 32), random_features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head.losses(head(features), SIZES, random_targets(3, 2)).terms
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
