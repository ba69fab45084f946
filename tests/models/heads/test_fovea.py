"""FoveaBox's head, against arrays of the official ranking heads and against what must hold anyway."""

import math
import sys
from pathlib import Path

import pytest
import torch

from brs_detr.losses.objective import RankingObjective
from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.heads.fovea import FoveaHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.one_stage_config import FoveaHeadConfig
from brs_detr.ops.boxes import PointCoder

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

SHAPES = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
SIZES = [(48, 64), (40, 56)]
OBJECT = [4.0, 4, 36, 36]


def published(loss="alrp", classes=5, **options):
    """The aLRP repository's head for AP or aLRP loss."""
    objective = RankingConfig(loss, balance="epoch")
    if loss == "ap":
        objective, options = RankingConfig("ap", box_weight=1.0), {"box_loss": "smooth_l1", **options}
    return FoveaHead(8, classes, cnn.STRIDES, FoveaHeadConfig(**{"objective": objective, **options}))


@pytest.mark.parametrize("loss", ["ap", "alrp"])
@pytest.mark.parametrize("case", ["normal", "empty_one", "empty_both"])
def test_official_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"foveabox_{case}")
    head = published(loss)
    terms, assignment = head.losses(recorded.output(), recorded.sizes(), recorded.targets())
    for image, labels in enumerate(assignment.per_image(assignment.labels)):
        assert torch.equal(labels, recorded.target_labels(image))
    anchors = torch.cat(assignment.references)[assignment.rows]
    images = [torch.cat([recorded.arrays[f"target.log_distances.{k}"][i] for k in range(5)]) for i in range(2)]
    expected = torch.cat(images)[assignment.rows]
    torch.testing.assert_close(head.coder.encode(anchors, assignment.targets), expected, rtol=1e-5, atol=1e-6)
    if recorded.info["num_pos"] == 0:  # the official code crashes
        return recorded.assert_no_positives(terms)
    recorded.assert_losses(loss, terms, head.box_loss)


def feature_maps(batch=2):
    return [torch.randn(batch, 8, h, w) for h, w in SHAPES]


def targets(*boxes_per_image):
    boxes = [torch.tensor(boxes).reshape(-1, 4) for boxes in boxes_per_image]
    return [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "alrp", "focal"])
@pytest.mark.parametrize("boxes", [([], []), ([OBJECT], []), ([OBJECT], [OBJECT])], ids=["none", "one", "both"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, boxes, classes):
    if loss == "focal":
        objective = ScoreConfig(weights=TermWeights(smooth_l1=1.0), alpha=0.4, gamma=1.5)
        head = published(objective=objective, box_loss="smooth_l1", classes=classes, stacked_convs=1)
    else:
        head = published(loss, classes, stacked_convs=1)
    terms = head.losses(head(feature_maps()), SIZES, targets(*boxes)).terms
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if name != "cls")


def test_distances_by_hand():
    """From (8, 8), over 16 pixels: 8, 4, 16 and 32 pixels to the left, top, right and bottom."""
    reference, box = torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 4, 24, 40]])
    expected = torch.tensor([[1 / 2, 1 / 4, 1, 2]]).log()
    torch.testing.assert_close(PointCoder().encode(reference, box), expected)
    torch.testing.assert_close(PointCoder().decode(reference, expected), box)


def test_distances_have_bounds():
    reference = torch.tensor([[0.0, 0, 16, 16]])
    far = PointCoder().encode(reference, torch.tensor([[9.0, 8.0, 1000, 8.5]]))  # left of the point: beyond it
    torch.testing.assert_close(far, torch.tensor([[1 / 16, 1 / 16, 16, 1 / 16]]).log())
    assert PointCoder().decode(reference, torch.full((1, 4), 1e4)).isfinite().all()


def test_a_huge_object_is_cut_for_the_box_loss():
    """A side of 1000 pixels cannot be reached from 16-pixel distances; predicting the longest is no error."""
    head = published()
    anchors, boxes = torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 1000, 16]])
    quality, losses = head.box_losses(anchors, torch.tensor([[0.5, 0.5, 16, 0.5]]).log(), boxes)
    torch.testing.assert_close(quality, torch.ones(1))
    torch.testing.assert_close(losses["giou"], torch.zeros(1), atol=1e-6, rtol=0)


def test_one_cell_becomes_the_detection():
    head = published(classes=2, score_threshold=0.5)
    logits = [torch.full((1, h, w, 1, 2), -5.0) for h, w in SHAPES]
    deltas = [torch.zeros(1, h, w, 1, 4) for h, w in SHAPES]
    logits[1][0, 1, 2, 0, 1] = 1.0  # the center of the cell is (40, 24); distances are multiples of 32 pixels
    deltas[1][0, 1, 2, 0] = torch.tensor([1.0, 0.25, 0.5, 0.5]).log()
    (found,) = head.predict(DenseOutput(logits, deltas), [(500, 500)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[8.0, 16, 56, 40]]))
    assert found["labels"].tolist() == [1] and found["scores"].tolist() == [pytest.approx(1 / (1 + math.exp(-1)))]


@pytest.mark.parametrize("loss", ["brs", "alrp"])
def test_learns_an_object(loss):
    head, features = published(loss, classes=2, stacked_convs=1), feature_maps(1)
    if loss == "alrp":
        head.objective = RankingObjective("alrp", 1.0, period=None)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(60):
        terms = head.losses(head(features), SIZES[:1], targets([OBJECT])).terms
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    best = head.predict(head(features), SIZES[:1])[0]["boxes"][0]
    assert (best - torch.tensor(OBJECT)).abs().max() < 5
