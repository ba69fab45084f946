"""RetinaNet's head, against arrays of the official ranking heads and against what must hold anyway."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.heads.retinanet import RetinaNetHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.one_stage_config import RetinaNetHeadConfig
from brs_detr.ops.anchors import octave_scales

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

CASES = ["normal", "empty_one", "empty_both"]
FEATURES = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
SIZES = [(48, 64), (40, 56)]


def published(loss, classes=5, **options):
    """The aLRP repository's head for AP or aLRP loss."""
    if loss == "ap":
        options |= {"objective": RankingConfig("ap", box_weight=1.0), "box_loss": "smooth_l1"}
    else:
        options |= {"objective": RankingConfig("alrp", balance="epoch")}
    return build(classes, **options)


def build(classes, dim=8, **options):
    return RetinaNetHead(dim, classes, cnn.STRIDES, RetinaNetHeadConfig(**options))


def check(recorded, head, loss):
    terms, assignment = head.losses(recorded.output(), recorded.sizes(), recorded.targets())
    valid = torch.ones_like(assignment.labels).bool() if assignment.valid is None else assignment.valid
    for image, labels in enumerate(assignment.per_image(torch.where(valid, assignment.labels, -1))):
        assert torch.equal(labels, recorded.target_labels(image))
    if recorded.info["num_pos"] == 0:
        return recorded.assert_no_positives(terms)
    # The official code computes aLRP's GIoU in units of the anchors: its constant of 1e-6 is then no longer negligible.
    recorded.assert_losses(loss, terms, head.box_loss, tolerance=3e-5 if loss == "alrp" else 1e-5)


@pytest.mark.parametrize("loss", ["ap", "alrp"])
@pytest.mark.parametrize("case", CASES)
def test_official_targets_losses_and_gradients(case, loss):
    check(cnn.load(f"retinanet_{case}"), published(loss), loss)


@pytest.mark.parametrize("case", CASES[:2])
def test_official_losses_with_atss_assignment(case):
    check(cnn.load(f"retinanet_atss_{case}"), published("alrp", assigner="atss", anchor_ratios=(1.0,)), "alrp")


def test_official_anchors():
    recorded = cnn.load("retinanet_normal")
    for level, ours in enumerate(published("ap").anchors(recorded.output().shapes)):
        torch.testing.assert_close(ours.reshape(-1, 4), recorded.arrays[f"anchors.{level}"])


def feature_maps(dim=8, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in FEATURES]


def targets(*boxes_per_image, classes=5):
    boxes = [torch.tensor(boxes).reshape(-1, 4) for boxes in boxes_per_image]
    return [{"boxes": own, "labels": torch.randint(classes, (len(own),))} for own in boxes]


OBJECT = [4.0, 4, 36, 36]
OBJECTIVES = {
    "focal": ScoreConfig(weights=TermWeights(giou=2.0)),
    **{loss: RankingConfig(loss, score_weighted=True) for loss in ("brs", "rs", "bap", "ap")},
    **{loss: RankingConfig(loss, balance="epoch") for loss in ("alrp", "balrp")},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("boxes", [([], []), ([OBJECT], []), ([OBJECT], [OBJECT])], ids=["none", "one", "both"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_has_a_gradient_whatever_the_images_show(objective, boxes, classes):
    head = build(classes, objective=OBJECTIVES[objective], stacked_convs=1)
    terms = head.losses(head(feature_maps()), SIZES, targets(*boxes, classes=classes)).terms
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        empty = {name: float(value.detach()) for name, value in terms.items() if name != "cls"}
        assert set(empty.values()) == {0.0}  # no constant; focal loss still pushes all scores down


@pytest.mark.parametrize("classes", [1, 3, 90])
def test_rows_without_an_object_are_background_with_any_number_of_classes(classes):
    """Positives are as many as the anchors assigned, also with fewer classes than COCO has."""
    head = build(classes, objective=RankingConfig("ap"), stacked_convs=0)
    assignment = head.losses(head(feature_maps()), SIZES, targets([OBJECT], [], classes=classes)).assignment
    positive = assignment.labels < classes
    assert 0 < positive.sum() == len(assignment.rows) < 30
    assert (assignment.labels[~positive] == classes).all()


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "alrp"])
def test_a_positive_whose_box_misses_its_object_is_still_a_positive(loss):
    """An IoU of 0 is the quality of a positive, not the mark of a negative: its logit is pushed up."""
    head = build(3, objective=RankingConfig(loss, balance="epoch"), stacked_convs=0)
    output = head(feature_maps(batch=1))
    far = [torch.full_like(delta, 50.0).requires_grad_() for delta in output.deltas]
    logits = [torch.zeros_like(level).requires_grad_() for level in output.logits]
    terms, assignment = head.losses(DenseOutput(logits, far), SIZES[:1], targets([OBJECT], classes=3))
    sum(terms.values()).backward()
    gradient = torch.cat([level.grad.reshape(-1, 3) for level in logits])
    own = gradient[assignment.rows, assignment.labels[assignment.rows]]
    assert len(own) and (own < 0).all()


def test_towers_are_the_papers():
    """Four convolutions with bias and no norm in each tower, and a prior of 0.01."""
    head = build(4, dim=16, objective=RankingConfig("ap"))
    convs = [layer for layer in head.class_tower.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) == 4 and all(conv.bias is not None for conv in convs)
    assert not any(isinstance(layer, nn.GroupNorm) for layer in head.modules()) and not len(head.scales)
    assert head.score.out_channels == 6 * 4 and head.delta.out_channels == 6 * 4
    torch.testing.assert_close(head.score.bias.sigmoid(), torch.full((24,), 0.01))


@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_smooth_l1_is_the_mean_over_four_offsets(beta):
    head = published("ap", beta=beta)
    anchors, boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 10]]), torch.tensor([[1.0, 0, 11, 12], [0, 0, 8, 8]])
    deltas = torch.randn(2, 4)
    _, losses = head.box_losses(anchors, deltas, boxes)
    expected = smooth_l1_loss(deltas, head.coder.encode(anchors, boxes), beta=beta)
    torch.testing.assert_close(losses["smooth_l1"].mean(), expected)


def test_octave_scales():
    assert octave_scales(4.0, 2) == pytest.approx((4, 4 * 2**0.5))
    assert octave_scales(4.0, 3) == pytest.approx((4, 5.0397, 6.3496), abs=1e-4)
