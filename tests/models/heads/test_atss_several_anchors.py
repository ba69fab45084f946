"""ATSS head with three scales per cell and no centerness, against arrays of the official ranking heads."""

import sys
from pathlib import Path

import pytest
import torch

from brs_detr.models.config import ATSSHeadConfig
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

CASES = ["normal", "own_padding", "empty_one", "empty_both"]
SHAPES = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
SIZES = [(48, 64), (40, 56)]
OBJECT = [4.0, 4, 36, 36]


def published(loss="brs", classes=5, dim=32, **options):
    config = ATSSHeadConfig(**{"objective": RankingConfig(loss, score_weighted=True), **options})
    return ATSSHead(dim, classes, cnn.STRIDES, config)


@pytest.mark.parametrize("loss", ["rs", "brs", "ap", "bap"])
@pytest.mark.parametrize("case", CASES)
def test_official_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"atss_{case}")
    terms, assignment = published(loss).losses(recorded.output(), recorded.sizes(), recorded.targets())
    for image, labels in enumerate(assignment.per_image(assignment.labels)):
        # The official lists also hold the padding beyond an image's own, with weight 0.
        expected = recorded.target_labels(image)
        assert torch.equal(labels, expected[expected >= 0])
    if recorded.info["num_pos"] == 0:  # the official code crashes
        return recorded.assert_no_positives(terms)
    recorded.assert_losses(loss, terms)


@pytest.mark.parametrize("case", CASES)
def test_official_detections(case):
    """All pairs of a level enter suppression, since the official code takes 1000 anchors with all their classes."""
    recorded = cnn.load(f"atss_{case}")
    head = published(score_threshold=0.05, nms_iou=0.6, before_nms=5 * 1000)
    for image, found in enumerate(head.predict(recorded.output(), recorded.sizes("img_shape"))):
        expected = recorded.arrays[f"det.{image}.bboxes"]
        torch.testing.assert_close(found["boxes"], expected[:, :4], rtol=0, atol=1e-3)
        torch.testing.assert_close(found["scores"], expected[:, 4], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["labels"], recorded.arrays[f"det.{image}.labels"].long())


def feature_maps(dim=32, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in SHAPES]


def targets(*boxes_per_image):
    boxes = [torch.tensor(boxes).reshape(-1, 4) for boxes in boxes_per_image]
    return [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "alrp", "ndcg", "focal"])
@pytest.mark.parametrize("boxes", [([], []), ([OBJECT], []), ([OBJECT], [OBJECT])], ids=["none", "one", "both"])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, boxes):
    """The last levels have fewer anchors than candidates are asked for."""
    if loss == "focal":
        objective = ScoreConfig(weights=TermWeights(giou=2.0, centerness=1.0))
        head = published(objective=objective, centerness=True, stacked_convs=1)
    else:
        head = published(loss, stacked_convs=1)
    terms = head.losses(head(feature_maps()), SIZES, targets(*boxes)).terms
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if name != "cls")


def test_outputs_are_grouped_by_anchor():
    """Channel a * C + c of the convolution is class c of anchor a, as in published weights."""
    head, maps = published(classes=2, centerness=True, stacked_convs=0), feature_maps()
    output = head(maps)
    for level, x in enumerate(maps):
        scores, deltas, centerness = head.score(x), head.delta(x), head.centerness(x)
        for anchor in range(3):
            own = scores[:, 2 * anchor : 2 * anchor + 2].permute(0, 2, 3, 1)
            assert torch.equal(output.logits[level][..., anchor, :], own)
            assert torch.equal(output.deltas[level][..., anchor, 3], deltas[:, 4 * anchor + 3])
            assert torch.equal(output.centerness[level][..., anchor, 0], centerness[:, anchor])


def test_one_of_three_anchors_becomes_the_detection():
    head = published(classes=2, score_threshold=0.5)
    logits = [torch.full((1, h, w, 3, 2), -5.0) for h, w in SHAPES]
    deltas = [torch.zeros(1, h, w, 3, 4) for h, w in SHAPES]
    logits[1][0, 2, 3, 1, 1] = 1.0
    (found,) = head.predict(DenseOutput(logits, deltas), [(500, 500)])
    half = 16 * 4 * 2 ** (1 / 3) / 2
    expected = torch.tensor([[48 - half, 32 - half, 48 + half, 32 + half]]).clamp(min=0)
    torch.testing.assert_close(found["boxes"], expected)
    assert found["labels"].tolist() == [1]
