"""RoI head of the published CNN detectors, against arrays of the official ranking heads."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import region_losses

from brs_detr.models.config import RoIConfig
from brs_detr.models.heads.roi import RoIHead, RoIOutput
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

STRIDES = (4, 8, 16, 32)
PUBLISHED = RoIConfig(
    RankingConfig(score_weighted=True, balance="epoch"),
    fc_dim=16,
    add_ground_truth=True,
    score_threshold=0.4,
    max_detections=100,
)
CASES = [f"faster_rcnn_{case}" for case in ("normal", "empty_one", "empty_both")]
MASK_CASES = [f"mask_rcnn_{case}" for case in ("normal", "empty_one")]


def published(loss="brs", classes=5, dim=4, **changes):
    config = replace(PUBLISHED, **changes)
    if loss is not None:
        config = replace(config, objective=replace(config.objective, loss=loss))
    return RoIHead(dim, classes, STRIDES, config)


def assert_samples(recorded, rois, assignments):
    """Same RoIs in the same order, and the same objects."""
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rois, recorded.rois(), strict=True))
    for image, assigned in enumerate(assignments):
        expected = recorded.arrays[f"roi.sample.{image}.pos_gt_inds"].long()
        assert torch.equal(assigned[: len(expected)], expected) and (assigned[len(expected) :] < 0).all()


@pytest.mark.parametrize("loss", ["rs", "brs"])
@pytest.mark.parametrize("case", [*CASES, *MASK_CASES])
def test_official_samples_losses_and_gradients(case, loss):
    recorded = cnn.load(case)
    head = published(loss, low_quality=recorded.info["match_low_quality"])
    rois, assigned = head.sample(recorded.proposals(), recorded.sizes("img_shape"), recorded.targets())
    assert_samples(recorded, rois, assigned)
    assignment = head.assign(rois, assigned, recorded.targets())
    assert torch.equal(assignment.labels, recorded.arrays["target.labels"].long())
    assert torch.equal(assignment.targets, recorded.arrays["target.bbox_targets"][assignment.rows])
    terms = head.terms(recorded.regions(), assignment, {})
    if recorded.info["num_pos"] == 0:  # theirs return a constant of 1 for each term
        return recorded.assert_no_positives(terms)
    recorded.info["losses"][loss].pop("loss_mask", None)  # `test_mask.py` checks it
    recorded.leaves.pop("mask.pred_gt_class", None)
    recorded.assert_losses(loss, terms)


@pytest.mark.parametrize("case", ["normal", "empty_one", "empty_both"])
def test_official_losses_and_gradients_of_alrp(case):
    """The aLRP repository does not add the objects to the proposals."""
    recorded = cnn.load(f"faster_rcnn_alrp_{case}")
    head = published("alrp", add_ground_truth=False)
    rois, assigned = head.sample(recorded.proposals(), recorded.sizes("img_shape"), recorded.targets())
    assert_samples(recorded, rois, assigned)
    terms = head.terms(recorded.regions(), head.assign(rois, assigned, recorded.targets()), {})
    if recorded.info["num_pos"] == 0:
        return recorded.assert_no_positives(terms)
    recorded.assert_losses("alrp", terms)


@pytest.mark.parametrize("case", [*CASES, *MASK_CASES])
def test_official_detections(case):
    recorded = cnn.load(case)
    output = recorded.regions()
    head = published()
    found = head.detect(recorded.rois(), output.logits.detach(), output.deltas.detach(), recorded.sizes("img_shape"))
    for image, detections in enumerate(found):
        expected = recorded.arrays[f"det.{image}.bboxes"].reshape(-1, 5)
        torch.testing.assert_close(detections["boxes"], expected[:, :4], rtol=0, atol=1e-3)
        torch.testing.assert_close(detections["scores"], expected[:, 4], rtol=1e-5, atol=1e-6)
        assert torch.equal(detections["labels"], recorded.arrays[f"det.{image}.labels"].long())


SIZES = [(64, 96), (40, 80)]


def feature_maps(dim=4, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]]


def random_boxes(count):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 40], dim=1)


def random_targets(*counts, classes=5):
    return [{"boxes": random_boxes(n), "labels": torch.randint(classes, (n,))} for n in counts]


CE = ScoreConfig("cross_entropy", TermWeights(l1=1.0, giou=1.0), normalizer="rows")


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "cross_entropy", "focal"])
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (3, 2), (0,)])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, counts, class_agnostic):
    changes = {"class_agnostic": class_agnostic}
    if loss in ("cross_entropy", "focal"):
        changes |= {"objective": CE, "box_loss": "l1", "sample": 16}
    head = published(loss, **changes)
    terms, _ = region_losses(
        head,
        feature_maps(batch=len(counts)),
        [random_boxes(9) for _ in counts],
        SIZES[: len(counts)],
        random_targets(*counts),
    )
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(counts):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if name != "cls")


def test_a_class_agnostic_head_has_one_box_for_all_classes():
    head = published(class_agnostic=True)
    output = head(feature_maps(), [random_boxes(3), random_boxes(4)])
    assert output.deltas.shape == (7, 1, 4) and output.logits.shape == (7, 5)
    deltas = torch.zeros(1, 1, 4)
    deltas[..., 0] = 5.0  # to the right by half a width
    roi = [torch.tensor([[0.0, 0, 20, 20]])]
    (found,) = head.detect(roi, torch.tensor([[1.0, 2.0, -9, -9, -9]]), deltas, [(50, 50)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[10.0, 0, 30, 20]]).expand(2, 4))
    assert found["labels"].tolist() == [1, 0]


def test_positives_start_at_the_minimum_iou():
    target = [{"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([1])}]
    rois = [torch.tensor([[0.0, 0, 20, 14], [0, 0, 20, 12]])]  # IoU 0.7 and 0.6
    for min_iou, expected in ((0.5, [0, 0]), (0.65, [0, -1]), (0.75, [-1, -1])):
        head = published(min_iou=min_iou, add_ground_truth=False)
        assert head.sample(rois, SIZES[:1], target)[1][0].tolist() == expected


def test_low_quality_moves_a_positive_to_the_object_that_has_no_better_one():
    target = [{"boxes": torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 16]]), "labels": torch.tensor([1, 2])}]
    rois = [torch.tensor([[0.0, 0, 20, 19]])]
    assert published(add_ground_truth=False).sample(rois, SIZES[:1], target)[1][0].tolist() == [0]
    low = published(add_ground_truth=False, low_quality=True)
    assert low.sample(rois, SIZES[:1], target)[1][0].tolist() == [1]
    bad = [torch.tensor([[0.0, 0, 20, 4]])]
    assert low.sample(bad, SIZES[:1], target)[1][0].tolist() == [-1]


def test_l1_is_on_offsets_over_their_deviations():
    """The object is half a RoI's width to the right: 0.5 / 0.1; with other deviations 0.5 / 0.5."""
    target = [{"boxes": torch.tensor([[10.0, 0, 30, 20]]), "labels": torch.tensor([0])}]
    rois = [torch.tensor([[0.0, 0, 20, 20]])]
    for stds, expected in (((0.1, 0.1, 0.2, 0.2), 5.0), ((0.5, 0.5, 0.5, 0.5), 1.0)):
        options = {"objective": CE, "box_loss": "l1", "coder_stds": stds, "min_iou": 0.3}
        head = published(None, add_ground_truth=False, **options)
        assignment = head.assign(*head.sample(rois, SIZES[:1], target), target)
        output = RoIOutput(torch.zeros(1, 6), torch.zeros(1, 5, 4))
        assert float(head.terms(output, assignment, {})["l1"].detach()) == pytest.approx(expected)


