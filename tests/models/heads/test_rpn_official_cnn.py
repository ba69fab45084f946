"""Region proposal network of the published CNN detectors, against arrays of the official ranking heads."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from brs_detr.assign.max_iou import IGNORED, MaxIoUAssigner
from brs_detr.models.config import RPNConfig
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.ops.anchors import inside_image

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

STRIDES = (4, 8, 16, 32, 64)
CASES = ["normal", "own_padding", "empty_one", "empty_both", "border0"]
PUBLISHED = RPNConfig(
    RankingConfig(weight=0.2, score_weighted=True, tau=0.7, balance="epoch"),
    proposals_before_nms=2000,
    proposals=1000,
    anchor_scale=8.0,
    scales_per_octave=1,
    coder_stds=(0.1, 0.1, 0.2, 0.2),
)


def published(loss="brs", dim=8, **changes):
    config = replace(PUBLISHED, **changes)
    return RPNHead(dim, STRIDES, replace(config, objective=replace(config.objective, loss=loss)))


def sizes_of(recorded):
    """Without a border, the sizes padded to 32 as theirs; with one the images' own, since it says more."""
    return recorded.sizes("pad_shape" if recorded.info.get("allowed_border", -1) < 0 else "img_shape")


@pytest.mark.parametrize("loss", ["rs", "brs"])
@pytest.mark.parametrize("case", CASES)
def test_official_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"rpn_{case}")
    head = published(loss, allowed_border=0.0 if case == "border0" else None)
    terms, assignment = head.losses(recorded.output(), sizes_of(recorded), recorded.targets())
    learned = torch.where(assignment.valid, assignment.labels, -1)
    for image, labels in enumerate(assignment.per_image(learned)):
        # Theirs are ignored where we have no row: in the padding beyond an image's own.
        expected = recorded.target_labels(image)
        assert torch.equal(labels[labels >= 0], expected[expected >= 0])
        assert (labels == 0).sum() == (expected == 0).sum()
    if recorded.info["num_pos"] == 0:  # theirs return a constant of 1 for each term
        return recorded.assert_no_positives(terms)
    recorded.assert_losses(loss, terms)


@pytest.mark.parametrize("case", ["normal", "empty_one", "empty_both"])
def test_official_losses_and_gradients_of_alrp(case):
    recorded = cnn.load(f"rpn_alrp_{case}")
    head = published("alrp")
    terms = head.losses(recorded.output(), recorded.sizes(), recorded.targets()).terms
    if recorded.info["num_pos"] == 0:
        return recorded.assert_no_positives(terms)
    recorded.assert_losses("alrp", terms, tolerance=3e-5)  # theirs decode in units of the anchors


@pytest.mark.parametrize("case", CASES)
def test_official_proposals(case):
    recorded = cnn.load(f"rpn_{case}")
    for image, ours in enumerate(published().proposals(recorded.output(), recorded.sizes("img_shape"))):
        theirs = recorded.arrays[f"proposals.{image}"][:, :4]
        theirs = theirs[(theirs[:, 2:] > theirs[:, :2]).all(dim=1)]  # they keep empty boxes
        assert len(theirs) > 900
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-3)


def feature_maps(dim=8, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]]


SIZES = [(64, 96), (40, 80)]
OBJECT = [10.0, 10, 42, 42]


def targets(*boxes_per_image):
    boxes = [torch.tensor(boxes).reshape(-1, 4) for boxes in boxes_per_image]
    return [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]


@pytest.mark.parametrize("border", [None, 0.0])
@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "balrp", "alrp", "ndcg", "focal", "binary_cross_entropy"])
@pytest.mark.parametrize("boxes", [([], []), ([OBJECT], []), ([OBJECT], [OBJECT])], ids=["none", "one", "both"])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, boxes, border):
    if loss in ("focal", "binary_cross_entropy"):
        sample = 256 if loss == "binary_cross_entropy" else None
        head = published(
            loss,
            objective=ScoreConfig(weights=TermWeights(l1=1.0)),
            box_loss="l1",
            sample=sample,
            allowed_border=border,
        )
    else:
        head = published(loss, allowed_border=border)
    terms = head.losses(head(feature_maps()), SIZES, targets(*boxes)).terms
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if name != "cls")


def test_anchors_beyond_the_border_neither_learn_nor_take_an_object():
    """Of three anchors, the best one sticks out: the second is then the object's best, and is not sampled away."""
    anchors = torch.tensor([[-4.0, 0, 28, 32], [4, 4, 36, 36], [60, 60, 92, 92]])
    objects = torch.tensor([[0.0, 0, 28, 32]])
    allowed = inside_image(anchors, (100, 100))
    assert allowed.tolist() == [False, True, True]
    assign = MaxIoUAssigner(0.7, 0.3, 0.3)
    assert assign(anchors, [3], objects).tolist() == [0, IGNORED, -1]
    assert assign(anchors, [3], objects, allowed).tolist() == [IGNORED, 0, -1]


def test_border_is_measured_in_pixels_and_the_last_column_is_outside():
    anchors = torch.tensor([[-2.0, 0, 10, 10], [0, 0, 20, 10], [0, 0, 19.9, 10], [0, -3, 10, 10], [0, 5, 10, 12.5]])
    assert inside_image(anchors, (12, 20)).tolist() == [False, False, True, False, False]
    assert inside_image(anchors, (12, 20), border=2.0).tolist() == [True, True, True, False, True]


def test_first_objectness_is_the_prior():
    zero = [torch.zeros(1, 8, 2, 2)] * 5
    assert all((x == 0).all() for x in published()(zero).logits)
    scores = published(prior=0.01)(zero).logits[0].sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.01))


def test_the_border_is_that_of_each_image_and_not_of_the_batch():
    head = published(allowed_border=0.0)
    _, learned = head.losses(head(feature_maps()), SIZES, targets([OBJECT], [OBJECT]))
    for (height, width), own, valid in zip(SIZES, learned.references, learned.per_image(learned.valid), strict=True):
        limits = torch.tensor([width, height])
        inside = (own[:, :2] >= 0).all(dim=1) & (own[:, 2:] < limits).all(dim=1)
        assert not valid[~inside].any() and valid[inside].any()