def test_smooth_l1_is_four_times_the_mean_where_its_weight_is_four():
    """One of four offsets is wrong by 5: 5 - 1/2 at beta 1, and 5 - 1/4 at beta 1/2."""
    target = [{"boxes": torch.tensor([[10.0, 0, 30, 20]]), "labels": torch.tensor([0])}]
    rois = [torch.tensor([[0.0, 0, 20, 20]])]
    objective = replace(CE, weights=TermWeights(smooth_l1=4.0))
    for beta, expected in ((1.0, 4.5), (0.5, 4.75)):
        options = {"objective": objective, "box_loss": "smooth_l1", "beta": beta, "min_iou": 0.3}
        head = published(None, add_ground_truth=False, **options)
        assignment = head.assign(*head.sample(rois, SIZES[:1], target), target)
        output = RoIOutput(torch.zeros(1, 6), torch.zeros(1, 5, 4))
        assert float(head.terms(output, assignment, {})["smooth_l1"].detach()) == pytest.approx(expected)


@pytest.mark.parametrize("sample", [None, 8])
def test_added_objects_are_the_first_rois(sample):
    torch.manual_seed(0)
    changes = {"objective": CE, "sample": sample}
    head, targets = published(None, **changes), random_targets(4, 0)
    proposals = [torch.cat([targets[0]["boxes"] + 0.25, random_boxes(9)]), random_boxes(9)]
    rois, _ = head.sample(proposals, SIZES, targets)
    counts = head.added(rois, targets)
    for own, added, target in zip(rois, counts, targets):
        equal = (own[:, None] == target["boxes"]).all(dim=2).any(dim=1)
        assert equal[:added].all() and not equal[added:].any()
    assert counts[1] == 0 and (counts[0] == 4 if sample is None else counts[0] <= 2)
    assert published(add_ground_truth=False).added(rois, targets) == [0, 0]


def test_refined_boxes_are_those_of_the_object_or_of_the_best_class_of_all():
    """The last class can win, softmax's background cannot."""
    head = published(None, objective=CE, classes=3)
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 1, 2, 9.0], [3, 1, 2, 9.0]])
    deltas = torch.arange(3.0).view(1, 3, 1).repeat(3, 1, 4) * torch.tensor([1.0, 0, 0, 0])  # class c: c / 10 widths
    rois = [torch.tensor([[0.0, 0, 20, 20]]).repeat(3, 1)]
    output = RoIOutput(logits, deltas)
    (boxes,) = head.refine(rois, output, [(15, 22)], labels=torch.tensor([1, 3, 3]))
    torch.testing.assert_close(boxes[:, 0], torch.tensor([2.0, 4.0, 0.0]))
    torch.testing.assert_close(boxes[:, 2], torch.tensor([22.0, 22.0, 20.0]))
    assert (boxes[:, 3] == 15).all()
    (boxes,) = head.refine(rois, output, [(15, 22)], added=[2])
    assert len(boxes) == 1 and boxes[0, 0] == 0
    (boxes,) = head.refine(rois, output, [(15, 22)])
    torch.testing.assert_close(boxes[:, 0], torch.tensor([0.0, 4.0, 0.0]))
